"""Threshold updates: their arithmetic, and that none is lost under threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sedac_hf.control import make_controller
from sedac_hf.errors import ConfigError, ControllerError
from sedac_hf.layer_config import LayerConfig
from tests.control.cascades import DESIGN, ENGINES, GOLDEN, random_risk

pytestmark = pytest.mark.parametrize("engine", ENGINES)


def test_updates_are_the_golden_ones(engine):
    for case in GOLDEN["updates"]:
        layer = LayerConfig(4, 0.5, float(case["start"]), 1.0)
        controller = make_controller([layer], controller=engine, alpha=float(case["alpha"]))
        samples = np.array([float(sample) for sample in case["samples"]], np.float32)
        after = controller.update_threshold(4, samples, case["quantile"])
        assert np.float32(after) == np.float32(case["after"])
        assert controller.thresholds.tolist() == [after]


def test_the_quantile_is_numpys_and_defaults_to_the_layers(engine):
    samples = np.random.default_rng(0).random(1001)
    controller = make_controller(DESIGN, controller=engine)
    after = controller.update_threshold(3, samples)
    assert after == pytest.approx(0.9 * 0.8 + 0.1 * np.quantile(samples, 0.2), rel=1e-6)
    layer = LayerConfig(3, -5.0, 0.8, 0.3, quantile=0.7)
    after = make_controller([layer], controller=engine).update_threshold(3, samples)
    assert after == pytest.approx(0.9 * 0.8 + 0.1 * np.quantile(samples, 0.7), rel=1e-6)


@pytest.mark.parametrize("samples", [[1, 2], (1.0, 2.0), [[1.0], [2.0]], np.array([1, 2]), torch.tensor([1.0, 2.0])])
def test_samples_of_any_kind(engine, samples):
    controller = make_controller(DESIGN, controller=engine, alpha=1.0)
    assert controller.update_threshold(6, samples) == 1.5


def test_no_usable_sample_changes_nothing(engine):
    controller = make_controller(DESIGN, controller=engine)
    for samples in ([], [np.nan], [np.inf, -np.inf, np.nan], torch.empty(0)):
        assert controller.update_threshold(9, samples) == np.float32(1.2)


def test_refusals(engine):
    controller = make_controller(DESIGN, controller=engine)
    with pytest.raises(ControllerError, match=r"`layer_idx` must be one of .*\[3, 6, 9\], got 1"):
        controller.update_threshold(1, [1.0])
    with pytest.raises(ControllerError, match=r"`quantile` must be a number in \[0, 1\], got 1.5"):
        controller.update_threshold(3, [1.0], 1.5)
    with pytest.raises(ControllerError, match=r"`samples` must be"):
        controller.update_threshold(3, ["high"])
    with pytest.raises(ControllerError, match=r"shape \[3\], got .* shape \[2\]"):
        controller.set_thresholds([1.0, 2.0])
    for bad in (0.0, -1.0, np.nan, np.inf, 1e-7):
        with pytest.raises(ConfigError, match=r"`values\[1\]` must be finite"):
            controller.set_thresholds([1.0, bad, 1.0])
    np.testing.assert_array_equal(controller.thresholds, np.float32([0.8, 1.0, 1.2]))


def test_no_update_is_lost_under_threads(engine):
    """Every update is the same function of the threshold: any order gives one value, and a lost update shows."""
    n_threads, each = 8, 1000
    shared, alone = (make_controller(DESIGN, controller=engine, alpha=1e-4) for _ in range(2))
    risk = random_risk(3, 500)
    start = threading.Barrier(n_threads + 1)

    def update():
        start.wait()
        for _ in range(each):
            shared.update_threshold(6, [0.25])

    def decide():
        start.wait()
        for _ in range(50):
            state = shared.begin(500)
            for i in range(3):
                shared.step(state, i, risk[i])

    threads = [threading.Thread(target=update) for _ in range(n_threads)] + [threading.Thread(target=decide)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(n_threads * each):
        alone.update_threshold(6, [0.25])
    assert shared.thresholds.tolist() == alone.thresholds.tolist()


def test_passes_on_several_threads_do_not_meet(engine):
    controller = make_controller(DESIGN, controller=engine)
    wrong = []

    def decide(seed):
        risk = random_risk(3, 2000, seed)
        expected = controller.evaluate_batch(risk).levels
        for _ in range(20):
            state = controller.begin(2000)
            if any((controller.step(state, i, risk[i]) != expected[i]).any() for i in range(3)):
                wrong.append(seed)

    threads = [threading.Thread(target=decide, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_that_step_one_pass_take_turns(engine):
    """One of them advances the pass, the others are told that they came out of order; nobody waits for ever."""
    if engine == "python":
        pytest.skip("the oracle's passes are for one thread")
    controller = make_controller(DESIGN, controller=engine)
    for _ in range(50):
        state = controller.begin(5000)
        refused = []

        def step(state=state, refused=refused):
            try:
                controller.step(state, 0, np.zeros(5000, np.float32))
            except ControllerError:
                refused.append(1)

        threads = [threading.Thread(target=step) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 3
        assert state.next_checkpoint == 1
