"""Tiny random decoders of many families, built from configs alone: seeded, eval, float32.

FFN weights are scaled up: at the usual initialisation logits hardly depend on the FFNs and no cut would show.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 64, 176, 4, 160

_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_GPT = {"n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
_NEOX = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "gemma3_text": {**_LLAMA, "sliding_window": 32},
    "phi3": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "gpt2": _GPT,
    "gpt_neox": _NEOX,
    "opt": {
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    },
    "mistral": {**_LLAMA, "sliding_window": 32},
    "glm4": _LLAMA,
    "bloom": {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4},
    "falcon": {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_hidden_size": 176},
    "starcoder2": {key: value for key, value in _LLAMA.items() if key != "head_dim"},
    "gptj": {**_GPT, "rotary_dim": 8},
}

# The families that every invariant is tested on; EXTRA_FAMILIES widen tests of structure.
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "gpt_neox", "opt"]
EXTRA_FAMILIES = [name for name in _CONFIGS if name not in FAMILIES]


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, ffn_scale: float = 8.0, **overrides: Any
) -> PreTrainedModel:
    """A random decoder of ``family`` in eval mode; ``overrides`` go to its config."""
    shared = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CONFIG_MAPPING[family](**{**shared, **_CONFIGS[family], **overrides})
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
