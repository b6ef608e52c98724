"""The search of the dial, on harm that is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.calibration.certify import Judged, certify, judge
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import DocumentScores

_NONE = DocumentScores(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


def _harm(scale: float, rate: float, margin: float):
    def run(share: float) -> Judged:
        rise = scale * math.exp(-rate * share)
        return Judged(share, share, share, rise, rise + margin, _NONE)

    return run


@settings(deadline=None, max_examples=60)
@given(
    scale=st.floats(0.02, 0.5), rate=st.floats(3, 12), start=st.floats(0.1, 0.95), budget=st.floats(0.003, 0.05),
    guess=st.floats(0.3, 5),
)  # fmt: skip
def test_what_is_returned_keeps_the_budget_and_was_run(
    scale: float, rate: float, start: float, budget: float, guess: float
) -> None:
    run = _harm(scale, rate, 0.0005)
    if run(0.98).bound > math.log1p(budget):
        with pytest.raises(CalibrationError):
            certify(run, budget, start, rate * guess, 0.2)
        return
    chosen, tried = certify(run, budget, start, rate * guess, 0.2)
    assert chosen in tried
    assert chosen.bound <= math.log1p(budget)
    best = -math.log((math.log1p(budget) - 0.0005) / scale) / rate
    assert chosen.share <= max(best, 0.2) + 0.15


@pytest.mark.parametrize("start", [0.3, 0.5, 0.8])
def test_it_comes_close_to_the_best_share(start: float) -> None:
    run = _harm(0.2, 6.0, 0.001)
    best = -math.log((math.log1p(0.01) - 0.001) / 0.2) / 6
    chosen, _ = certify(run, 0.01, start, 6.0, 0.15)
    assert best <= chosen.share < best + 0.02


def test_an_unreachable_budget_says_what_was_tried() -> None:
    with pytest.raises(CalibrationError, match=r"no policy keeps the budget of \+0\.10%.*98%"):
        certify(_harm(0.2, 1.0, 0.05), 0.001, 0.5, 6.0, 0.15)


def test_judge_pairs_documents_and_bounds_from_above() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 150, 30)
    dense = DocumentScores(generator.uniform(2, 4, 30) * tokens, tokens, tokens)
    rises = generator.normal(0.01, 0.004, 30)
    cut = DocumentScores(dense.nll + rises * tokens, tokens, tokens)
    rise, bound = judge(dense, cut, 0.95, 0)
    assert rise == pytest.approx(float((rises * tokens).sum() / tokens.sum()))
    assert rise < bound < rise + 0.005


def test_the_budget_holds_about_as_often_as_the_confidence_says() -> None:
    generator = np.random.default_rng(0)
    n, limit, rate, broken, trials = 18, math.log1p(0.01), 8.0, 0, 120
    for _ in range(trials):
        tokens = generator.integers(300, 1500, n)
        dense = DocumentScores(np.zeros(n), tokens, tokens)
        common = generator.standard_normal(n)

        def run(share: float, dense: DocumentScores = dense, common: np.ndarray = common) -> Judged:
            own = 0.9 * common + math.sqrt(1 - 0.9**2) * generator.standard_normal(n)
            factor = np.exp(0.5 * own - 0.5**2 / 2)  # documents differ in harm; its mean is 1
            cut = DocumentScores(0.3 * math.exp(-rate * share) * factor * dense.tokens, dense.tokens, dense.tokens)
            return Judged(share, share, share, *judge(dense, cut, 0.95, 0), cut)

        start = math.log(0.3 / (0.75 * limit)) / rate + generator.normal() * 0.02
        chosen, _ = certify(run, 0.01, start, rate, 0.1)
        broken += 0.3 * math.exp(-rate * chosen.share) > limit
    assert broken <= 12  # 6 are expected at 95%; more than 12 would come up once in a hundred times
