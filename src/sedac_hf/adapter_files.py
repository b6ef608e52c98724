"""The files of a saved SEDAC model: ``config.json``, ``sedac.safetensors``, ``calibration_report.json``.

A full save holds the base's own weight files beside them, an adapter names its base and revision instead. So base
weights are always loaded by the base's class, whatever its format, quantization or device map.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import LoadError, SedacError
from sedac_hf.ffn.policy import Policy

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport
    from sedac_hf.modeling import SedacForCausalLM

TENSORS_FILE = "sedac.safetensors"
REPORT_FILE = "calibration_report.json"
CONFIG_FILE = "config.json"
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"the configuration of {path} cannot be read: {error}") from error


def tokenizer_path(path: str, config: PreTrainedConfig) -> str:
    """Folder or hub id of a model's tokenizer: the model's own, or where an adapter holds none its base's."""
    base = getattr(config, "base_model_name_or_path", None)
    return str(base) if base and _find(path, "tokenizer_config.json") is None else path


def class_of(config: PreTrainedConfig) -> Any:
    """The class of the plain decoder with this configuration.

    A decoder that is part of a composite model goes by the composite's configuration in `AutoModelForCausalLM`: its
    own one leads nowhere there, but says in ``architectures`` which of those classes it is for.

    Raises:
        LoadError: it names none of them.
    """
    found = _auto_class_of(config)
    named = None if found is not None else next(iter(getattr(config, "architectures", None) or ()), None)
    if named is not None and any(named in _names(value) for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        found = getattr(transformers, named, None)
    if found is None:
        raise LoadError(
            f"a {type(config).__name__} must be a configuration that AutoModelForCausalLM knows, or name one of its "
            f"classes in `architectures`; got {named!r}: load the decoder of a causal language model"
        )
    return found


def from_config(config: PreTrainedConfig) -> Any:
    """A decoder with new weights, of the class that `class_of` gives."""
    if _auto_class_of(config) is not None:
        return AutoModelForCausalLM.from_config(config)
    return class_of(config)._from_config(config)


def _auto_class_of(config: PreTrainedConfig) -> Any | None:
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple | list) else found


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def load_base(path: str, config: SedacConfig, kwargs: Mapping[str, Any]) -> Any:
    """The base of a full save, by its own class, from the same folder.

    Raises:
        LoadError: weight files are missing or damaged.
    """
    if os.path.isdir(path) and not any(Path(path, kwargs.get("subfolder") or "").glob("model*.safetensors")):
        raise LoadError(f"{path} must hold the base's weights (model*.safetensors) or name a base; it does neither")
    return load_weights(path, config=_of_its_class(config.text_config, path, kwargs), **kwargs)


def _of_its_class(config: PreTrainedConfig, path: str, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """A base's configuration, by the class in the code beside its weights where it has none of transformers'."""
    if type(config) is not PreTrainedConfig:
        return config
    try:
        resolve_trust_remote_code(kwargs.get("trust_remote_code"), path, False, True)
        kind = get_class_from_dynamic_module(config.auto_map["AutoConfig"], path, **hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise LoadError(f"the configuration of the base in {path} cannot be read: {error}") from error
    kind.register_for_auto_class()  # its code is saved with it
    return cast(PreTrainedConfig, kind(**{name: value for name, value in vars(config).items() if name[0] != "_"}))


def load_weights(path: str, **kwargs: Any) -> Any:
    """A plain decoder by its own class, with one kind of error; weights that are missing are an error too.

    Returns:
        The model, or ``(model, loading_info)`` with ``output_loading_info=True``.

    Raises:
        LoadError: weight files are damaged, have other shapes, or lack weights of the model.
    """
    wanted = kwargs.pop("output_loading_info", False)
    try:
        model, info = _from_pretrained(path, output_loading_info=True, **kwargs)
    except (SafetensorError, RuntimeError) as error:
        raise LoadError(f"the base weights in {path} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and not kwargs.get("ignore_mismatched_sizes"):
        raise LoadError(
            f"the base weights in {path} must be complete; {len(missing)} are missing and would be random numbers: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return (model, info) if wanted else model


def _from_pretrained(path: str, **kwargs: Any) -> Any:
    """What `AutoModelForCausalLM` makes of a folder or id, or `class_of` where that knows no such configuration."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except ValueError:
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = read_config(str(config or path), kwargs.get("trust_remote_code"), **hub_arguments(kwargs))
        if _auto_class_of(config) is not None or getattr(config, "auto_map", None):
            raise
        return class_of(config).from_pretrained(path, **kwargs)


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
    try:
        tensors = load_file(found)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{found} is damaged: {error}; copy or download it again") from error
    try:
        return Policy.from_saved(config.to_sedac_dict(), tensors)
    except (SedacError, KeyError, ValueError, TypeError, IndexError) as error:
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


def save(model: SedacForCausalLM, directory: str | os.PathLike[str], *, adapter_only: bool, **kwargs: Any) -> None:
    """Write ``model`` to ``directory``, by way of a temporary folder beside it.

    kwargs go to the base's ``save_pretrained`` (``max_shard_size``, ``variant``, a ``state_dict`` with our keys).
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise LoadError(f"`save_directory` must be a folder, got the file {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        folder = Path(name)
        _write(model, folder, adapter_only=adapter_only, kwargs=kwargs)
        _move_into_place(folder, target)


def _write(model: SedacForCausalLM, folder: Path, *, adapter_only: bool, kwargs: dict[str, Any]) -> None:
    if adapter_only:
        base = model.model.name_or_path or model.config.base_model_name_or_path
        if not base:
            raise LoadError("an adapter must name its base, but this base has no `name_or_path`; save the whole model")
    elif model.runtime.sharded:
        raise LoadError(
            "a tensor-parallel model can be saved as an adapter only: use `adapter_only=True` on one rank; its "
            "base is the checkpoint that it was loaded from"
        )
    else:
        state = kwargs.pop("state_dict", None)
        if state is not None:
            prefix = f"{model.base_model_prefix}."
            kwargs["state_dict"] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        with model.runtime.weights.natural_order():
            model.model.save_pretrained(folder, **kwargs)
    config = copy.deepcopy(model.config)  # now: the base's says where its code is, if it has its own
    config.architectures = ["SedacForCausalLM"]
    config.text_config.architectures = [type(model.model).__name__]
    config.base_model_name_or_path = config.base_revision = None
    if adapter_only:
        config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
        config.base_revision = model.config.base_revision
    policy = model.runtime.policy
    if policy is not None:
        save_file(policy.to_tensors(), folder / TENSORS_FILE, metadata={"format": "pt"})
    if model.calibration_report is not None:
        text = json.dumps(model.calibration_report.to_dict(), indent=2)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)


def _move_into_place(folder: Path, target: Path) -> None:
    """Rename the folder, or its files into an existing one, ``config.json`` last; drop an older save's leftovers."""
    if not target.exists():
        shutil.copymode(target.parent, folder)
        os.replace(folder, target)
        folder.mkdir()  # for the temporary folder's own clean-up
        return
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == CONFIG_FILE)
    for name in names:
        os.replace(folder / name, target / name)
    ours = [*target.glob("model*.safetensors"), target / "model.safetensors.index.json"]
    for path in [*ours, target / TENSORS_FILE, target / REPORT_FILE]:
        if path.name not in names:
            path.unlink(missing_ok=True)
