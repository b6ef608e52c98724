"""The law's parameters as a one-parameter dial.

Harm of a token falls about exponentially with the share s that it is given: ``KL_t(s) = h_t exp(-a s)``. The least
total harm at a given mean share then gives ``s_t = mean + (ln h_t - mean ln h) / a``: affine in log harm, with a slope
that does not depend on the mean. The law can follow that: C is affine in the risks, and the keep it stands for is
``1 / (1 + exp(4 C - 2))``. So the *shape* (decay, slopes) is fitted once, on the harm that such an allocation leaves,
and the *centre* is the dial. *Spread* scales the slopes: 1 trusts the probes fully, 0 is a constant level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sedac_hf.control import make_controller
from sedac_hf.layer_config import LayerConfig

ALWAYS = -1e9
"""A target that every usable confidence reaches: each token gets a graded ratio."""

_DECAYS = (0.0, 0.25, 0.5, 0.75, 0.9)
_LEAST_WEIGHT = 1e-3
_MOST_SLOPE = 4.0
_SLOPE_STEPS = 30
_NO_SLOPE = 1e6  # threshold of a checkpoint whose risk does not matter


@dataclass(frozen=True)
class LawShape:
    """Predicted log harm after checkpoint i: ``p_i = decay * p_{i-1} + slopes[i] * r_i``, with mean ``means[i]``.

    error: harm that an allocation by the prediction leaves, over that of equal shares (1: the risks say nothing).
    """

    decay: float
    slopes: tuple[float, ...]
    means: tuple[float, ...]
    error: float


def fit_shape(risks: np.ndarray, log_harm: np.ndarray) -> LawShape:
    """The decay and slopes (none negative) whose allocation leaves least harm, summed over the checkpoints.

    With shares ``s_t = mean + (p_t - mean p) / a`` the harm left is ``mean(h exp(-(p - mean p)))``, convex in a slope.

    Args:
        risks, log_harm: float [n_checkpoints, n_tokens]; harm of cutting what is behind each checkpoint.
    """
    risks, log_harm = risks.astype(np.float64), log_harm.astype(np.float64)
    best: LawShape | None = None
    for decay in _DECAYS:
        predicted = np.zeros(risks.shape[1])
        slopes, means, errors = [], [], []
        for risk, harm in zip(risks, log_harm, strict=True):
            carried = decay * predicted
            slope = _best_slope(risk, harm, carried)
            predicted = carried + slope * risk
            slopes.append(slope)
            means.append(float(predicted.mean()))
            errors.append(_harm_left(harm, predicted))
        error = math.exp(float(np.mean(errors)))
        if best is None or error < best.error - 1e-6:
            best = LawShape(decay, tuple(slopes), tuple(means), error)
    assert best is not None
    return best


def _harm_left(log_harm: np.ndarray, predicted: np.ndarray) -> float:
    """Logarithm of the harm left by an allocation, over that of equal shares."""
    top = log_harm.max()
    harm = np.exp(log_harm - top)
    left = log_harm - top - (predicted - predicted.mean())
    return float(left.max() + np.log(np.exp(left - left.max()).mean()) - np.log(harm.mean()))


def _best_slope(risk: np.ndarray, log_harm: np.ndarray, carried: np.ndarray) -> float:
    low, high = 0.0, _MOST_SLOPE
    for _ in range(_SLOPE_STEPS):  # ternary search of a convex function
        third = (high - low) / 3
        lower, upper = low + third, high - third
        if _harm_left(log_harm, carried + lower * risk) <= _harm_left(log_harm, carried + upper * risk):
            high -= third
        else:
            low += third
    return low if low > 1e-3 else 0.0


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
