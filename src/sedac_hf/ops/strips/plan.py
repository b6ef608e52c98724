"""Where to cut an FFN's products for a batch of mixed widths: the oracle of the compiled planner, and its stand-in.

A batch sorted by falling width is a staircase: a token of width w needs the first w hidden units. Two ways to pave it
with dense products, both exact for every choice of cuts:

- *strips* of units: strip [lo, hi) runs on the tokens wider than lo, a prefix of the batch; every weight is read once;
- *row groups*: each group of tokens runs as wide as its widest token, in one product and so with one rounding.

What to pave and what to merge is a question of cost alone: a shortest path over a table of times. ``ends`` describes a
batch: (width, row after the last token of it), widths falling, rows rising; equal widths may come several times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Ends = Sequence[tuple[int, int]]

WORTH_A_CHANGE = 0.05
"""A change of cuts must be worth this share of the time, so that small noise in what was measured does not move the
cuts, and with them the last bits of a result. The compiled planner has the same number; a test compares them."""


class Strip(NamedTuple):
    """Units lo..hi, run by the first ``tokens`` of the sorted batch; rows from ``whole`` on end inside the strip."""

    lo: int
    hi: int
    tokens: int
    whole: int


class RowGroup(NamedTuple):
    """Rows lo..hi of the sorted batch, run ``width`` units wide."""

    lo: int
    hi: int
    width: int


class StripPlanner(Protocol):
    """Cuts batches by cost; an engine's class is called with (tokens, units, prior, measured or None)."""

    def seconds(self, tokens: int, units: int) -> float:
        """Seconds of a product, as measured where something was; no tokens or no units take no time."""

    def strips(self, ends: list[tuple[int, int]]) -> Sequence[tuple[int, int, int, int]]:
        """Strips, as (lo, hi, tokens, whole), from unit 0 up to the widest token."""

    def groups(self, ends: list[tuple[int, int]]) -> Sequence[tuple[int, int, int]]:
        """Row groups, as (lo, hi, width), of all tokens that have any width."""


class PlannerClass(Protocol):
    """What makes a planner: this module's class or the compiled one."""

    def __call__(
        self,
        tokens: NDArray[np.float64],
        units: NDArray[np.float64],
        prior: NDArray[np.float64],
        measured: NDArray[np.float64] | None,
    ) -> StripPlanner: ...


class PythonStripPlanner:
    """The planner in Python; the numbers and choices are those of the compiled one.

    Args:
        tokens, units: float64 [T] and [U], ascending: the axes of the grid.
        prior: float64 [T, U], seconds of a product; gives the cuts unless
        measured: says that others are better by `WORTH_A_CHANGE`.
    """

    def __init__(
        self,
        tokens: NDArray[np.float64],
        units: NDArray[np.float64],
        prior: NDArray[np.float64],
        measured: NDArray[np.float64] | None = None,
    ) -> None:
        self._prior = _CostGrid(tokens, units, prior)
        self._measured = None if measured is None else _CostGrid(tokens, units, measured)

    def seconds(self, tokens: int, units: int) -> float:
        return (self._measured or self._prior).seconds(tokens, units)

    def strips(self, ends: list[tuple[int, int]]) -> list[Strip]:
        cuts, wider = [0], []  # ascending cuts, and how many tokens are wider than each
        for width, row in reversed(ends):
            if width > cuts[-1]:
                cuts.append(width)
                wider.append(row)
        path = self._cheapest(len(cuts), lambda grid, i, j: grid.seconds(wider[i], cuts[j] - cuts[i]))
        return [Strip(cuts[i], cuts[j], wider[i], wider[j - 1]) for i, j in pairwise(path)]

    def groups(self, ends: list[tuple[int, int]]) -> list[RowGroup]:
        wide = [(width, row) for width, row in ends if width > 0]
        starts = [0, *(row for _, row in wide)]
        path = self._cheapest(len(starts), lambda grid, i, j: grid.seconds(starts[j] - starts[i], wide[i][0]))
        return [RowGroup(starts[i], starts[j], wide[i][0]) for i, j in pairwise(path)]

    def _cheapest(self, nodes: int, cost: Callable[[_CostGrid, int, int], float]) -> list[int]:
        by_prior = _shortest_path(nodes, lambda i, j: cost(self._prior, i, j))
        measured = self._measured
        if measured is None:
            return by_prior
        by_measure = _shortest_path(nodes, lambda i, j: cost(measured, i, j))
        first, best = (sum(cost(measured, i, j) for i, j in pairwise(path)) for path in (by_prior, by_measure))
        return by_measure if best < (1 - WORTH_A_CHANGE) * first else by_prior


class _CostGrid:
    """Seconds over tokens and units: logarithms interpolated bilinearly, the edge below, in proportion above."""

    def __init__(self, tokens: NDArray[np.float64], units: NDArray[np.float64], seconds: NDArray[np.float64]) -> None:
        # math.log rather than numpy's: the compiled planner calls the same function.
        self._tokens = [math.log(value) for value in tokens.tolist()]
        self._units = [math.log(value) for value in units.tolist()]
        self._seconds = [[math.log(value) for value in row] for row in seconds.tolist()]

    def seconds(self, tokens: int, units: int) -> float:
        if tokens == 0 or units == 0:
            return 0.0
        row, down, above = _place(self._tokens, math.log(tokens))
        column, across, beyond = _place(self._units, math.log(units))

        def along(row: int) -> float:
            values = self._seconds[row]
            left, right = values[column], values[min(column + 1, len(values) - 1)]
            return left + (right - left) * across

        upper = along(row)
        lower = along(min(row + 1, len(self._seconds) - 1))
        return math.exp(upper + (lower - upper) * down + above + beyond)


def _place(axis: list[float], value: float) -> tuple[int, float, float]:
    """Cell of ``value`` on an axis, the share of the way through it, and how far ``value`` is above the axis."""
    last = len(axis) - 1
    inside = min(max(value, axis[0]), axis[last])
    cell = min(max(bisect_right(axis, inside) - 1, 0), max(last - 1, 0))
    size = axis[min(cell + 1, last)] - axis[cell]
    return cell, (inside - axis[cell]) / size if size > 0 else 0.0, max(value - axis[last], 0.0)


def _shortest_path(nodes: int, cost: Callable[[int, int], float]) -> list[int]:
    """Nodes of the cheapest path 0 -> nodes - 1 that only goes up; of equal ones that with the earlier last step."""
    best, previous = [0.0] + [math.inf] * (nodes - 1), [0] * nodes
    for j in range(1, nodes):
        for i in range(j):
            total = best[i] + cost(i, j)
            if total < best[j]:
                best[j], previous[j] = total, i
    path = [nodes - 1]
    while path[-1] > 0:
        path.append(previous[path[-1]])
    return path[::-1]
