"""What every command means by a model: "demo", a folder, or a hub id; and where and how it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

DEMO = "demo"


def model_path(model: str) -> str:
    """The folder or hub id that a command's model argument names; "demo" is the embedded decoder."""
    from sedac_hf.assets import demo_path

    return str(demo_path()) if model == DEMO else model


def load_model(model: str, *, dtype: str = "auto", device: str | None = None) -> SedacForCausalLM:
    """Load a SEDAC model, an adapter, or a plain decoder (uncalibrated).

    Args:
        model: "demo", a folder, or a hub id.
        dtype: "auto" (as saved; float32 for "demo" on a CPU, which is slow in the half precision it is stored in) or
            the name of a torch dtype.
        device: e.g. "cpu", "cuda:0" or "auto"; default: the first GPU where there is one, else the CPU.
    """
    import torch

    from sedac_hf.modeling import SedacForCausalLM

    place = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if model == DEMO and dtype == "auto" and place == "cpu":
        dtype = "float32"
    loaded: SedacForCausalLM = SedacForCausalLM.from_pretrained(model_path(model), dtype=dtype, device_map=place)
    return loaded


def load_tokenizer(model: str, loaded: SedacForCausalLM, tokenizer: str | None = None) -> Any:
    """The tokenizer that was named, else the model's own, else (for an adapter) that of its base."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer or model_path(model))
    except (OSError, ValueError, KeyError):  # an adapter's folder holds none, or not a whole one
        base = getattr(loaded.config, "base_model_name_or_path", None)
        if tokenizer is not None or not base:
            raise
        return AutoTokenizer.from_pretrained(base)
