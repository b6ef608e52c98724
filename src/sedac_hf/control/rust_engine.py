"""The cascade in Rust: a thin skin over `sedac_hf._rust`, which is the authority on the law.

The checks of a hot call are made by the compiled code alone; where it refuses, the shared checks say why in the same
words as every other engine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sedac_hf import _rust
from sedac_hf._rust import StripPlanner
from sedac_hf.control.base import EngineBase
from sedac_hf.control.checks import (
    check_array,
    check_n_tokens,
    check_order,
    read_quantile,
    read_samples,
    read_thresholds,
)
from sedac_hf.errors import ConfigError, ControllerError
from sedac_hf.outputs import CascadeDecisions

__all__ = ["RustController", "StripPlanner"]

_REFUSALS = (TypeError, ValueError, OverflowError)


class RustController(EngineBase):
    """The cascade in Rust; the contract is `sedac_hf.control.base.Controller`."""

    def _set_up(self) -> None:
        layers = [
            (c.layer_idx, c.target_exit_rate, c.initial_threshold, c.confidence_weight) for c in self._layer_configs
        ]
        try:
            self._core = _rust.CascadeController(
                layers, self._alpha, self._confidence_decay, self._soft_exit, self._n_levels
            )
        except _REFUSALS as error:
            raise ConfigError(str(error)) from error

    @property
    def thresholds(self) -> NDArray[np.float32]:
        return self._core.thresholds

    @property
    def cut_points(self) -> NDArray[np.float32]:
        return self._core.cut_points

    def begin(self, n_tokens: int) -> _rust.ForwardPass:
        try:
            return self._core.begin(n_tokens)
        except _REFUSALS as error:
            check_n_tokens(n_tokens)
            raise ControllerError(str(error)) from error

    def step(self, state: Any, checkpoint_idx: int, risk: NDArray[np.float32]) -> NDArray[np.uint8]:
        try:
            return self._core.step(state, checkpoint_idx, risk)
        except _REFUSALS as error:
            if not isinstance(state, _rust.ForwardPass) or not self._core.owns(state):
                raise ControllerError("`state` must come from begin() of this very controller") from error
            check_order(checkpoint_idx, state.next_checkpoint, len(self._layer_configs))
            check_array("risk", risk, np.float32, (state.n_tokens,))
            raise ControllerError(str(error)) from error

    def evaluate_batch(self, risk: NDArray[np.float32]) -> CascadeDecisions:
        try:
            should_exit, exit_layer, confidence, ratios, levels = self._core.evaluate_batch(risk)
        except _REFUSALS as error:
            check_array("risk", risk, np.float32, (len(self._layer_configs), None))
            raise ControllerError(str(error)) from error
        return CascadeDecisions(should_exit, exit_layer, confidence, ratios[-1], ratios, levels)

    def update_threshold(self, layer_idx: int, samples: ArrayLike, quantile: float | None = None) -> float:
        i = self._checkpoint_at(layer_idx)
        return self._core.update_threshold(i, read_samples(samples), read_quantile(quantile, self._layer_configs[i]))

    def set_thresholds(self, values: ArrayLike) -> None:
        self._core.set_thresholds(read_thresholds(values, len(self._layer_configs)))

    def plan(self, levels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        try:
            return self._core.plan(levels)
        except _REFUSALS as error:
            check_array("levels", levels, np.uint8, (None,))
            raise ControllerError(str(error)) from error

    def parameter_block(self) -> _rust.ParameterBlock:
        """The law with the thresholds of this moment, in whole numbers, for `sedac_hf.control.torch_engine`."""
        return self._core.parameter_block()
