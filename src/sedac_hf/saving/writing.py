"""Writing a SEDAC model or adapter to a folder."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import LoadError
from sedac_hf.saving import CARD_FILE, CONFIG_FILE, FINGERPRINT_FILE, REPORT_FILE, TENSORS_FILE
from sedac_hf.saving.fingerprint import fingerprint_of
from sedac_hf.saving.model_card import is_ours, model_card
from sedac_hf.saving.replacing import move_into_place
from sedac_hf.saving.tensors import write_tensors

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport
    from sedac_hf.modeling import SedacForCausalLM


def save(
    model: SedacForCausalLM,
    directory: str | os.PathLike[str],
    *,
    adapter_only: bool,
    name: str | None = None,
    tags: list[str] | None = None,
    **kwargs: Any,
) -> None:
    """Write ``model`` to ``directory``, by way of a temporary folder beside it.

    name, tags: of the model card; default: the folder's name. kwargs go to the base's ``save_pretrained``
    (``max_shard_size``, ``variant``, a ``state_dict`` with our keys).
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise LoadError(f"`save_directory` must be a folder, got the file {target}")
    target = Path(os.path.realpath(target))  # what a link leads to is replaced, not the link
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        folder = Path(temporary, target.name)
        folder.mkdir()
        config, report = _write(model, folder, adapter_only=adapter_only, kwargs=kwargs)
        if is_ours(target / CARD_FILE):
            text = model_card(config, report, name or target.name, tags)
            (folder / CARD_FILE).write_text(text, encoding="utf-8")
        move_into_place(folder, target, _is_of_a_save)


def _is_of_a_save(name: str) -> bool:
    """Whether an older save may have left this file, which then has no place beside a newer one."""
    weights = name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json"))
    return weights or name in (CONFIG_FILE, TENSORS_FILE, REPORT_FILE, FINGERPRINT_FILE)


def _write(
    model: SedacForCausalLM, folder: Path, *, adapter_only: bool, kwargs: dict[str, Any]
) -> tuple[SedacConfig, CalibrationReport | None]:
    config: SedacConfig = copy.deepcopy(model.config)
    config.architectures = ["SedacForCausalLM"]
    config.text_config.architectures = [type(model.model).__name__]
    config.base_model_name_or_path = config.base_revision = config.base_fingerprint = None
    state = kwargs.pop("state_dict", None)
    if adapter_only:
        _name_base(model, config)
    elif model.runtime.sharded:
        raise LoadError(
            "a tensor-parallel model can be saved as an adapter only: use `adapter_only=True` on one rank; its "
            "base is the checkpoint that it was loaded from"
        )
    elif state is not None:
        prefix = f"{model.base_model_prefix}."
        kwargs["state_dict"] = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    # A sharded base's parts are not compared, and ordering them takes all ranks.
    with nullcontext() if model.runtime.sharded else model.runtime.weights.natural_order():
        if not adapter_only:
            model.model.save_pretrained(folder, **kwargs)
            if hasattr(model.model.config, "auto_map"):  # its code is in the folder now
                config.text_config.auto_map = dict(model.model.config.auto_map)
        if adapter_only or state is None:  # else the weights that are written may not be the model's
            fingerprint = fingerprint_of(model.model)
            config.base_fingerprint = fingerprint.digest
            (folder / FINGERPRINT_FILE).write_text(fingerprint.to_json(), encoding="utf-8")
    policy = model.runtime.policy
    if policy is not None:
        write_tensors(policy.to_tensors(), folder / TENSORS_FILE)
    report = None if policy is None else model.calibration_report  # it is about a policy
    if report is not None:
        text = json.dumps(report.to_dict(), indent=2)
        (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    return config, report


def _name_base(model: SedacForCausalLM, config: SedacConfig) -> None:
    """Where an adapter finds its base again."""
    base = model.model.name_or_path or model.config.base_model_name_or_path
    if not base:
        raise LoadError("an adapter must name its base, but this base has no `name_or_path`; save the whole model")
    if os.path.isdir(base):
        config.base_model_name_or_path = os.path.abspath(base)
    else:
        config.base_model_name_or_path = base
        config.base_revision = model.config.base_revision
