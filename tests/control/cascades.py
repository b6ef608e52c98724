"""Cascades and risks that the controller tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sedac_hf.control import Controller, make_controller
from sedac_hf.layer_config import LayerConfig

ENGINES = ("rust", "python")
DESIGN = (LayerConfig(3, 0.2, 0.8, 0.3), LayerConfig(6, 0.5, 1.0, 0.4), LayerConfig(9, 0.8, 1.2, 0.3))
GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "cascade_golden.json").read_text()
)


def golden_controller(case: dict[str, Any], engine: str) -> Controller:
    layers = [LayerConfig(layer, *map(float, numbers)) for layer, *numbers in case["layers"]]
    settings = {"confidence_decay": float(case["decay"]), "soft_exit": case["soft_exit"], "n_levels": case["n_levels"]}
    return make_controller(layers, controller=engine, **settings)


def golden_risk(case: dict[str, Any]) -> np.ndarray:
    return np.array([[float(risk) for risk in row] for row in case["risk"]], np.float32)


def random_risk(n_checkpoints: int, n_tokens: int, seed: int = 0) -> np.ndarray:
    """Risks around the design's thresholds; one in 50 is NaN or infinite, one in 50 sits on a threshold."""
    rng = np.random.default_rng(seed)
    risk = rng.random((n_checkpoints, n_tokens), np.float32) * np.float32(1.6) - np.float32(0.05)
    kind = rng.integers(0, 150, risk.shape)
    for odd, value in enumerate((np.nan, np.inf, -np.inf, 0.8, 1.0, 1.2)):
        risk[kind == odd] = value
    return risk


@st.composite
def cascades(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `make_controller`."""
    number = st.floats(-2, 1.5, width=32)
    layers = draw(
        st.lists(st.tuples(number, st.floats(2**-19, 4, width=32), st.floats(0, 2, width=32)), min_size=1, max_size=5)
    )
    return {
        "layer_configs": [LayerConfig(2 * i + 1, *numbers) for i, numbers in enumerate(layers)],
        "confidence_decay": draw(st.floats(0, 1, width=32)),
        "soft_exit": draw(st.booleans()),
        "n_levels": draw(st.integers(2, 64)),
    }


def risks(n_checkpoints: int) -> st.SearchStrategy[np.ndarray]:
    """Every float32 that a probe could give, good or broken."""
    values = st.floats(0, 3, width=32) | st.floats(width=32)
    return st.integers(0, 30).flatmap(
        lambda n: arrays.arrays(np.float32, (n_checkpoints, n), elements=values, fill=st.nothing())
    )
