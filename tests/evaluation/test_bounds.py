from __future__ import annotations

import math

import numpy as np
import pytest

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.bounds import mean_difference, paired_interval, t_quantile, upper_bound


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),  # printed tables of Student's t
    [(0.95, 1, 6.3138), (0.95, 5, 2.0150), (0.975, 10, 2.2281), (0.99, 30, 2.4573), (0.9, 1000, 1.2824), (0.5, 3, 0)],
)
def test_t_quantile(probability: float, freedom: float, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, abs=6e-5)


def draw(generator: np.random.Generator, n: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very unequal length whose mean harm per token is 0.01 (independent of length)."""
    tokens = np.round(np.exp(generator.normal(6.5, 1, n))) + 20
    harm = generator.normal(0.01, 0.01, n) if kind == "normal" else generator.gamma(1, 0.01, n)
    return harm * tokens + generator.normal(0, 0.05, n) * np.sqrt(tokens), tokens


@pytest.mark.parametrize(("kind", "n"), [("normal", 8), ("normal", 40), ("skewed", 12), ("skewed", 40)])
def test_coverage_of_the_upper_bound(kind: str, n: int) -> None:
    generator = np.random.default_rng(7)
    draws = [draw(generator, n, kind) for _ in range(300)]
    covered = np.mean([upper_bound(*documents, resamples=300, seed=1) >= 0.01 for documents in draws])
    # 0.95 is asked for; 300 draws give a standard error of 0.013, and strong skew costs two points at few documents
    assert covered >= 0.91
    if n == 40:  # and it is not won by being useless
        excess = [upper_bound(*documents, resamples=300) - mean_difference(*documents) for documents in draws[:60]]
        assert np.median(excess) < 0.007


def test_bound_is_above_the_estimate_and_grows_with_confidence() -> None:
    delta, tokens = draw(np.random.default_rng(3), 30, "skewed")
    bounds = [upper_bound(delta, tokens, confidence) for confidence in (0.5, 0.8, 0.95, 0.99)]
    assert bounds == sorted(bounds)
    assert bounds[2] > mean_difference(delta, tokens)
    assert upper_bound(delta, tokens) == upper_bound(delta, tokens)  # seeded
    assert upper_bound(3 * delta, tokens) == pytest.approx(3 * upper_bound(delta, tokens))


def test_one_document_that_is_most_of_the_text_widens_the_bound() -> None:
    generator = np.random.default_rng(5)
    harm = generator.normal(0.01, 0.01, 12)
    even, uneven = np.full(12, 1000.0), np.array([60000.0, *[1000.0] * 11])
    assert upper_bound(harm * uneven, uneven) - mean_difference(harm * uneven, uneven) > 3 * (
        upper_bound(harm * even, even) - mean_difference(harm * even, even)
    )


def test_equal_documents_leave_no_doubt() -> None:
    tokens = np.arange(1.0, 11.0)
    assert upper_bound(0.02 * tokens, tokens) == pytest.approx(0.02)
    assert paired_interval(0.02 * tokens, tokens) == pytest.approx((0.02, 0.02))
    assert upper_bound(np.zeros(6), np.ones(6)) == 0


def test_interval_is_that_of_a_plain_bootstrap() -> None:
    delta, tokens = draw(np.random.default_rng(11), 25, "skewed")
    generator = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        chosen = generator.integers(0, 25, 25)
        means.append(delta[chosen].sum() / tokens[chosen].sum())
    low, high = paired_interval(delta, tokens, resamples=4000, seed=2)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=0.06)
    assert low < mean_difference(delta, tokens) < high


def test_documents_without_tokens_do_not_count() -> None:
    delta, tokens = draw(np.random.default_rng(2), 10, "normal")
    assert upper_bound([*delta, 0.0], [*tokens, 0]) == upper_bound(delta, tokens)
    with pytest.raises(EvaluationError, match=r"at least 5 documents with scored tokens .* got 4"):
        upper_bound([1, 1, 1, 1, 0], [1, 1, 1, 1, 0])


@pytest.mark.parametrize(
    ("delta", "tokens", "kwargs", "message"),
    [
        ([1, 2], [1, 2, 3], {}, "two arrays"),
        ([1, math.nan, 1, 1, 1], [1] * 5, {}, "finite"),
        ([1] * 5, [1, 1, 1, 1, -1], {}, "finite, and tokens not negative"),
        ([1] * 6, [1] * 6, {"confidence": 1.0}, "confidence must be"),
        ([1, 2, 3, 4, 5, 6], [1] * 6, {"resamples": 3}, "resamples must be"),
    ],
)
def test_bad_values_are_named(delta: list[float], tokens: list[float], kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        upper_bound(delta, tokens, **kwargs)  # type: ignore[arg-type]
