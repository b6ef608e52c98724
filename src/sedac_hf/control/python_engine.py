"""The law in NumPy float32: the oracle of the compiled engine, and the fallback where that is not installed."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sedac_hf.control.base import CONFIDENCE_FLOOR, EngineBase, level_cut_points
from sedac_hf.control.checks import (
    THRESHOLD_FLOOR,
    check_array,
    check_n_tokens,
    check_order,
    read_quantile,
    read_samples,
    read_thresholds,
)
from sedac_hf.errors import ControllerError
from sedac_hf.outputs import CascadeDecisions

ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)


class PythonForwardPass:
    """One forward pass; see `sedac_hf.control.base.ForwardPass`."""

    def __init__(self, owner: PythonController, n_tokens: int) -> None:
        self._owner = owner
        self.n_tokens = n_tokens
        self.next_checkpoint = 0
        self._confidence = np.zeros(n_tokens, np.float32)
        self._exited = np.zeros(n_tokens, np.bool_)
        self._failed = np.zeros(n_tokens, np.bool_)
        self._exit_layer = np.full(n_tokens, -1, np.int64)

    @property
    def confidence(self) -> NDArray[np.float32]:
        return self._confidence.copy()

    @property
    def exited(self) -> NDArray[np.bool_]:
        return self._exited.copy()

    @property
    def failed(self) -> NDArray[np.bool_]:
        return self._failed.copy()

    @property
    def exit_layer(self) -> NDArray[np.int64]:
        return self._exit_layer.copy()

    @property
    def ratio(self) -> NDArray[np.float32]:
        if not self._owner.soft_exit:
            return self._exited.astype(np.float32)
        return np.where(self._exited, HALF * np.tanh(TWO * self._confidence - ONE) + HALF, ZERO)


class PythonController(EngineBase):
    """The cascade in NumPy; the contract is `sedac_hf.control.base.Controller`."""

    def _set_up(self) -> None:
        self._decay = np.float32(self._confidence_decay)
        self._weights = np.array([config.confidence_weight for config in self._layer_configs], np.float32)
        self._targets = np.array([config.target_exit_rate for config in self._layer_configs], np.float32)
        self._cut_points = level_cut_points(self._n_levels)
        self._rising_cuts = self._cut_points[:0:-1].copy()
        self._lock = threading.Lock()
        self._thresholds = np.array([config.initial_threshold for config in self._layer_configs], np.float32)

    @property
    def thresholds(self) -> NDArray[np.float32]:
        with self._lock:
            return self._thresholds.copy()

    @property
    def cut_points(self) -> NDArray[np.float32]:
        return self._cut_points.copy()

    def begin(self, n_tokens: int) -> PythonForwardPass:
        return PythonForwardPass(self, check_n_tokens(n_tokens))

    def step(self, state: Any, checkpoint_idx: int, risk: NDArray[np.float32]) -> NDArray[np.uint8]:
        if not isinstance(state, PythonForwardPass) or state._owner is not self:
            raise ControllerError("`state` must come from begin() of this very controller")
        check_order(checkpoint_idx, state.next_checkpoint, len(self._layer_configs))
        check_array("risk", risk, np.float32, (state.n_tokens,))
        return self._advance(state, risk, self._thresholds[checkpoint_idx])

    def evaluate_batch(self, risk: NDArray[np.float32]) -> CascadeDecisions:
        n_checkpoints = len(self._layer_configs)
        check_array("risk", risk, np.float32, (n_checkpoints, None))
        thresholds = self.thresholds
        state = self.begin(risk.shape[1])
        ratios = np.empty(risk.shape, np.float32)
        levels = np.empty(risk.shape, np.uint8)
        for i in range(n_checkpoints):
            levels[i] = self._advance(state, risk[i], thresholds[i])
            ratios[i] = state.ratio
        return CascadeDecisions(state._exited, state._exit_layer, state._confidence, ratios[-1], ratios, levels)

    def update_threshold(self, layer_idx: int, samples: ArrayLike, quantile: float | None = None) -> float:
        i = self._checkpoint_at(layer_idx)
        q = read_quantile(quantile, self._layer_configs[i])
        values = read_samples(samples)
        aim = _linear_quantile(values[np.isfinite(values)], q)
        alpha = np.float32(self._alpha)
        with self._lock:
            if aim is not None:
                updated = (ONE - alpha) * self._thresholds[i] + alpha * aim
                self._thresholds[i] = np.maximum(updated, np.float32(THRESHOLD_FLOOR))
            return float(self._thresholds[i])

    def set_thresholds(self, values: ArrayLike) -> None:
        thresholds = read_thresholds(values, len(self._layer_configs))
        with self._lock:
            self._thresholds[:] = thresholds

    def plan(self, levels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        check_array("levels", levels, np.uint8, (None,))
        if levels.size and int(levels.max()) > self._n_levels:
            raise ControllerError(f"`levels` must be 0..{self._n_levels}, got {int(levels.max())}")
        order = np.argsort(self._n_levels - levels.astype(np.int64), kind="stable")
        counts = np.bincount(levels, minlength=self._n_levels + 1)
        return order.astype(np.int64), np.cumsum(counts[::-1])[::-1].astype(np.int64)

    def _advance(
        self, state: PythonForwardPass, risk: NDArray[np.float32], threshold: np.float32
    ) -> NDArray[np.uint8]:
        i = state.next_checkpoint
        state._failed = state._failed | ~np.isfinite(risk)
        live = ~state._failed
        with np.errstate(over="ignore"):  # a huge risk over a small threshold; the floor catches it
            confidence = (threshold - np.maximum(np.where(live, risk, ZERO), ZERO)) / threshold
        confidence = np.maximum(confidence, np.float32(CONFIDENCE_FLOOR))
        accumulated = self._decay * state._confidence + self._weights[i] * confidence
        state._confidence = np.where(live, accumulated, state._confidence)
        held = live & (state._confidence >= self._targets[i])
        state._exit_layer[held & (state._exit_layer < 0)] = self._layer_configs[i].layer_idx
        state._exited = held if self._soft_exit else live & (held | state._exited)
        state.next_checkpoint = i + 1
        if self._soft_exit:
            kept = self._n_levels - np.searchsorted(self._rising_cuts, state._confidence, side="right")
        else:
            kept = np.zeros(state.n_tokens, np.int64)
        return np.where(state._exited, kept, self._n_levels).astype(np.uint8)


def _linear_quantile(values: NDArray[np.float32], quantile: float) -> np.float32 | None:
    """Quantile by linear interpolation in float64, rounded to float32 once; None without values.

    Spelled out because `numpy.quantile` picks between two formulas that round differently.
    """
    if values.size == 0:
        return None
    ordered = np.sort(values)
    position = (values.size - 1) * quantile
    below = math.floor(position)
    low, high = float(ordered[below]), float(ordered[min(below + 1, values.size - 1)])
    return np.float32(low + (high - low) * (position - below))
