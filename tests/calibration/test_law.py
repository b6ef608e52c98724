"""The law as a dial: its parameters against the recursion written out, and the regression behind them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.calibration.law import LawShape, centre_of, fit_shape, layer_configs, levels_of

LAYERS = (3, 6, 9)


def _confidences(configs: tuple, decay: float, risks: np.ndarray) -> np.ndarray:
    c, rows = np.zeros(risks.shape[1]), []
    for config, risk in zip(configs, risks, strict=True):
        c = decay * c + config.confidence_weight * (config.initial_threshold - risk) / config.initial_threshold
        rows.append(c)
    return np.stack(rows)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000), centre=st.floats(0.3, 0.9), gain=st.floats(0.01, 0.2), decay=st.sampled_from([0.0, 0.5])
)
def test_confidence_is_affine_in_the_predicted_harm(seed: int, centre: float, gain: float, decay: float) -> None:
    generator = np.random.default_rng(seed)
    risks = generator.uniform(0, 3, (3, 50))
    slopes = (0.5, 0.3, 0.8)
    predicted, before = [], np.zeros(50)
    for slope, risk in zip(slopes, risks, strict=True):
        before = decay * before + slope * risk
        predicted.append(before)
    means = tuple(float(row.mean()) for row in predicted)
    shape = LawShape(decay, slopes, means, 0.5)
    configs = layer_configs(shape, LAYERS, centre, gain, risks)
    wanted = centre - gain * (np.stack(predicted) - np.array(means)[:, None])
    weights = [config.confidence_weight for config in configs]
    if min(weights) > 1e-3:  # none had to be raised to the least weight
        assert _confidences(configs, decay, risks) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("n_levels", [2, 8, 16])
@pytest.mark.parametrize("keep", [0.2, 0.45, 0.8])
def test_a_constant_law_gives_every_token_the_level_of_its_keep(n_levels: int, keep: float) -> None:
    risks = np.random.default_rng(0).uniform(0, 5, (3, 40)).astype(np.float32)
    flat = LawShape(0.0, (0.0,) * 3, (0.0,) * 3, 1.0)
    levels = levels_of(layer_configs(flat, LAYERS, centre_of(keep), 0.0, risks), 0.0, n_levels, risks)
    assert (levels == int(np.ceil(keep * n_levels))).all()


def test_every_usable_risk_gets_a_graded_level_and_more_risk_never_a_lower_one() -> None:
    risks = np.tile(np.linspace(0, 6, 200, dtype=np.float32), (3, 1))
    shape = LawShape(0.5, (0.6, 0.6, 0.6), (1.8, 2.7, 3.1), 0.5)
    levels = levels_of(layer_configs(shape, LAYERS, 0.5, 0.2, risks), 0.5, 8, risks)
    assert (levels >= 1).all()
    assert (np.diff(levels.astype(int), axis=1) >= 0).all()
    assert len(np.unique(levels)) > 3


def test_the_slopes_and_the_decay_of_the_harm_are_found() -> None:
    generator = np.random.default_rng(1)
    risks = generator.uniform(0, 2, (3, 20000))
    p, rows = np.zeros(20000), []
    for slope, risk in zip((1.0, 0.5, 0.25), risks, strict=True):
        p = 0.75 * p + slope * risk
        rows.append(p + generator.normal(0, 0.05, 20000) - 7)
    shape = fit_shape(risks, np.stack(rows))
    assert shape.decay == 0.75
    assert shape.slopes == pytest.approx((1.0, 0.5, 0.25), abs=0.02)
    spread = np.stack(rows)
    left = np.exp(spread.mean(axis=1)) / np.exp(spread).mean(axis=1)  # what the best allocation can leave
    assert shape.error == pytest.approx(np.exp(np.log(left).mean()), abs=0.01)


def test_risks_that_say_nothing_get_no_slope() -> None:
    generator = np.random.default_rng(2)
    risks = generator.uniform(0, 2, (2, 500))
    shape = fit_shape(risks, -risks)  # the wrong way round: never cut a token more for being risky
    assert shape.slopes == (0.0, 0.0)
    assert shape.error == pytest.approx(1.0)
