"""The law on the device against the block's oracle bit for bit, compiled and not, and against the float law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.control import make_controller
from sedac_hf.control.torch_engine import RISK_BEYOND, STATE_FAILED, STATE_LATCHED, STATE_SUNK, DeviceLaw
from sedac_hf.errors import ConfigError
from sedac_hf.layer_config import LayerConfig
from tests.control.cascades import DESIGN, cascades, random_risk, risks

# As calibration writes it: every confidence exits, a weak slope, a slope that hardly counts, one that does not.
FITTED = (LayerConfig(1, -1e9, 0.37, 0.9), LayerConfig(2, -1e9, 0.002, 1e-3), LayerConfig(3, -1e9, 1e6, 0.5))
CASES = {
    "design": {"layer_configs": DESIGN},
    "hard": {"layer_configs": DESIGN, "soft_exit": False, "n_levels": 4},
    "fitted": {"layer_configs": FITTED, "confidence_decay": 0.25},
    "no memory, no weight": {
        "layer_configs": (LayerConfig(0, -0.5, 1.0, 0.0), LayerConfig(1, 0.0, 1.0, 1.0)),
        "confidence_decay": 0.0,
        "soft_exit": False,
    },
}


def oracle(block, risk):
    """Quantised risks and levels [n_checkpoints, n] of whole passes."""
    states = np.zeros(risk.shape[1], np.int32)
    quantised, levels = [], []
    for i, row in enumerate(risk):
        quantised.append(block.quantise(i, row))
        states, row_levels = block.step(i, states, quantised[-1])
        levels.append(row_levels)
    return np.array(quantised), np.array(levels)


def whole_pass(law, risk):
    """The same on the device."""
    state = law.begin(risk.shape[1])
    quantised, levels = [], []
    for i in range(law.n_checkpoints):
        quantised.append(law.quantise(i, risk[i]))
        state, row_levels = law.step(i, state, quantised[-1])
        levels.append(row_levels)
    return torch.stack(quantised), torch.stack(levels)


def assert_like_the_oracle(controller, law, risk, run=whole_pass):
    expected = oracle(controller.parameter_block(), risk)
    for got, want in zip(run(law, torch.from_numpy(risk)), expected, strict=True):
        np.testing.assert_array_equal(got.numpy(), want)
    return expected[1]


@pytest.mark.parametrize("name", CASES)
def test_every_risk_in_every_kind_of_state(name):
    controller = make_controller(**CASES[name])
    law, block = DeviceLaw(controller, "cpu"), controller.parameter_block()
    rng = np.random.default_rng(0)
    ordinary = (rng.normal(0, 1.5, 24) / block.unit).astype(np.int64).clip(-(2**30), 2**30)
    latched = [] if controller.soft_exit else [STATE_LATCHED]
    states = np.array([STATE_FAILED, STATE_SUNK, -(2**30), -1, 0, 1, 2**30, *latched, *ordinary], np.int32)
    risk_q = np.arange(-1, RISK_BEYOND + 1, dtype=np.int16)
    for i in range(len(controller.layer_configs)):
        for state in states:
            before = np.full(risk_q.shape, state, np.int32)
            expected_state, expected_levels = block.step(i, before, risk_q)
            after, levels = law.step(i, torch.from_numpy(before), torch.from_numpy(risk_q.astype(np.int32)))
            np.testing.assert_array_equal(after.numpy(), expected_state)
            np.testing.assert_array_equal(levels.numpy(), expected_levels)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cascade=cascades())
def test_any_cascade_and_any_risk(data, cascade):
    controller = make_controller(**cascade)
    risk = data.draw(risks(len(cascade["layer_configs"])))
    assert_like_the_oracle(controller, DeviceLaw(controller, "cpu"), risk)


def test_one_compiled_graph_gives_the_same_bits_for_every_law():
    torch._dynamo.reset()
    compiled = torch.compile(whole_pass, fullgraph=True, dynamic=False)
    risk = random_risk(3, 4096, seed=1)
    risk[:, ::7] *= 50
    risk[:, :6] = np.array([np.nan, np.inf, -np.inf, -1.0, 3e38, 1e-42], np.float32)
    controller = make_controller(DESIGN)
    law = DeviceLaw(controller, "cpu")
    before = assert_like_the_oracle(controller, law, risk, compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        controller.set_thresholds([0.3, 2.0, 0.5])
        law.upload()
        after = assert_like_the_oracle(controller, law, risk, compiled)
        assert (before != after).any(), "the graph has not seen the new thresholds"
        for case in ({"layer_configs": DESIGN, "soft_exit": False}, CASES["fitted"]):
            controller = make_controller(**case)
            levels = assert_like_the_oracle(controller, DeviceLaw(controller, "cpu"), risk, compiled)
            assert len(np.unique(levels)) > 1


def test_a_block_is_made_where_thresholds_changed_and_kept_until_forgotten():
    controller = make_controller(DESIGN)
    law = DeviceLaw(controller, "cpu")
    assert law.upload() == law.upload() == 1
    controller.update_threshold(6, [3.0])
    assert law.upload() == int(law.version) == 2
    assert sorted(law.blocks) == [1, 2]
    law.forget(before=2)
    assert sorted(law.blocks) == [2]
    assert law.upload() == 2


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cascade=cascades())
def test_the_float_law_differs_near_cut_points_only(data, cascade):
    controller = make_controller(**cascade)
    risk = data.draw(risks(len(cascade["layer_configs"])))
    risk = np.where(np.isfinite(risk), np.minimum(risk, 20), risk).astype(np.float32)
    block = controller.parameter_block()
    risk_q, twin = oracle(block, risk)
    state = controller.begin(risk.shape[1])
    near_before = np.zeros(risk.shape[1], np.bool_)
    sunk = np.zeros(risk.shape[1], np.bool_)
    for i, config in enumerate(controller.layer_configs):
        levels = controller.step(state, i, risk[i])
        cuts = np.append(controller.cut_points[1:], np.float32(config.target_exit_rate)).astype(np.float64)
        near = (np.abs(state.confidence[:, None] - cuts) <= block.distance[i]).any(axis=1)
        near_before |= near
        sunk |= risk_q[i] == RISK_BEYOND
        excused = near if controller.soft_exit else near_before
        assert np.all((twin[i] == levels) | sunk | excused)
        assert np.all((twin[i] >= levels) | excused)


def test_the_fitted_law_hardly_ever_differs_from_the_float_law():
    controller = make_controller(FITTED, confidence_decay=0.25)
    rng = np.random.default_rng(3)
    risk = (rng.gamma(2.0, 0.6, (3, 100_000)) * np.array([[0.4], [1.0], [1.0]])).astype(np.float32)
    levels = controller.evaluate_batch(risk).levels
    assert len(np.unique(levels)) > 5
    assert (oracle(controller.parameter_block(), risk)[1] != levels).mean() < 1e-3


def test_an_empty_batch():
    law = DeviceLaw(make_controller(DESIGN), "cpu")
    risk_q, levels = whole_pass(law, torch.zeros(3, 0))
    assert risk_q.shape == levels.shape == (3, 0)


def test_the_numpy_controller_cannot_make_a_block():
    with pytest.raises(
        ConfigError, match=r"needs the compiled controller, got PythonController: build sedac_hf._rust"
    ):
        DeviceLaw(make_controller(DESIGN, controller="python"), "cpu")
