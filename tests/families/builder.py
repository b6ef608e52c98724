"""Build a tiny random decoder of a model type, and the arguments of a forward call."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.exceptions import NOT_BUILT
from tests.families.shrinking import HIDDEN, tiny_config

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every causal-LM model type of this version of transformers, also those in `NOT_BUILT`."""

FFN_STD = 0.16  # at the usual 0.02 logits hardly depend on the FFNs and no cut would show

_FFN_PART = re.compile(  # in a numbered layer
    r"\.\d+\.(.*\.)?(mlps?|mlp_block|ffns?|ff|fc\d|lin\d|feed_forward|intermediate|output|experts|shared_\w+"
    r"|block_sparse_moe|mixer\.(up|down)_proj)\b"
)
_FOREIGN_PART = re.compile(r"attn|attention|vision|audio|image|embed|patcher")


def build(model_type: str, *, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A random float32 decoder of ``model_type`` in eval mode, and two rows of input for it.

    Args:
        model_type: one of `MODEL_TYPES`.
        seed: of weights and input; the global generator is left as it was.
        overrides: go to the configuration.

    Raises:
        NotImplementedError: the type is in `NOT_BUILT`; says why.
    """
    if model_type in NOT_BUILT:
        raise NotImplementedError(f"{model_type} is not built: {NOT_BUILT[model_type]}")
    config = tiny_config(model_type, **overrides)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = _model_of(model_type, config).float().eval()
        with torch.no_grad():
            enlarge_ffns(model)
    finally:
        torch.random.set_rng_state(state)
    return model, inputs_for(model, seed=seed)


def inputs_for(model: PreTrainedModel, *, rows: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Random ids without special tokens; decoders of several streams (audio codebooks) take a row for each."""
    config = model.config
    streams = int(getattr(config, "num_codebooks", None) or 1) if hasattr(model, "lm_heads") else 1
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, vocabulary(config), (rows * streams, length), generator=generator)}


def vocabulary(config: PreTrainedConfig) -> int:
    """Number of tokens that the decoder knows."""
    return int(config.get_text_config(decoder=True).vocab_size)


def enlarge_ffns(model: PreTrainedModel) -> None:
    """Bring FFN weights to a size that counts, and make biases of which a forgotten one would show."""
    for name, parameter in model.named_parameters():
        if is_ffn_weight(name, parameter):
            std = float(parameter.std())
            parameter.mul_(FFN_STD / std) if std > 1e-6 else parameter.normal_(std=FFN_STD)  # some start at zero
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)


def is_ffn_weight(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is the weight of an FFN of the decoder, experts included.

    By its name and by what it does: it maps the stream to something wider, or back.
    """
    if parameter.dim() < 2 or not _FFN_PART.search(name) or _FOREIGN_PART.search(name):
        return False
    narrow, wide = sorted(parameter.shape[-2:])
    return narrow == HIDDEN < wide


def _model_of(model_type: str, config: PreTrainedConfig) -> PreTrainedModel:
    named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, named[0] if isinstance(named, tuple | list) else named)
    if isinstance(config, model_class.config_class):
        return AutoModelForCausalLM.from_config(config)
    # A composite configuration whose causal language model is made of one part.
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    part = next((part for part in parts if isinstance(part, model_class.config_class)), config)
    return model_class._from_config(part)
