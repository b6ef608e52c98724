"""Both engines against the golden file, and what must hold for every risk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.control import make_controller
from sedac_hf.layer_config import LayerConfig
from sedac_hf.outputs import ExitDecision
from tests.control.cascades import DESIGN, ENGINES, GOLDEN, cascades, golden_controller, golden_risk, risks

pytestmark = pytest.mark.parametrize("engine", ENGINES)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_steps_give_the_golden_decisions(engine, case):
    controller, risk = golden_controller(case, engine), golden_risk(case)
    n_tokens = len(case["exit_layer"])
    state = controller.begin(n_tokens)
    for i in range(len(case["layers"])):
        levels = controller.step(state, i, risk[i].reshape(n_tokens))
        assert levels.dtype == np.uint8
        assert levels.tolist() == case["levels"][i]
        assert state.exited.astype(int).tolist() == case["exited"][i]
        assert state.failed.astype(int).tolist() == case["failed"][i]
        np.testing.assert_allclose(state.ratio, np.array(case["ratios"][i], np.float32), rtol=0, atol=1e-6)
    assert state.exit_layer.tolist() == case["exit_layer"]
    np.testing.assert_array_equal(state.confidence, np.array(case["confidence"], np.float32))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_a_batch_gives_the_golden_decisions(engine, case):
    decisions = golden_controller(case, engine).evaluate_batch(golden_risk(case))
    assert decisions.levels.tolist() == case["levels"]
    assert decisions.should_exit.astype(int).tolist() == case["exited"][-1]
    assert decisions.exit_layer.tolist() == case["exit_layer"]
    np.testing.assert_array_equal(decisions.accumulated_confidence, np.array(case["confidence"], np.float32))
    np.testing.assert_allclose(decisions.ratios, np.array(case["ratios"], np.float32), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(decisions.soft_exit_ratio, decisions.ratios[-1])


def test_cut_points_and_plans_are_the_golden_ones(engine):
    for case in GOLDEN["cut_points"]:
        controller = make_controller(DESIGN, controller=engine, n_levels=case["n_levels"])
        np.testing.assert_array_equal(controller.cut_points, np.array(case["cut_points"], np.float32))
    for case in GOLDEN["plans"]:
        controller = make_controller(DESIGN, controller=engine, n_levels=case["n_levels"])
        order, at_least = controller.plan(np.array(case["levels"], np.uint8))
        assert order.dtype == at_least.dtype == np.int64
        assert order.tolist() == case["order"]
        assert at_least.tolist() == case["at_least"]


def test_the_design_at_zero_risk(engine):
    decisions = make_controller(DESIGN, controller=engine).evaluate_batch(np.zeros((3, 2), np.float32))
    np.testing.assert_allclose(decisions.ratios[:, 0], [0.310, 0.664, 0.834], atol=5e-4)
    assert decisions.levels[:, 0].tolist() == [6, 3, 2]
    assert len(decisions) == 2
    assert list(decisions) == [decisions[0], decisions[-1]]
    assert decisions[1] == ExitDecision(True, 3, pytest.approx(0.903), pytest.approx(0.8337, abs=1e-4))
    with pytest.raises(IndexError):
        decisions[2]


def test_an_empty_batch(engine):
    controller = make_controller(DESIGN, controller=engine)
    decisions = controller.evaluate_batch(np.zeros((3, 0), np.float32))
    assert len(decisions) == 0
    assert decisions.ratios.shape == decisions.levels.shape == (3, 0)
    state = controller.begin(0)
    assert [controller.step(state, i, np.zeros(0, np.float32)).shape for i in range(3)] == [(0,)] * 3


@settings(max_examples=60, deadline=None)
@given(data=st.data(), cascade=cascades())
def test_laws(engine, data, cascade):
    risk = data.draw(risks(len(cascade["layer_configs"])))
    n_levels, soft = cascade["n_levels"], cascade["soft_exit"]
    decisions = make_controller(controller=engine, **cascade).evaluate_batch(risk)
    skipped = 1 - decisions.levels.astype(np.float64) / n_levels
    assert np.all(skipped <= decisions.ratios + 1e-6), "a level never skips more than the ratio"
    assert np.all(decisions.ratios - skipped < 1 / n_levels + 1e-6), "nor a whole level less"
    assert not soft or np.all(decisions.levels > 0)
    failed = np.logical_or.accumulate(~np.isfinite(risk), axis=0)
    assert np.all(decisions.levels[failed] == n_levels)
    assert not decisions.should_exit[failed[-1]].any()
    assert np.isfinite(decisions.accumulated_confidence).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), cascade=cascades())
def test_less_risk_never_keeps_more(engine, data, cascade):
    risk = data.draw(risks(len(cascade["layer_configs"])))
    risk = np.where(np.isfinite(risk), risk, np.float32(1))
    controller = make_controller(controller=engine, **cascade)
    less = np.ascontiguousarray(risk * np.float32(data.draw(st.sampled_from([0, 0.5, 0.999]))))
    assert np.all(controller.evaluate_batch(np.maximum(less, 0)).levels <= controller.evaluate_batch(risk).levels)


def test_custom_layers_need_not_start_at_zero(engine):
    layers = [LayerConfig(7, 0.0, 1.0, 1.0), LayerConfig(31, 5.0, 1.0, 1.0)]
    decisions = make_controller(layers, controller=engine).evaluate_batch(np.array([[0.5], [9.0]], np.float32))
    assert decisions[0].exit_layer == 7
    assert not decisions[0].should_exit
