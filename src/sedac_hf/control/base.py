"""The contract of every controller engine, and what the engines share.

The law. For token t and checkpoint i = 0..n-1, with risk r_i, threshold tau_i, weight w_i, decay gamma:

    conf_i = max((tau_i - r_i) / tau_i, -1e6)
    C_i    = gamma * C_{i-1} + w_i * conf_i           C_{-1} = 0
    exit_i = C_i >= target_i                          a tie exits
    ratio_i = 0.5 * tanh(2 * C_i - 1) + 0.5           exit_i, soft exit: share of FFN hidden units skipped
            = 1                                       exit_i, hard exit
            = 0                                       otherwise

float32 throughout, in this order of operations. A negative risk reads as 0. A hard exit latches: once out, out. A NaN
or infinite risk of either sign makes the token *failed* for the rest of the pass: ratio 0, exit False, C frozen; this
beats a latched hard exit. Levels are decided by comparing C with `cut_points`, never by computing tanh, so engines
that agree on C agree on levels bit for bit: level ``n_levels - #{m : C >= cut_points[m]}`` for a soft exit, 0 for a
hard one, ``n_levels`` for none. A level is a keep rounded up: it never skips more than the ratio asks.

A pass (`begin`, `step`, `step`, ...) owns its state; any number may be alive at once, on any threads. Thresholds
belong to the controller, are shared, and are read at each step; concurrent updates are never lost. Source: the SEDAC
V6.1 design, "Confidence Accumulation" and "Soft Exit".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sedac_hf.control.checks import check_settings, checkpoint_at
from sedac_hf.layer_config import DEFAULT_ALPHA, DEFAULT_CONFIDENCE_DECAY, DEFAULT_N_LEVELS, LayerConfig
from sedac_hf.outputs import CascadeDecisions

CONFIDENCE_FLOOR = -1e6
"""A checkpoint's confidence never falls below this, so that one huge risk cannot make C overflow."""


class ForwardPass(Protocol):
    """The state of one forward pass over ``n_tokens`` tokens; every array is a fresh copy as of the last step."""

    @property
    def n_tokens(self) -> int: ...

    @property
    def next_checkpoint(self) -> int:
        """``checkpoint_idx`` that the next `step` must name."""

    @property
    def confidence(self) -> NDArray[np.float32]:
        """C [n_tokens]; 0 before the first step."""

    @property
    def ratio(self) -> NDArray[np.float32]:
        """Share of hidden units skipped [n_tokens], 0..1."""

    @property
    def exited(self) -> NDArray[np.bool_]:
        """Whether the exit holds [n_tokens]."""

    @property
    def failed(self) -> NDArray[np.bool_]:
        """Whether a risk of this pass was NaN or infinite [n_tokens]."""


