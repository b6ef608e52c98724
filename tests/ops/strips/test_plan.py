"""The compiled planner and the one in Python cut alike, and no other choice of cuts is cheaper."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import _rust
from sedac_hf.control import strip_planner
from sedac_hf.ops.strips.plan import PythonStripPlanner, RowGroup, Strip

TOKENS = np.array([1.0, 8.0, 64.0, 512.0])
UNITS = np.array([16.0, 128.0, 1024.0])

grids = st.lists(st.floats(1e-7, 1e-2), min_size=12, max_size=12).map(lambda values: np.reshape(values, (4, 3)))


@st.composite
def sorted_ends(draw):
    """(width, row after the last token of it), widths falling, some of them equal or 0."""
    runs = draw(st.lists(st.tuples(st.integers(0, 1200), st.integers(1, 200)), max_size=7))
    ends, row = [], 0
    for width, tokens in sorted(runs, reverse=True):
        row += tokens
        ends.append((width, row))
    return ends


@settings(max_examples=200, deadline=None)
@given(prior=grids, measured=st.none() | grids, ends=sorted_ends())
def test_both_planners_cut_alike(prior, measured, ends):
    compiled, ours = (cls(TOKENS, UNITS, prior, measured) for cls in (_rust.StripPlanner, PythonStripPlanner))
    assert [Strip(*strip) for strip in compiled.strips(ends)] == ours.strips(ends)
    assert [RowGroup(*group) for group in compiled.groups(ends)] == ours.groups(ends)


@settings(max_examples=100, deadline=None)
@given(prior=grids, measured=st.none() | grids, tokens=st.integers(0, 2000), units=st.integers(0, 3000))
def test_both_planners_reckon_alike(prior, measured, tokens, units):
    compiled, ours = (cls(TOKENS, UNITS, prior, measured) for cls in (_rust.StripPlanner, PythonStripPlanner))
    assert compiled.seconds(tokens, units) == pytest.approx(ours.seconds(tokens, units), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(grid=grids, ends=sorted_ends())
def test_strips_cover_and_are_cheapest(grid, ends):
    """The dynamic programme against all choices of cuts."""
    planner = PythonStripPlanner(TOKENS, UNITS, grid)
    strips = planner.strips(ends)
    widths = sorted({width for width, _ in ends if width > 0})
    assert [strip.lo for strip in strips] == [0, *(strip.hi for strip in strips)][: len(strips)]
    assert (strips[-1].hi if strips else 0) == max((width for width, _ in ends), default=0)

    def rows_above(width):
        return max((end for other, end in ends if other > width), default=0)

    for strip in strips:
        assert strip.tokens == rows_above(strip.lo)
        assert strip.whole == rows_above(strip.hi - 1)

    def price(cuts):
        return sum(planner.seconds(rows_above(lo), hi - lo) for lo, hi in zip((0, *cuts), cuts, strict=False))

    if widths:
        cheapest = min(
            price((*inner, widths[-1])) for k in range(len(widths)) for inner in combinations(widths[:-1], k)
        )
        assert price(tuple(strip.hi for strip in strips)) <= cheapest * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(grid=grids, ends=sorted_ends())
def test_groups_cover_and_are_cheapest(grid, ends):
    planner = PythonStripPlanner(TOKENS, UNITS, grid)
    groups = planner.groups(ends)
    boundaries = [row for width, row in ends if width > 0]
    assert [group.lo for group in groups] == [0, *(group.hi for group in groups)][: len(groups)]
    assert (groups[-1].hi if groups else 0) == max(boundaries, default=0)

    def width_at(row):
        return next(width for width, end in ends if end > row)

    assert all(group.width == width_at(group.lo) for group in groups)

    def price(cuts):
        return sum(planner.seconds(hi - lo, width_at(lo)) for lo, hi in zip((0, *cuts), cuts, strict=False))

    if boundaries:
        *inner, last = boundaries
        cheapest = min(price((*cuts, last)) for k in range(len(boundaries)) for cuts in combinations(inner, k))
        assert price(tuple(group.hi for group in groups)) <= cheapest * (1 + 1e-9)


def test_the_compiled_planner_refuses_what_is_no_grid_and_no_batch():
    good = np.ones((4, 3))
    with pytest.raises(ValueError, match="prior"):
        _rust.StripPlanner(TOKENS, UNITS, good.T.copy())
    with pytest.raises(ValueError, match="measured"):
        _rust.StripPlanner(TOKENS, UNITS, good, good[:3].copy())
    with pytest.raises(ValueError, match="seconds"):
        _rust.StripPlanner(TOKENS, UNITS, good * -1)
    with pytest.raises(ValueError, match="ends"):
        _rust.StripPlanner(TOKENS, UNITS, good).strips([(1, 4), (2, 8)])


def test_the_compiled_planner_is_taken_where_it_may_be():
    assert strip_planner() is strip_planner("rust") is _rust.StripPlanner
    assert strip_planner("python") is None
