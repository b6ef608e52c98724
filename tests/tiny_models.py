"""Tiny random decoders of the common families, built from configs alone: seeded, eval, float32.

FFN weights are scaled up: at the usual initialisation logits hardly depend on the FFNs and no cut would show.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.families.shrinking import HIDDEN, INTERMEDIATE, LAYERS, VOCAB, tiny_config

__all__ = ["EXTRA_FAMILIES", "FAMILIES", "HIDDEN", "INTERMEDIATE", "LAYERS", "VOCAB", "tiny_model", "token_ids"]

# The families that every invariant is tested on; EXTRA_FAMILIES widen tests of structure.
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt"]
EXTRA_FAMILIES = ["mistral", "glm4", "bloom", "falcon", "starcoder2", "gptj"]


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, ffn_scale: float = 8.0, **overrides: Any
) -> PreTrainedModel:
    """A random decoder of ``family`` in eval mode; ``overrides`` go to its config."""
    config = tiny_config(family, **overrides)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_ffn_weight(name):
                    parameter.mul_(ffn_scale)
                elif parameter.dim() == 1 and name.endswith("bias"):
                    parameter.normal_(std=0.1)  # zero biases would hide a bias that is forgotten
    finally:
        torch.random.set_rng_state(state)
    return model.to(dtype).eval()


def is_ffn_weight(name: str) -> bool:
    """Whether a parameter is a weight matrix of an FFN."""
    return name.endswith("weight") and any(part in name for part in (".mlp.", ".fc1.", ".fc2.", ".feed_forward."))


def token_ids(rows: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Random ids int64 [rows, length] without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
