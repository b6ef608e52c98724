"""Settings from environment variables, each read where it is asked for."""

from __future__ import annotations

import math
import os

from sedac_hf.errors import ConfigError


def environment_decay() -> float | None:
    """``SEDAC_CONFIDENCE_DECAY``, a number in [0, 1]; None where it is not set."""
    text = os.environ.get("SEDAC_CONFIDENCE_DECAY")
    return None if text is None else _environment_number("SEDAC_CONFIDENCE_DECAY", text, low=0.0, high=1.0)


def environment_soft_exit() -> bool | None:
    """``SEDAC_SOFT_EXIT``, 0/1, true/false, yes/no or on/off; None where it is not set."""
    return _environment_flag("SEDAC_SOFT_EXIT")


def environment_measure_costs() -> bool:
    """``SEDAC_MEASURE_COSTS``, a flag in the same words: may FFN engines time products at first use? Default: yes."""
    flag = _environment_flag("SEDAC_MEASURE_COSTS")
    return True if flag is None else flag


def environment_weights() -> tuple[float, ...] | None:
    """``SEDAC_LAYER_WEIGHTS``, comma-separated numbers of 0 or more; None where it is not set."""
    text = os.environ.get("SEDAC_LAYER_WEIGHTS")
    if text is None:
        return None
    return tuple(_environment_number("SEDAC_LAYER_WEIGHTS", part, low=0.0) for part in text.split(","))


def _environment_flag(name: str) -> bool | None:
    text = os.environ.get(name)
    if text is None:
        return None
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.strip().lower() not in known:
        raise ConfigError(f"environment variable {name} must be one of {', '.join(known)}, got {text!r}")
    return known[text.strip().lower()]


def _environment_number(name: str, text: str, *, low: float, high: float = math.inf) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and low <= value <= high):
        wanted = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of {low:g} or more"
        raise ConfigError(f"environment variable {name} must hold numbers {wanted}, got {text!r}")
    return value
