"""The law's parameters as a one-parameter dial.

Harm of a token falls about exponentially with the share s that it is given: ``KL_t(s) = h_t exp(-a s)``. The least
total harm at a given mean share then gives ``s_t = mean + (ln h_t - mean ln h) / a``: affine in log harm, with a slope
that does not depend on the mean. The law can follow that: C is affine in the risks, and the keep it stands for is
``1 / (1 + exp(4 C - 2))``. So the *shape* (decay, slopes) is fitted once, by regression of log harm on the risks, and
the *centre* is the dial. *Spread* scales the slopes: 1 trusts the probes fully, 0 is a constant level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sedac_hf.configuration import LayerConfig
from sedac_hf.control import make_controller

ALWAYS = -1e9
"""A target that every usable confidence reaches: each token gets a graded ratio."""

_DECAYS = (0.0, 0.25, 0.5, 0.75, 0.9)
_LEAST_WEIGHT = 1e-3
_NO_SLOPE = 1e6  # threshold of a checkpoint whose risk does not matter


@dataclass(frozen=True)
class LawShape:
    """Predicted log harm after checkpoint i: ``p_i = decay * p_{i-1} + slopes[i] * r_i``, with mean ``means[i]``.

    error: mean squared error of log harm around the prediction, over its variance (1: the risks say nothing).
    """

    decay: float
    slopes: tuple[float, ...]
    means: tuple[float, ...]
    error: float


def fit_shape(risks: np.ndarray, log_harm: np.ndarray) -> LawShape:
    """Fit decay and slopes (none negative) by least squares over all checkpoints.

    Args:
        risks, log_harm: float [n_checkpoints, n_tokens]; harm of cutting what is behind each checkpoint.
    """
    risks, log_harm = risks.astype(np.float64), log_harm.astype(np.float64)
    centred = log_harm - log_harm.mean(axis=1, keepdims=True)
    variance = max(float(np.square(centred).mean()), 1e-30)
    best: LawShape | None = None
    for decay in _DECAYS:
        predicted = np.zeros(risks.shape[1])
        slopes, means, error = [], [], 0.0
        for r, y in zip(risks, centred, strict=True):
            carried = decay * predicted
            rest = y - (carried - carried.mean())
            spread = r - r.mean()
            slope = max(float(rest @ spread) / max(float(spread @ spread), 1e-30), 0.0)
            predicted = carried + slope * r
            slopes.append(slope)
            means.append(float(predicted.mean()))
            error += float(np.square(y - (predicted - predicted.mean())).mean())
        error /= len(risks) * variance
        if best is None or error < best.error - 1e-6:
            best = LawShape(decay, tuple(slopes), tuple(means), error)
    assert best is not None
    return best


def centre_of(keep: float) -> float:
    """The confidence that stands for a keep in (0, 1)."""
    return 0.5 + 0.25 * math.log((1 - keep) / keep)


def layer_configs(
    shape: LawShape, layers: tuple[int, ...], centre: float, gain: float, risks: np.ndarray
) -> tuple[LayerConfig, ...]:
    """The law with mean confidence ``centre`` at every checkpoint and ``C = centre - gain * (p - mean p)``.

    risks: float [n_checkpoints, n], whose quantile at the threshold is kept for threshold updates.
    """
    configs = []
    before = 0.0
    for i, layer in enumerate(layers):
        level = centre + gain * shape.means[i]
        weight = max(level - shape.decay * before, _LEAST_WEIGHT)
        before = level
        slope = gain * shape.slopes[i]
        threshold = min(weight / slope, _NO_SLOPE) if slope > 0 else _NO_SLOPE
        quantile = float(np.mean(risks[i] <= threshold)) if risks.size else 1.0
        configs.append(LayerConfig(layer, ALWAYS, threshold, weight, quantile))
    return tuple(configs)


def levels_of(configs: tuple[LayerConfig, ...], decay: float, n_levels: int, risks: np.ndarray) -> np.ndarray:
    """Levels that the law gives, uint8 [n_checkpoints, n]."""
    controller = make_controller(
        configs, controller="python", confidence_decay=decay, soft_exit=True, n_levels=n_levels
    )
    return np.asarray(controller.evaluate_batch(np.ascontiguousarray(risks, dtype=np.float32)).levels)
