"""All parts of a saved SEDAC model or adapter, read and held against each other before anything is attached."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from transformers import PreTrainedModel

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import LoadError
from sedac_hf.ffn.policy import Policy
from sedac_hf.saving.bases import load_weights, of_its_class
from sedac_hf.saving.fingerprint import check_base
from sedac_hf.saving.reading import commit_of, hub_arguments, read_fingerprint, read_policy, read_report

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport

_OF_THE_ADAPTER = ("revision", "subfolder")
BaseModel: TypeAlias = PreTrainedModel | str | os.PathLike[str] | None


class Saved(NamedTuple):
    """The base, bare, with its commit where it came from a hub; transformers' loading info where it was asked for;
    policy and report where there are some."""

    base: PreTrainedModel
    revision: str | None
    info: Any
    policy: Policy | None
    report: CalibrationReport | None


def load_saved(path: str, config: SedacConfig, base_model: BaseModel, kwargs: Mapping[str, Any]) -> Saved:
    """Read what lies beside the configuration at ``path``, small files first, and load the base.

    Args:
        base_model: instead of the base that the configuration names.
        kwargs: those of ``from_pretrained``; ``ignore_base_mismatch`` is ours, the others go to the base's.

    Raises:
        LoadError: something is missing or damaged, or the base's weights are not those that the policy was made for.
    """
    kwargs = dict(kwargs)
    ignore = kwargs.pop("ignore_base_mismatch", False)
    hub = hub_arguments(kwargs)
    policy, report = read_policy(path, config, **hub), read_report(path, **hub)
    fingerprint = read_fingerprint(path, config, **hub)
    loaded = _load_base(path, config, base_model, kwargs)
    base, info = loaded if isinstance(loaded, tuple) else (loaded, None)
    if fingerprint is not None:
        check_base(fingerprint, base, config, path, ignore=ignore)
    revision = config.base_revision
    if base_model is not None:
        named = {name: value for name, value in hub.items() if name not in _OF_THE_ADAPTER}
        revision = None if isinstance(base_model, PreTrainedModel) else commit_of(str(base_model), **named)
    return Saved(base, revision, info, policy, report)


def _load_base(
    path: str,
    config: SedacConfig,
    base_model: BaseModel,
    kwargs: Mapping[str, Any],
) -> Any:
    """The base of a saved SEDAC model: the one given, the one that an adapter names, or the one in the same folder.

    Returns:
        The model, or ``(model, loading_info)`` with ``output_loading_info=True``.

    Raises:
        LoadError: it cannot be found, or its weight files are missing or damaged.
    """
    if isinstance(base_model, PreTrainedModel):
        return base_model
    named = base_model or config.base_model_name_or_path
    if named is None:
        folder = Path(path, kwargs.get("subfolder") or "")
        if os.path.isdir(path) and not any(folder.glob("model*.safetensors")):
            raise LoadError(
                f"{path} must hold the base's weights (model*.safetensors) or name a base; it does neither"
            )
        return load_weights(path, config=of_its_class(config.text_config, path, kwargs), **kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _OF_THE_ADAPTER}
    if base_model is None and config.base_revision is not None:
        kwargs["revision"] = config.base_revision
    try:
        return load_weights(str(named), **kwargs)
    except LoadError:
        raise
    except OSError as error:
        raise LoadError(
            f"the base of the adapter {path} must be found where it says, at {named}; it is not: {error}. Give "
            "`base_model=` the folder, id or object to use"
        ) from error
