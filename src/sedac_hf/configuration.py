"""Configuration: `LayerConfig` (one checkpoint of the cascade) and `SedacConfig` (a wrapped model)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sedac_hf.errors import ConfigError


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
