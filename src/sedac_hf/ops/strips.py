"""The strip engine for `truncate`: host-known widths, plain torch products, every weight read at most once.

A call whose tokens share one level is three products on slices. A mixed call is sorted by level (the plan did that
once for the whole stretch); the units are cut into strips at some of the widths that occur, and strip [lo, hi) runs on
the tokens wider than lo, a prefix of the sorted batch. Tokens that end inside a strip have the rest of it zeroed, so
the result is exact for every choice of cuts: where to cut is a question of cost alone, answered by a small dynamic
programme. Where strips do not pay (few tokens: reading the weights costs more than the products) it gives one strip.

Low-precision partial sums are accumulated in float32; a strip's own product is rounded once to the weights' dtype.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.reference import bounded_reference_ffn
from sedac_hf.ops.tokens import add_level_bias, compensated, level_widths, present, units_by_width


class CostModel(NamedTuple):
    """Rates that decide where strips are cut; only the speed depends on them.

    bytes_per_s: reading weights; flops_per_s: products; per_strip_s: launches and calls of one more strip;
    act_bytes_per_s: reading and accumulating activations.
    """

    bytes_per_s: float
    flops_per_s: float
    per_strip_s: float
    act_bytes_per_s: float


class Strip(NamedTuple):
    """Units lo..hi, run by the first ``tokens`` of the sorted batch; rows from ``whole`` on end inside the strip."""

    lo: int
    hi: int
    tokens: int
    whole: int


# Two desktop or server cores; one current data-centre GPU in half precision.
CPU_COSTS = CostModel(15e9, 90e9, 30e-6, 10e9)
GPU_COSTS = CostModel(3e12, 400e12, 20e-6, 2e12)


def strips_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by slices and strips: x [n, d] -> [n, d]. No token may choose by importance."""
    n, f = x.shape[0], weights.intermediate_size
    widths = level_widths(cut, f)
    if cut.plan.uniform is not None:
        return _uniform(x, weights, cut, widths[cut.plan.uniform])
    runs = [(widths[level], lo, hi) for level, lo, hi in present(cut.plan)]
    if any(narrower > wider for (wider, _, _), (narrower, _, _) in pairwise(runs)):
        return bounded_reference_ffn(x, weights, cut)  # widths that do not fall with the level cannot be sorted
    matrices = 2 if weights.gate is None else 3
    costs = CPU_COSTS if x.device.type == "cpu" else GPU_COSTS
    ends = tuple((width, hi) for width, _, hi in runs)
    strips = plan_strips(ends, weights.hidden_size, weights.up.element_size(), matrices, costs)
    y = _sorted(x, weights, cut, strips, widths)
    cut.record(
        engine="strips",
        tokens=n,
        needed=units_by_width(cut, f),
        read=strips[-1].hi if strips else 0,
        computed=sum((strip.hi - strip.lo) * strip.tokens for strip in strips),
    )
    return y


def _uniform(x: Tensor, weights: FFNWeights, cut: SiteCut, width: int) -> Tensor:
    n = x.shape[0]
    h = weights.hidden(x, 0, width)
    y = compensated(functional.linear(h, weights.down[:, :width], weights.down_bias), h, cut)
    cut.record(engine="strips", tokens=n, needed=n * width, read=width, computed=n * width)
    return y


def _sorted(
    x: Tensor, weights: FFNWeights, cut: SiteCut, strips: tuple[Strip, ...], widths: tuple[int, ...]
) -> Tensor:
    n, low_precision = x.shape[0], x.dtype in (torch.bfloat16, torch.float16)
    order = cut.plan.on(x.device, "order")
    rows = x.index_select(0, order)
    row_widths = None
    y = torch.zeros(n, weights.down.shape[0], dtype=torch.float32 if low_precision else x.dtype, device=x.device)
    maps = _LowRankMaps(cut, y if not low_precision else x)
    for lo, hi, tokens, whole in strips:
        h = weights.hidden(rows[:tokens], lo, hi)
        if whole < tokens:
            if row_widths is None:
                levels = cut.plan.on(x.device).index_select(0, order)
                row_widths = torch.tensor(widths, device=x.device)[levels]
            units = torch.arange(lo, hi, device=x.device)
            outside = units[None, :] >= row_widths[whole:tokens, None]
            h = torch.cat((h[:whole], h[whole:].masked_fill(outside, 0)))
        y[:tokens] += h @ weights.down[:, lo:hi].T
        maps.gather(h, lo, hi)
    y = maps.add_to(y)
    if weights.down_bias is not None:
        y = y + weights.down_bias
    y = torch.zeros_like(y).index_copy(0, order, y)
    return add_level_bias(y, cut).to(x.dtype)


class _LowRankMaps:
    """``U (V h)`` of each level that has such a map, gathered strip by strip; rows of one level lie together."""

    def __init__(self, cut: SiteCut, like: Tensor) -> None:
        self.runs: list[tuple[int, int, Tensor, Tensor]] = []
        self.sums: list[Tensor | None] = []
        if cut.compensation is None:
            return
        for level, lo, hi in present(cut.plan):
            factors = None if level == cut.plan.n_levels else cut.compensation.low_rank(level, like)
            if factors is not None:
                self.runs.append((lo, hi, *factors))
                self.sums.append(None)

    def gather(self, h: Tensor, lo_unit: int, hi_unit: int) -> None:
        for i, (lo, hi, _, v) in enumerate(self.runs):
            top = min(hi_unit, v.shape[1])
            if top > lo_unit and h.shape[0] >= hi:
                part = h[lo:hi, : top - lo_unit] @ v[:, lo_unit:top].T
                total = self.sums[i]
                self.sums[i] = part if total is None else total + part

    def add_to(self, y: Tensor) -> Tensor:
        for (lo, hi, u, _), total in zip(self.runs, self.sums, strict=True):
            if total is not None:
                y[lo:hi] += total @ u.T
        return y


@lru_cache(maxsize=4096)
def plan_strips(
    ends: tuple[tuple[int, int], ...], hidden_size: int, element_size: int, matrices: int, costs: CostModel
) -> tuple[Strip, ...]:
    """The cheapest strips for a sorted batch.

    ends: (width, row after the last token that has it), widths falling. Returns strips from unit 0 up that cover the
    widest token; tokens of width 0 are in none.
    """
    last_row = {width: row for width, row in ends if width > 0}  # equal widths of two levels: the later row wins
    cuts = [0, *sorted(last_row)]
    tokens_above = [last_row[cuts[i + 1]] for i in range(len(cuts) - 1)]  # tokens wider than cuts[i]

    def cost(width: int, tokens: int) -> float:
        read = matrices * hidden_size * element_size / costs.bytes_per_s
        compute = 2 * matrices * hidden_size * tokens / costs.flops_per_s
        traffic = 4 * hidden_size * element_size * tokens / costs.act_bytes_per_s
        return width * max(read, compute) + traffic + costs.per_strip_s

    best = [0.0] + [float("inf")] * (len(cuts) - 1)
    previous = [0] * len(cuts)
    for j in range(1, len(cuts)):
        for i in range(j):
            total = best[i] + cost(cuts[j] - cuts[i], tokens_above[i])
            if total < best[j]:
                best[j], previous[j] = total, i
    strips: list[Strip] = []
    j = len(cuts) - 1
    while j > 0:
        i = previous[j]
        strips.append(Strip(cuts[i], cuts[j], tokens_above[i], tokens_above[j - 1]))
        j = i
    return tuple(reversed(strips))
