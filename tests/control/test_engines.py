"""The engines against each other, states, copies and pickles."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.control import CascadeController, make_controller
from sedac_hf.layer_config import LayerConfig
from tests.control.cascades import DESIGN, ENGINES, cascades, random_risk, risks


def assert_equal_decisions(a, b):
    for name in ("should_exit", "exit_layer", "accumulated_confidence", "levels"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, err_msg=name)
    np.testing.assert_allclose(a.ratios, b.ratios, rtol=0, atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), cascade=cascades())
def test_engines_agree_on_any_risk(data, cascade):
    risk = data.draw(risks(len(cascade["layer_configs"])))
    assert_equal_decisions(*(make_controller(controller=engine, **cascade).evaluate_batch(risk) for engine in ENGINES))


@pytest.mark.parametrize("soft_exit", [True, False])
@pytest.mark.parametrize("n_tokens", [0, 1, 1023, 1025, 100_000, 300_001])
def test_engines_agree_at_every_size(n_tokens, soft_exit):
    rust, python = (make_controller(DESIGN, controller=engine, soft_exit=soft_exit) for engine in ENGINES)
    risk = random_risk(3, n_tokens)
    expected = python.evaluate_batch(risk)
    assert_equal_decisions(rust.evaluate_batch(risk), expected)
    state = rust.begin(n_tokens)
    for i in range(3):
        np.testing.assert_array_equal(rust.step(state, i, risk[i]), expected.levels[i])
        np.testing.assert_allclose(state.ratio, expected.ratios[i], rtol=0, atol=1e-6)
        for mine, oracle in zip(rust.plan(expected.levels[i]), python.plan(expected.levels[i]), strict=True):
            np.testing.assert_array_equal(mine, oracle)
    np.testing.assert_array_equal(state.exited, expected.should_exit)
    np.testing.assert_array_equal(state.failed, ~np.isfinite(risk).all(axis=0))
    np.testing.assert_array_equal(state.exit_layer, expected.exit_layer)


@settings(max_examples=60, deadline=None)
@given(
    samples=st.lists(st.floats(0, 3, width=32) | st.floats(width=32), max_size=40),
    quantile=st.floats(0, 1),
    alpha=st.floats(0, 1, width=32),
)
def test_engines_agree_on_thresholds(samples, quantile, alpha):
    rust, python = (make_controller(DESIGN, controller=engine, alpha=alpha) for engine in ENGINES)
    array = np.array(samples, np.float32)
    assert rust.update_threshold(6, array, quantile) == python.update_threshold(6, array, quantile)
    np.testing.assert_array_equal(rust.thresholds, python.thresholds)


@pytest.mark.parametrize("engine", ENGINES)
def test_passes_are_apart(engine):
    controller = make_controller(DESIGN, controller=engine)
    risk = random_risk(3, 50)
    expected = controller.evaluate_batch(risk).levels
    first, second = controller.begin(50), controller.begin(50)
    assert (first.n_tokens, first.next_checkpoint) == (50, 0)
    assert not first.ratio.any()
    assert not first.exited.any()
    for i in range(3):
        np.testing.assert_array_equal(controller.step(first, i, risk[i]), expected[i])
        assert (first.next_checkpoint, second.next_checkpoint) == (i + 1, 0)
    for i in range(3):
        np.testing.assert_array_equal(controller.step(second, i, risk[i]), expected[i])


@pytest.mark.parametrize("engine", ENGINES)
def test_thresholds_are_read_at_each_step(engine):
    layers = [LayerConfig(0, 0.0, 1.0, 1.0), LayerConfig(1, 0.0, 1.0, 1.0)]
    controller = make_controller(layers, controller=engine, confidence_decay=0.0)
    state = controller.begin(1)
    risk = np.array([1.5], np.float32)
    assert controller.step(state, 0, risk).tolist() == [8]
    controller.set_thresholds([1.0, 3.0])
    assert controller.step(state, 1, risk)[0] < 8


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_carry_the_thresholds(engine, clone):
    controller = make_controller(DESIGN, controller=engine, alpha=0.5, soft_exit=False, n_levels=4)
    controller.update_threshold(6, [2.0])
    twin = clone(controller)
    assert type(twin) is type(controller)
    assert repr(twin) == repr(controller)
    assert twin.layer_configs == controller.layer_configs
    np.testing.assert_array_equal(twin.thresholds, controller.thresholds)
    twin.set_thresholds([1, 1, 1])
    assert controller.thresholds.tolist() != [1, 1, 1]


def test_the_public_class_is_the_compiled_engine():
    controller = CascadeController(list(DESIGN), alpha=0.2, confidence_decay=0.5, soft_exit=False)
    assert type(controller) is type(make_controller(DESIGN, controller="rust"))
    settings_ = (controller.alpha, controller.confidence_decay, controller.soft_exit, controller.n_levels)
    assert settings_ == (0.2, 0.5, False, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_worker_does_not_wait_for_threads_it_lacks():
    controller = make_controller(DESIGN, controller="rust")
    risk = random_risk(3, 400_000)
    expected = controller.evaluate_batch(risk).levels  # starts the threads
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(controller.evaluate_batch(risk).levels, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
