"""What SEDAC is compared with: a constant prefix, the hard exit of V6.0, and V6.1 with the design's own weights.

They use the probes and the channel order of a calibrated `truncate` policy, widths that follow the level's share alike
in all governed FFNs, and no compensation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule, align_width
from sedac_hf.layer_config import DEFAULT_CONFIDENCE_DECAY, DEFAULT_TARGETS, LayerConfig, default_layer_configs
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.runtime import SedacRuntime


def plain_policy(runtime: SedacRuntime, policy: Policy, *, importance_order: bool) -> Policy:
    """``policy`` with widths level / n_levels in every governed FFN, the others whole, nothing compensated.

    Run it by `SedacRuntime.forced_levels` for a constant level.
    """
    n = policy.n_levels
    points = []
    for site, segment in zip(runtime.sites, runtime.segments, strict=True):
        f = site.intermediate_size
        widths = [f if segment < 0 else align_width(f * level / n, f) for level in range(1, n)]
        points.append((OperatingPoint(0), *(OperatingPoint(width) for width in widths), OperatingPoint(f)))
    return replace(
        policy,
        cut="truncate",
        schedule=WidthSchedule(n, tuple(points)),
        channel_order=policy.channel_order if importance_order else None,
        compensation=None,
    )


def design_policy(runtime: SedacRuntime, policy: Policy, risks: Sequence[np.ndarray]) -> Policy:
    """V6.1 as designed: default weights, targets and decay; thresholds are the target quantiles of the risks."""
    layers = default_layer_configs([item.layer_idx for item in policy.layer_configs])
    return replace(
        plain_policy(runtime, policy, importance_order=True),
        layer_configs=_with_quantiles(layers, risks, [item.target_exit_rate for item in layers]),
        confidence_decay=DEFAULT_CONFIDENCE_DECAY,
        soft_exit=True,
    )


def law_policy(
    runtime: SedacRuntime,
    policy: Policy,
    layer_configs: Sequence[LayerConfig],
    *,
    confidence_decay: float,
    soft_exit: bool,
    alpha: float,
) -> Policy:
    """An uncalibrated law as it is written down, at the policy's checkpoint layers."""
    return replace(
        plain_policy(runtime, policy, importance_order=True),
        layer_configs=tuple(layer_configs),
        confidence_decay=confidence_decay,
        soft_exit=soft_exit,
        alpha=alpha,
    )


def hard_exit_policy(
    runtime: SedacRuntime, policy: Policy, risks: Sequence[np.ndarray], *, scale: float = 1.0
) -> Policy:
    """V6.0: the same law with decay 0, weight 1, target 0 and hard exits.

    scale: multiplies the design's exit rates, whose quantiles of the risks are the thresholds.
    """
    layers = [LayerConfig(item.layer_idx, 0.0, 1.0, 1.0) for item in policy.layer_configs]
    rates = [min(DEFAULT_TARGETS[min(i, len(DEFAULT_TARGETS) - 1)] * scale, 1.0) for i in range(len(layers))]
    return replace(
        plain_policy(runtime, policy, importance_order=True),
        layer_configs=_with_quantiles(layers, risks, rates),
        confidence_decay=0.0,
        soft_exit=False,
    )


def probe_risks(runtime: SedacRuntime, policy: Policy, batches: Iterable[Tensor]) -> list[np.ndarray]:
    """The policy's probes' risks at full width, one float32 array per checkpoint; batches: ids int64 [B, S]."""
    seen: list[list[np.ndarray]] = [[] for _ in policy.layer_configs]

    def keep(idx: int, hidden: Tensor) -> None:
        risk = policy.probes.risk(policy.layer_configs[idx].layer_idx, hidden)
        seen[idx].append(risk.cpu().numpy())

    with runtime.full_width(), runtime.observe(on_checkpoint=keep), torch.no_grad():
        for ids in batches:
            runtime.model(input_ids=ids, use_cache=False)
    return [np.concatenate(part) for part in seen]


def _with_quantiles(
    layers: Sequence[LayerConfig], risks: Sequence[np.ndarray], rates: Sequence[float]
) -> tuple[LayerConfig, ...]:
    floor = 1e-6  # a threshold must be above 0
    return tuple(
        replace(item, initial_threshold=max(float(np.quantile(risk, rate)), floor))
        for item, risk, rate in zip(layers, risks, rates, strict=True)
    )
