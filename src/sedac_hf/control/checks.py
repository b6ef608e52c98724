"""Checks that the controller engines share, so that a mistake reads the same whichever engine runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sedac_hf.errors import ConfigError, ControllerError
from sedac_hf.layer_config import LayerConfig

THRESHOLD_FLOOR = 1e-6
"""No threshold is ever lower, so that the law's division stays meaningful."""

WEIGHT_CEILING = 1e6
"""No confidence weight is higher, so that C stays finite (and 0 * C stays 0) over any cascade."""

MAX_LEVELS = 64

MAX_CHECKPOINTS = 255
"""The compiled engine keeps a token's first exit in a byte."""


def check_settings(
    layer_configs: Sequence[LayerConfig], alpha: float, confidence_decay: float, soft_exit: bool, n_levels: int
) -> None:
    """Raise ConfigError unless these make a cascade."""
    if not 1 <= len(layer_configs) <= MAX_CHECKPOINTS:
        count = len(layer_configs) or "none"
        raise ConfigError(f"`layer_configs` must hold 1 to {MAX_CHECKPOINTS} LayerConfigs, got {count}")
    previous = -1
    for place, config in enumerate(layer_configs):
        if not isinstance(config, LayerConfig):
            raise ConfigError(f"`layer_configs[{place}]` must be a LayerConfig, got {type(config).__name__}")
        if config.layer_idx <= previous:
            raise ConfigError(
                f"`layer_configs[{place}].layer_idx` must be above the one before it ({previous}), "
                f"got {config.layer_idx}; list the checkpoints in layer order, each layer once"
            )
        previous = config.layer_idx
        check_threshold(f"layer_configs[{place}].initial_threshold", config.initial_threshold)
        if config.confidence_weight > WEIGHT_CEILING:
            raise ConfigError(
                f"`layer_configs[{place}].confidence_weight` must be at most {WEIGHT_CEILING:g}, "
                f"got {config.confidence_weight!r}"
            )
        if not math.isfinite(_as_float32(config.target_exit_rate)):
            raise ConfigError(
                f"`layer_configs[{place}].target_exit_rate` must be finite in float32, got {config.target_exit_rate!r}"
            )
    for name, value in (("alpha", alpha), ("confidence_decay", confidence_decay)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"`{name}` must be a number in [0, 1], got {value!r}")
    if not isinstance(soft_exit, bool | np.bool_):
        raise ConfigError(f"`soft_exit` must be True or False, got {soft_exit!r}")
    if isinstance(n_levels, bool) or not isinstance(n_levels, int) or not 2 <= n_levels <= MAX_LEVELS:
        raise ConfigError(f"`n_levels` must be an integer in 2..{MAX_LEVELS}, got {n_levels!r}")


def check_threshold(name: str, value: float) -> None:
    """Raise ConfigError unless ``value`` may be a threshold."""
    if not np.float32(THRESHOLD_FLOOR) <= _as_float32(value) < math.inf:
        raise ConfigError(f"`{name}` must be finite in float32 and at least {THRESHOLD_FLOOR:g}, got {value!r}")


def _as_float32(value: float) -> np.float32:
    with np.errstate(over="ignore"):  # infinite, and refused as such
        return np.float32(value)


def checkpoint_at(layer_configs: Sequence[LayerConfig], layer_idx: int) -> int:
    """The place in the cascade of the checkpoint after decoder layer ``layer_idx``."""
    layers = [config.layer_idx for config in layer_configs]
    if layer_idx not in layers:
        raise ControllerError(f"`layer_idx` must be one of the checkpoint layers {layers}, got {layer_idx!r}")
    return layers.index(layer_idx)


def check_array(name: str, array: Any, dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    """Raise ControllerError unless ``array`` is a C-contiguous aligned array of this dtype and shape (None: any)."""
    wanted = np.dtype(dtype)
    layout = ", ".join("n" if size is None else str(size) for size in shape)
    want = f"`{name}` must be a C-contiguous {wanted} array of shape [{layout}]"
    if not isinstance(array, np.ndarray):
        raise ControllerError(
            f"{want}, got {type(array).__name__}; convert it with numpy.asarray(x, dtype='{wanted}')"
        )
    if array.dtype != wanted:
        raise ControllerError(f"{want}, got dtype {array.dtype}; convert it with .astype('{wanted}')")
    if len(array.shape) != len(shape) or any(
        b is not None and a != b for a, b in zip(array.shape, shape, strict=True)
    ):
        raise ControllerError(f"{want}, got shape {list(array.shape)}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        got = f"strides {array.strides}" if array.flags.aligned else "unaligned memory"
        raise ControllerError(f"{want}, got {got}; make it contiguous with numpy.ascontiguousarray(x).copy()")


def check_n_tokens(n_tokens: int) -> int:
    """``n_tokens`` as an int of 0 or more."""
    try:
        count = operator.index(n_tokens)
    except TypeError:
        count = -1
    if count < 0:
        raise ControllerError(f"`n_tokens` must be an integer of 0 or more, got {n_tokens!r}")
    return count


def check_order(checkpoint_idx: int, expected: int, n_checkpoints: int) -> None:
    """Raise ControllerError unless ``checkpoint_idx`` is the next checkpoint of the pass."""
    if expected >= n_checkpoints:
        raise ControllerError(
            f"this pass has seen all {n_checkpoints} checkpoints, got `checkpoint_idx` {checkpoint_idx!r}; "
            "begin() a new one"
        )
    if checkpoint_idx != expected:
        raise ControllerError(
            f"`checkpoint_idx` must come in order: expected {expected} of {n_checkpoints}, got {checkpoint_idx!r}"
        )


def read_samples(samples: ArrayLike) -> NDArray[np.float32]:
    """Samples as a flat contiguous float32 array."""
    try:
        array = np.asarray(samples)
        if array.dtype.kind not in "fiu" and array.size:
            raise ControllerError(f"`samples` must be numbers, got dtype {array.dtype}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array.reshape(-1), dtype=np.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ControllerError):
            raise
        raise ControllerError(
            f"`samples` must be convertible to a float32 array, got {type(samples).__name__}: {error}"
        ) from error


def read_quantile(quantile: float | None, config: LayerConfig) -> float:
    """The quantile to follow, in [0, 1]."""
    value = config.update_quantile if quantile is None else quantile
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ControllerError(f"`quantile` must be a number in [0, 1], got {value!r}")
    return float(value)


def read_thresholds(values: ArrayLike, n_checkpoints: int) -> NDArray[np.float32]:
    """New thresholds as float32 [n_checkpoints]."""
    array = np.asarray(values)
    if array.shape != (n_checkpoints,) or array.dtype.kind not in "fiu":
        raise ControllerError(
            f"`values` must be numbers of shape [{n_checkpoints}], got dtype {array.dtype}, shape {list(array.shape)}"
        )
    for place, value in enumerate(array.tolist()):
        check_threshold(f"values[{place}]", value)
    return array.astype(np.float32)
