"""Reading the files of a saved folder or hub repository that are SEDAC's own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import LoadError, SedacError
from sedac_hf.ffn.policy import Policy
from sedac_hf.saving import CONFIG_FILE, FINGERPRINT_FILE, REPORT_FILE, TENSORS_FILE
from sedac_hf.saving.fingerprint import Fingerprint
from sedac_hf.saving.tensors import read_tensors

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport

_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained``'s arguments that say where files come from."""
    return {name: kwargs[name] for name in _HUB_ARGUMENTS if kwargs.get(name) is not None}


def read_config(path: str, trust_remote_code: bool | None = None, **hub: Any) -> PreTrainedConfig:
    """The configuration of a folder or hub id, `SedacConfig` for what sedac-hf saved.

    Raises:
        LoadError: it cannot be read.
    """
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, hub.get("subfolder", ""), CONFIG_FILE)):
        raise LoadError(f"{path} must hold a {CONFIG_FILE}; it has none: is this the folder of a saved model?")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **hub)
    except SedacError:
        raise
    except (StrictDataclassError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"the configuration of {path} cannot be read: {error}") from error


def tokenizer_path(path: str, config: PreTrainedConfig) -> str:
    """Folder or hub id of a model's tokenizer: the model's own, or where an adapter holds none its base's."""
    base = getattr(config, "base_model_name_or_path", None)
    return str(base) if base and _find(path, "tokenizer_config.json") is None else path


def commit_of(path: str, **hub: Any) -> str | None:
    """The commit that a hub id's files come from; None for a folder."""
    found: str | None = None if os.path.isdir(path) else extract_commit_hash(_find(path, CONFIG_FILE, **hub), None)
    return found


def read_policy(path: str, config: SedacConfig, **hub: Any) -> Policy | None:
    """The policy of a calibrated save; None for one that was saved uncalibrated.

    Raises:
        LoadError: the tensors are missing, damaged, or do not fit the configuration.
    """
    if not config.calibrated:
        return None
    found = _find(path, TENSORS_FILE, **hub)
    if found is None:
        raise LoadError(f"{path} says that it is calibrated, so it must hold {TENSORS_FILE}; the file is missing")
    tensors = read_tensors(found)
    try:
        return Policy.from_saved(config.to_sedac_dict(), tensors)
    except (SedacError, KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise LoadError(f"{found} does not fit {CONFIG_FILE}: {error}") from error


def read_report(path: str, **hub: Any) -> CalibrationReport | None:
    """The calibration report, where there is one."""
    found = _find(path, REPORT_FILE, **hub)
    if found is None:
        return None
    from sedac_hf.calibration import CalibrationReport  # brings the fitting with it, which only this needs

    try:
        return CalibrationReport.from_dict(json.loads(Path(found).read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        raise LoadError(f"{found} is damaged: {error}; delete it to load without the report") from error


def read_fingerprint(path: str, config: SedacConfig, **hub: Any) -> Fingerprint | None:
    """The fingerprint of the base; None where the configuration names none.

    Raises:
        LoadError: the file is missing, damaged, or another one than the configuration names.
    """
    if config.base_fingerprint is None:
        return None
    found = _find(path, FINGERPRINT_FILE, **hub)
    if found is None:
        raise LoadError(
            f"{path} must hold {FINGERPRINT_FILE} with the fingerprint {config.base_fingerprint} that its "
            f"{CONFIG_FILE} names; the file is missing"
        )
    try:
        read = Fingerprint.from_json(Path(found).read_text(encoding="utf-8"))
        digest = read.digest
    except (ValueError, TypeError, OverflowError) as error:
        raise LoadError(f"{found} is damaged: {error}; copy or download it again") from error
    if digest != config.base_fingerprint:
        raise LoadError(
            f"{found} must hold the fingerprint {config.base_fingerprint} that {CONFIG_FILE} names, got {digest}: the "
            "file is damaged or belongs to another save; copy or download both again"
        )
    return read


def _find(path: str, name: str, **hub: Any) -> str | None:
    found: str | None = cached_file(
        path,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    return found