class Controller(Protocol):
    """What every engine offers; the law is in this module's docstring."""

    @property
    def layer_configs(self) -> tuple[LayerConfig, ...]: ...

    @property
    def alpha(self) -> float: ...

    @property
    def confidence_decay(self) -> float: ...

    @property
    def soft_exit(self) -> bool: ...

    @property
    def n_levels(self) -> int: ...

    @property
    def thresholds(self) -> NDArray[np.float32]:
        """The thresholds now, a copy [n_checkpoints]."""

    @property
    def cut_points(self) -> NDArray[np.float32]:
        """[n_levels]: a soft exit reaches level m or below where C >= cut_points[m]; cut_points[0] is infinite."""

    def evaluate_batch(self, risk: NDArray[np.float32]) -> CascadeDecisions:
        """Decide whole passes at once.

        Args:
            risk: float32 [n_checkpoints, n_tokens], C-contiguous; n_tokens may be 0.

        Raises:
            ControllerError: another type, dtype, shape or layout.
        """

    def begin(self, n_tokens: int) -> Any:
        """Start a pass; give its `ForwardPass` to each `step` of this controller."""

    def step(self, state: Any, checkpoint_idx: int, risk: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decide at one checkpoint.

        Args:
            state: what `begin` gave; advanced in place.
            checkpoint_idx: place in the cascade; 0, 1, ... in order.
            risk: float32 [n_tokens], C-contiguous.

        Returns:
            Keep level of each token, uint8 [n_tokens], 0..n_levels.

        Raises:
            ControllerError: another type, dtype, shape or layout; a checkpoint out of order; a foreign state. The
                state is then as it was.
        """

    def update_threshold(self, layer_idx: int, samples: ArrayLike, quantile: float | None = None) -> float:
        """``tau <- (1 - alpha) * tau + alpha * q``, never below `checks.THRESHOLD_FLOOR`; lossless under threads.

        q is the quantile of the samples by linear interpolation between order statistics (float64, rounded once). NaN
        and infinite samples are dropped: a failed probe is no evidence about risk. With none left tau stays.

        Args:
            layer_idx: decoder layer of the checkpoint (not its place in the cascade).
            samples: observed risks, any shape, read as float32.
            quantile: in [0, 1]; default the checkpoint's `LayerConfig.update_quantile`.

        Returns:
            The threshold after the update.

        Raises:
            ControllerError: no checkpoint at that layer, samples that are no numbers, a quantile outside [0, 1].
        """

    def set_thresholds(self, values: ArrayLike) -> None:
        """Replace all thresholds, [n_checkpoints]; ConfigError below the floor or not finite."""

    def plan(self, levels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sort a batch by level.

        Args:
            levels: uint8 [n], each 0..n_levels.

        Returns:
            ``order`` int64 [n], a stable sort by descending level, and ``at_least`` int64 [n_levels + 1]: how many
            tokens have level >= l, which are the first ones of ``order``.
        """


def level_cut_points(n_levels: int) -> NDArray[np.float32]:
    """C from which a soft exit reaches each level, float32 [n_levels], descending; the first is infinite.

    ``0.5 * tanh(2C - 1) + 0.5 == 1 / (1 + exp(2 - 4C))``, hence ``1 - ratio <= m / n_levels`` where
    ``C >= 0.5 + 0.25 * ln((n_levels - m) / m)``. Computed in float64, rounded once.
    """
    cuts = [0.5 + 0.25 * math.log((n_levels - m) / m) for m in range(1, n_levels)]
    return np.array([math.inf, *cuts], dtype=np.float32)


class EngineBase:
    """Settings that every engine holds, checked once; copies and pickles carry the thresholds along."""

    def __init__(
        self,
        layer_configs: Sequence[LayerConfig],
        *,
        alpha: float = DEFAULT_ALPHA,
        confidence_decay: float = DEFAULT_CONFIDENCE_DECAY,
        soft_exit: bool = True,
        n_levels: int = DEFAULT_N_LEVELS,
    ) -> None:
        check_settings(layer_configs, alpha, confidence_decay, soft_exit, n_levels)
        self._layer_configs = tuple(layer_configs)
        self._alpha = float(alpha)
        self._confidence_decay = float(confidence_decay)
        self._soft_exit = bool(soft_exit)
        self._n_levels = int(n_levels)
        self._set_up()

    def _set_up(self) -> None:
        """What an engine makes of the settings."""
        raise NotImplementedError

    @property
    def layer_configs(self) -> tuple[LayerConfig, ...]:
        return self._layer_configs

    @property
    def alpha(self) -> float:
        return self._alpha

    @property
    def confidence_decay(self) -> float:
        return self._confidence_decay

    @property
    def soft_exit(self) -> bool:
        return self._soft_exit

    @property
    def n_levels(self) -> int:
        return self._n_levels

    def _checkpoint_at(self, layer_idx: int) -> int:
        return checkpoint_at(self._layer_configs, layer_idx)

    def __repr__(self) -> str:
        layers = [config.layer_idx for config in self._layer_configs]
        return (
            f"{type(self).__name__}(layers={layers}, alpha={self.alpha}, confidence_decay={self.confidence_decay}, "
            f"soft_exit={self.soft_exit}, n_levels={self.n_levels})"
        )

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        settings = (self._alpha, self._confidence_decay, self._soft_exit, self._n_levels)
        return _rebuild, (type(self), self._layer_configs, *settings, self.thresholds)  # type: ignore[attr-defined]


def _rebuild(engine: Callable[..., Any], layer_configs: tuple[LayerConfig, ...], *rest: Any) -> Any:
    alpha, confidence_decay, soft_exit, n_levels, thresholds = rest
    controller = engine(
        layer_configs, alpha=alpha, confidence_decay=confidence_decay, soft_exit=soft_exit, n_levels=n_levels
    )
    controller.set_thresholds(thresholds)
    return controller
