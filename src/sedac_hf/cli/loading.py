"""What every command means by a model: "demo", a folder, or a hub id; and where and how it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sedac_hf.configuration import SedacConfig
    from sedac_hf.modeling import SedacForCausalLM

DEMO = "demo"

ExtraMemoryOption = Annotated[
    float | None,
    typer.Option(
        help="Most bytes beside the base (shadow, compensation, probes), as a share of the base's.",
        show_default="as saved; 0.1 for a plain decoder",
    ),
]


def model_path(model: str) -> str:
    """The folder or hub id that a command's model argument names; "demo" is the embedded decoder."""
    from sedac_hf.assets import demo_path

    return str(demo_path()) if model == DEMO else model


def load_model(
    model: str, *, dtype: str = "auto", device: str | None = None, extra_memory: float | None = None
) -> SedacForCausalLM:
    """Load a SEDAC model, an adapter, or a plain decoder (uncalibrated).

    Args:
        model: "demo", a folder, or a hub id.
        dtype: "auto" (as saved; float32 for "demo" on a CPU, which is slow in the half precision it is stored in) or
            the name of a torch dtype.
        device: e.g. "cpu", "cuda:0" or "auto"; default: the first GPU where there is one, else the CPU.
        extra_memory: instead of a saved configuration's, or of the default (see `SedacConfig`).

    Raises:
        ConfigError: ``extra_memory`` is out of range, or a saved policy does not fit into it.
    """
    import torch

    from sedac_hf.modeling import SedacForCausalLM

    place = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if model == DEMO and dtype == "auto" and place == "cpu":
        dtype = "float32"
    path = model_path(model)
    config = None if extra_memory is None else _config_with(path, extra_memory)
    loaded: SedacForCausalLM = SedacForCausalLM.from_pretrained(path, config, dtype=dtype, device_map=place)
    return loaded


def _config_with(path: str, extra_memory: float) -> SedacConfig:
    """A saved configuration with this cap; for a plain decoder a new one."""
    from sedac_hf.configuration import SedacConfig, check_extra_memory
    from sedac_hf.saving.reading import read_config

    cap = check_extra_memory(extra_memory)
    config = read_config(path)
    if not isinstance(config, SedacConfig):
        return SedacConfig(extra_memory=cap)
    config.extra_memory = cap
    return config


def load_tokenizer(model: str, loaded: SedacForCausalLM, tokenizer: str | None = None) -> Any:
    """The tokenizer that was named, else the model's own, else (for an adapter) that of its base."""
    from transformers import AutoTokenizer

    from sedac_hf.saving.reading import tokenizer_path

    return AutoTokenizer.from_pretrained(tokenizer or tokenizer_path(model_path(model), loaded.config))
