"""Decoders of real shapes with random weights, and policies that use a given share: for timing, where weights' values
do not matter and a download would.

Nothing here says anything about quality.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from sedac_hf.errors import EvaluationError
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule, align_width
from sedac_hf.ffn.shadow import Shadow
from sedac_hf.layer_config import LayerConfig
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime

_QWEN = {"vocab_size": 151_936, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_LLAMA = {"vocab_size": 128_256, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}

SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "qwen2.5-0.5b": (
        Qwen2Config,
        {**_QWEN, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        {**_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        {**_QWEN, "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    ),
}  # fmt: skip
"""Name -> configuration class and sizes, as the models of these names have them."""

N_LEVELS = 8
_PROBE_RANK = 64
_SAMPLE = (2, 16)  # rows and tokens of the random prompt that thresholds are read off


def random_decoder(
    shape: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A decoder of a shape in `SHAPES`, in eval mode; ``changes`` go to its configuration (fewer layers, say).

    Raises:
        EvaluationError: no such shape.
    """
    if shape not in SHAPES:
        raise EvaluationError(f"`shape` must be one of {', '.join(SHAPES)}, got {shape!r}")
    config_class, sizes = SHAPES[shape]
    # No end of text: every run generates as many tokens as it is asked for.
    config = config_class(**{**sizes, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0, **changes})
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        with torch.device(device):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def shadow_share(hidden_size: int, *, gated: bool = True) -> float:
    """What a 4-bit shadow adds to the needed share: its bytes over those of the FFN of a bf16 base."""
    groups = -(-hidden_size // 64)
    return (groups * (32 + 2) + 4) / (2 * (3 if gated else 2) * hidden_size)


def forced_policy(runtime: SedacRuntime, cut: Literal["select", "truncate"], share: float, *, seed: int = 0) -> Policy:
    """A policy under which every token uses ``share`` of every FFN's bytes (needed share, shadow included).

    Probes and law run as in a calibrated model, but all levels below the top mean the same, so that the share is the
    one asked for. Under "select" the units differ from token to token; thresholds are read off a random prompt.

    Raises:
        EvaluationError: the share is not above what deciding costs and at most 1.
    """
    costs = [shadow_share(site.hidden_size, gated=site.kind != "plain") for site in runtime.sites]
    least = max(costs) if cut == "select" else 0.0
    if not least < share <= 1:
        raise EvaluationError(f"`share` must be above {least:.3f} and at most 1, got {share}")
    units = [share - cost if cut == "select" else share for cost in costs]
    thresholds = _thresholds(runtime, units, seed) if cut == "select" and share < 1 else [0.0] * len(units)
    rows = []
    for site, kept, threshold in zip(runtime.sites, units, thresholds, strict=True):
        f = site.intermediate_size
        width = f if cut == "select" or share == 1 else align_width(kept * f, f)
        rows.append((OperatingPoint(0), *[OperatingPoint(width, threshold)] * (N_LEVELS - 1), OperatingPoint(f)))
    bank = ProbeBank(runtime.hidden_size, _PROBE_RANK, runtime.checkpoint_layers).requires_grad_(False).eval()
    return Policy(
        cut=cut,
        objective="latency" if cut == "select" else "throughput",
        # Any usable risk exits, and to no level above the ones that are alike.
        layer_configs=tuple(LayerConfig(layer, -1e9, 1e3, 1.0) for layer in runtime.checkpoint_layers),
        confidence_decay=0.0,
        schedule=WidthSchedule(N_LEVELS, tuple(rows)),
        probes=bank,
        risk_scale=tuple(1.0 for _ in runtime.checkpoint_layers),
        typical_level=1,
    )


def _thresholds(runtime: SedacRuntime, units: list[float], seed: int) -> list[float]:
    """Importance above which a share of units lies, per FFN."""
    seen: dict[int, float] = {}

    def keep(site: int, x: Tensor, h: Tensor) -> None:
        importance = Shadow.build(runtime.sites[site]).importance(x)
        values = importance.flatten()[torch.randperm(importance.numel(), device=x.device)[: 1 << 20]]
        seen[site] = float(values.quantile(1 - units[site]))

    device = runtime.sites[0].weights().up.device
    vocabulary = runtime.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.randint(vocabulary, _SAMPLE, generator=torch.Generator().manual_seed(seed)).to(device)
    with runtime.observe(on_ffn=keep), torch.no_grad():
        runtime.model(input_ids=ids)
    return [seen[i] for i in range(len(runtime.sites))]
