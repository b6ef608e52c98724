"""`LayerConfig`: one checkpoint of the cascade, and the law of the design document as a list of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sedac_hf.environment import environment_weights
from sedac_hf.errors import ConfigError

DEFAULT_ALPHA = 0.1
DEFAULT_CONFIDENCE_DECAY = 0.9
DEFAULT_WEIGHTS = (0.3, 0.4, 0.3)
DEFAULT_TARGETS = (0.2, 0.5, 0.8)
DEFAULT_THRESHOLDS = (0.8, 1.0, 1.2)
DEFAULT_N_LEVELS = 8


@dataclass(frozen=True)
class LayerConfig:
    """One checkpoint of the cascade.

    Args:
        layer_idx: decoder layer after which the probe reads the hidden state; 0 or more.
        target_exit_rate: the token exits where its accumulated confidence is at least this; finite, may be negative
            (then every token with a usable risk gets a graded ratio).
        initial_threshold: risk at which the confidence is 0; finite, above 0.
        confidence_weight: weight of this checkpoint's confidence; finite, 0 or more.
        quantile: quantile of the risks that threshold updates follow; in [0, 1], default ``target_exit_rate`` clipped
            to that range.

    Raises:
        ConfigError: a value is out of range.
    """

    layer_idx: int
    target_exit_rate: float
    initial_threshold: float
    confidence_weight: float
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.layer_idx, int) or isinstance(self.layer_idx, bool) or self.layer_idx < 0:
            raise ConfigError(f"`layer_idx` must be an integer of 0 or more, got {self.layer_idx!r}")
        for name in ("target_exit_rate", "initial_threshold", "confidence_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"`{name}` must be a finite number, got {value!r}")
        if self.initial_threshold <= 0:
            raise ConfigError(f"`initial_threshold` must be above 0, got {self.initial_threshold!r}")
        if self.confidence_weight < 0:
            raise ConfigError(f"`confidence_weight` must be 0 or more, got {self.confidence_weight!r}")
        if self.quantile is not None and not 0 <= self.quantile <= 1:
            raise ConfigError(f"`quantile` must be in [0, 1], got {self.quantile!r}")

    @property
    def update_quantile(self) -> float:
        """The quantile that `update_threshold` follows."""
        return min(max(self.target_exit_rate, 0.0), 1.0) if self.quantile is None else self.quantile


def layer_config(item: LayerConfig | Mapping[str, Any]) -> LayerConfig:
    """One of them from a dict, as configuration files have it.

    Raises:
        ConfigError: a key is unknown or missing, or a value out of range.
    """
    if isinstance(item, LayerConfig):
        return item
    known = {field.name for field in dataclasses.fields(LayerConfig)}
    unknown = sorted(set(item) - known)
    if unknown:
        raise ConfigError(f"a layer config has the keys {', '.join(sorted(known))}; got also {', '.join(unknown)}")
    try:
        return LayerConfig(**item)
    except TypeError as error:
        raise ConfigError(f"a layer config is incomplete: {error}") from error


def default_checkpoint_layers(n_layers: int) -> tuple[int, ...]:
    """Layers n/4, n/2 and 3n/4, without repeats and without the last layer, after which no FFN is left to cut."""
    layers = sorted({n_layers * k // 4 for k in (1, 2, 3)} - {n_layers - 1})
    return tuple(layers) or (0,)


def default_layer_configs(checkpoint_layers: Sequence[int]) -> tuple[LayerConfig, ...]:
    """The law of the design document at these layers; a default that the list is too short for is repeated."""

    def pick(values: Sequence[float], i: int) -> float:
        return float(values[min(i, len(values) - 1)])

    weights = environment_weights() or DEFAULT_WEIGHTS
    return tuple(
        LayerConfig(layer, pick(DEFAULT_TARGETS, i), pick(DEFAULT_THRESHOLDS, i), pick(weights, i))
        for i, layer in enumerate(checkpoint_layers)
    )
