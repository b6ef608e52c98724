"""One threshold shares the work out: monotone, on target, and no worse than any other split of the same cost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.calibration.allocation import SelectAllocation, TruncateAllocation, mean_share, threshold_for

UNITS, HIDDEN = 256, 64


def _select(seed: int, n_sites: int = 4, overhead: float = 0.09) -> SelectAllocation:
    generator = np.random.default_rng(seed)
    samples = [np.sort(generator.exponential(generator.uniform(0.1, 3), 4000)) for _ in range(n_sites)]
    return SelectAllocation(
        samples,
        generator.uniform(0.1, 10, n_sites),
        [UNITS] * n_sites,
        np.full(n_sites, 3.0 * HIDDEN * UNITS),
        np.full(n_sites, overhead),
    )


def _truncate(seed: int, rank: int = 4) -> TruncateAllocation:
    generator = np.random.default_rng(seed)
    worth = [np.sort(generator.exponential(1, UNITS))[::-1] * generator.uniform(0.1, 3) for _ in range(4)]
    return TruncateAllocation(
        worth, generator.uniform(0.1, 10, 4), np.full(4, 3.0 * HIDDEN * UNITS), HIDDEN, [rank] * 4
    )


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), share=st.floats(0.15, 0.95))
def test_select_meets_the_share_within_its_sample(seed: int, share: float) -> None:
    allocation = _select(seed)
    reached = mean_share(allocation, threshold_for(allocation, share), range(4))
    assert share <= reached + 1e-12
    assert reached == pytest.approx(share, abs=2e-3)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), low=st.floats(0.1, 0.9), more=st.floats(0.01, 0.1), select=st.booleans())
def test_a_larger_share_never_uses_less(seed: int, low: float, more: float, select: bool) -> None:
    allocation = _select(seed) if select else _truncate(seed)
    before = allocation.points(threshold_for(allocation, low))
    after = allocation.points(threshold_for(allocation, low + more))
    for small, large in zip(before, after, strict=True):
        assert large.width >= small.width
        assert large.importance_min <= small.importance_min


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), share=st.floats(0.2, 0.95))
def test_truncate_widths_fit_the_kernels_and_count_their_compensation(seed: int, share: float) -> None:
    allocation = _truncate(seed)
    threshold = threshold_for(allocation, share)
    points = allocation.points(threshold)
    assert all(point.width % 8 == 0 and 0 < point.width <= UNITS for point in points)
    spent = [
        3 * HIDDEN * point.width + (HIDDEN + 4 * (HIDDEN + point.width) if point.width < UNITS else 0)
        for point in points
    ]
    assert allocation.shares(threshold) == pytest.approx(np.array(spent) / (3 * HIDDEN * UNITS))
    assert mean_share(allocation, threshold, range(4)) >= share - 1e-9


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_moving_units_between_ffns_does_not_lower_the_modelled_harm(seed: int) -> None:
    generator = np.random.default_rng(seed)
    worth = [np.sort(generator.exponential(1, UNITS))[::-1] for _ in range(2)]
    sensitivity = generator.uniform(0.2, 5, 2)
    allocation = TruncateAllocation(worth, sensitivity, np.full(2, 3.0 * HIDDEN * UNITS), HIDDEN, [0, 0])
    a, b = (point.width for point in allocation.points(threshold_for(allocation, 0.6)))

    def harm(first: int, second: int) -> float:
        rest = (first, second)
        return float(sum(s * np.square(w[k:]).sum() for s, w, k in zip(sensitivity, worth, rest, strict=True)))

    for step in (32, -32):  # wider than the rounding of widths
        if 0 < a + step <= UNITS and 0 < b - step <= UNITS:
            assert harm(a, b) <= harm(a + step, b - step) + 1e-9


def test_only_the_named_ffns_count() -> None:
    allocation = _select(3)
    threshold = threshold_for(allocation, 0.5, [1, 2])
    assert mean_share(allocation, threshold, [1, 2]) == pytest.approx(0.5, abs=2e-3)
