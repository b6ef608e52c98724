"""The embedded decoder: a small trained model that ships with the package, so that everything can be tried offline.

It is a plain Llama-type decoder of 7.87M parameters with its tokenizer (see the card beside the weights for the data
split, the tokens seen and the losses). Nothing about it is special to SEDAC; `examples/train_demo_decoder.py` rebuilds
one like it from the running Python's standard library.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sedac_hf.errors import LoadError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def demo_path() -> Path:
    """Folder of the embedded decoder: what `from_pretrained` of transformers, or of this package, takes.

    Raises:
        LoadError: the installed package lacks one of the decoder's files.
    """
    folder = Path(__file__).parent / "demo_decoder"
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise LoadError(
            f"the embedded decoder must have the files {', '.join(_FILES)}, but {', '.join(missing)} is not in "
            f"{folder}; install sedac-hf again"
        )
    return folder


def load_demo(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the embedded decoder and its tokenizer, from the package alone (no network).

    Args:
        dtype: floating-point type of the weights; default float32 (they are stored as float16).

    Returns:
        The plain decoder in evaluation mode on the CPU, not yet wrapped, and its tokenizer. The model has no pad
        token of its own; the tokenizer pads with ``<|endoftext|>``.

    Example:
        >>> from sedac_hf import SedacForCausalLM, load_demo
        >>> decoder, tokenizer = load_demo()
        >>> model = SedacForCausalLM.from_base(decoder)
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo_path()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32 if dtype is None else dtype, use_safetensors=True, local_files_only=True
    )
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


__all__ = ["demo_path", "load_demo"]
