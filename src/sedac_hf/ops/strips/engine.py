"""The strip engine for `truncate`: host-known widths, plain torch products, gate and up read at most once.

A call whose tokens share one level is three products on slices. A mixed call is sorted by level (the plan did that
once for the whole stretch) and paved with products as `plan.py` tells, once per stretch and set of widths. Tokens
that end inside a strip or a row group have the rest of it zeroed, so the result is exact for every choice of cuts:
where to cut is a question of cost alone (`costs.py`). Where cuts do not pay (few tokens: reading the weights costs
more than the products) it gives one strip, which is the masked product.

float32 and float64: all three matrices run in strips, and down's partial sums are added up in place. bfloat16 and
float16: gate and up run in strips, down in row groups, one column per token (`columns.py`): an output is one product,
accumulated inside it in float32 and rounded once. Strips of down would each be rounded, as torch has no product of
low-precision matrices into float32 on a CPU. Where gradients are wanted, or weights are no plain tensors, down's
strips are rounded to the weights' dtype and added up in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.reference import bounded_reference_ffn
from sedac_hf.ops.strips.columns import TILE, down_by_columns, fill_outputs, fill_units, hidden_by_columns
from sedac_hf.ops.strips.costs import accumulates, cost_table
from sedac_hf.ops.strips.orders import by_columns, down_by_rows, hidden_by_rows
from sedac_hf.ops.strips.plan import PythonStripPlanner, RowGroup, Strip
from sedac_hf.ops.tokens import add_level_bias, compensated, level_widths, present, used_units

Hidden = Callable[[Tensor, FFNWeights, int], Tensor]
Down = Callable[[Tensor, FFNWeights], Tensor]


class Run(NamedTuple):
    """Rows lo..hi of the sorted batch have this level, and so this width."""

    level: int
    lo: int
    hi: int
    width: int


class Paving(NamedTuple):
    """How one batch runs through FFNs of the same widths; ``groups`` is empty where down runs in the strips too."""

    runs: tuple[Run, ...]
    strips: tuple[Strip, ...]
    groups: tuple[RowGroup, ...]

    @property
    def rows(self) -> int:
        """Rows that have any unit; they come first."""
        return self.strips[0].tokens if self.strips else 0


def strips_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by slices and strips: x [n, d] -> [n, d]. No token may choose by importance."""
    n = x.shape[0]
    widths = level_widths(cut, weights.intermediate_size)
    if cut.plan.uniform is not None:
        return _uniform(x, weights, cut, widths[cut.plan.uniform])
    runs = tuple(Run(level, lo, hi, widths[level]) for level, lo, hi in present(cut.plan))
    if any(later.width > earlier.width for earlier, later in pairwise(runs)):
        return bounded_reference_ffn(x, weights, cut)  # widths that do not fall with the level cannot be sorted
    tracked = _is_tracked(x, weights)
    paving = _pave(weights, cut, runs, in_groups=not tracked and not accumulates(x.dtype))
    if n <= TILE and len(paving.strips) == 1 and len(paving.groups) <= 1:
        y, computed = _at_once(x, weights, cut, runs[0].width, tracked=tracked), n * runs[0].width
    else:
        order = None if cut.plan.in_order else cut.plan.on(x.device, "order")
        rows = x if order is None else x.index_select(0, order)
        run = _tracked if tracked else _in_groups if paving.groups else _in_strips
        y = run(rows, weights, cut, paving)
        y = y if order is None else y.index_select(0, cut.plan.on(x.device, "inverse"))
        y, computed = add_level_bias(y, cut).to(x.dtype), _computed(weights, paving)
    cut.record(
        engine="strips",
        tokens=n,
        needed=sum(run.width * (run.hi - run.lo) for run in runs),
        read=runs[0].width,
        computed=computed,
    )
    return y


def _uniform(x: Tensor, weights: FFNWeights, cut: SiteCut, width: int) -> Tensor:
    n = x.shape[0]
    hidden, down = _order(n, weights, tracked=_is_tracked(x, weights))
    h = hidden(x, weights, width)
    y = compensated(down(h, weights), h, cut)
    cut.record(engine="strips", tokens=n, needed=n * width, read=width, computed=n * width)
    return y


def _is_tracked(x: Tensor, weights: FFNWeights) -> bool:
    """Whether the call must keep to operations that autograd and tensor subclasses know."""
    tensors = [tensor for tensor in (weights.gate, weights.up, weights.down) if tensor is not None]
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *tensors))


def _pave(weights: FFNWeights, cut: SiteCut, runs: tuple[Run, ...], *, in_groups: bool) -> Paving:
    """The paving of this batch, made once per plan, set of widths and kind of FFN."""
    table, planner_class = cost_table(weights), cut.strip_planner or PythonStripPlanner

    def make() -> Paving:
        ends = [(run.width, run.hi) for run in runs]
        strips = table.planner("hidden" if in_groups else "whole", planner_class).strips(ends)
        groups = table.planner("down", planner_class).groups(_tiled(ends)) if in_groups else ()
        return Paving(runs, tuple(Strip(*strip) for strip in strips), tuple(RowGroup(*group) for group in groups))

    return cut.plan.remember((table, planner_class, in_groups, runs), make)


def _tiled(ends: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ends with rows rounded up to whole tiles: a kernel computes the rest of its last tile anyway."""
    last = max((row for width, row in ends if width > 0), default=0)
    tiled: list[tuple[int, int]] = []
    for width, row in ends:
        row = min(-(-row // TILE) * TILE, last)
        if width > 0 and (not tiled or row > tiled[-1][1]):  # else the wider run before it has these rows too
            tiled.append((width, row))
    return tiled


def _computed(weights: FFNWeights, paving: Paving) -> int:
    """Unit x token products spent; of matrices that ran in different pieces the mean, rounded up."""
    in_strips = sum((strip.hi - strip.lo) * strip.tokens for strip in paving.strips)
    if not paving.groups:
        return in_strips
    matrices = weights.matrices
    in_groups = sum((group.hi - group.lo) * group.width for group in paving.groups)
    return -(-((matrices - 1) * in_strips + in_groups) // matrices)


def _at_once(x: Tensor, weights: FFNWeights, cut: SiteCut, width: int, *, tracked: bool) -> Tensor:
    """One strip for few tokens: zeroing what each of them does not use costs less than moving rows."""
    hidden, down = _order(x.shape[0], weights, tracked=tracked)
    h = hidden(x, weights, width)
    if x.device.type == "cpu" and not tracked:
        widths = level_widths(cut, weights.intermediate_size)
        for token, level in enumerate(cut.plan.levels.tolist()):
            h[token, widths[level] :] = 0
    else:
        used = used_units(cut, weights.intermediate_size, width, None, x.device)
        h = torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))
    return compensated(down(h, weights), h, cut)


def _order(tokens: int, weights: FFNWeights, *, tracked: bool) -> tuple[Hidden, Down]:
    """The halves of an FFN whose tokens all run as wide as the widest, in the quicker order."""
    if not tracked and by_columns(tokens, weights):
        return hidden_by_columns, down_by_columns
    return hidden_by_rows, down_by_rows


def _in_strips(rows: Tensor, weights: FFNWeights, cut: SiteCut, paving: Paving) -> Tensor:
    """All matrices by strips; sorted rows [n, d] -> [n, d], all but the compensation's bias."""
    y = rows.new_zeros(rows.shape[0], weights.down.shape[0])
    if weights.down_bias is not None:
        y += weights.down_bias
    maps = _LowRankMaps(cut, y)
    for strip in paving.strips:
        h = weights.hidden(rows[: strip.tokens], strip.lo, strip.hi)
        if strip.whole < strip.tokens:
            for run in paving.runs:
                if strip.lo < run.width < strip.hi:
                    h[run.lo : run.hi, run.width - strip.lo :] = 0
        y[: strip.tokens].addmm_(h, weights.down[:, strip.lo : strip.hi].T)
        maps.gather(h, strip.lo, strip.hi)
    return maps.add_to(y)


def _in_groups(rows: Tensor, weights: FFNWeights, cut: SiteCut, paving: Paving) -> Tensor:
    """Gate and up by strips, down by row groups; as `_in_strips`."""
    units = rows.new_empty(paving.strips[-1].hi, paving.rows)
    for lo, hi, tokens, _ in paving.strips:
        fill_units(units[lo:hi, :tokens], rows[:tokens], weights, lo, hi)
    columns = rows.new_empty(weights.down.shape[0], rows.shape[0])
    for first, last, width in paving.groups:
        for run in paving.runs:
            lo, hi = max(run.lo, first), min(run.hi, last)
            if lo < hi and run.width < width:
                units[run.width : width, lo:hi] = 0
        fill_outputs(columns[:, first:last], units[:width, first:last], weights)
    y = columns.T.contiguous()
    y[paving.rows :] = 0 if weights.down_bias is None else weights.down_bias
    maps = _LowRankMaps(cut, y)
    maps.gather(units.T, 0, paving.strips[-1].hi)
    return maps.add_to(y)


def _tracked(rows: Tensor, weights: FFNWeights, cut: SiteCut, paving: Paving) -> Tensor:
    """As `_in_strips`, by operations that autograd can follow; a low precision gives [n, d] in float32."""
    dtype = rows.dtype if accumulates(rows.dtype) else torch.float32
    y = torch.zeros(rows.shape[0], weights.down.shape[0], dtype=dtype, device=rows.device)
    maps = _LowRankMaps(cut, rows)
    for strip in paving.strips:
        h = weights.hidden(rows[: strip.tokens], strip.lo, strip.hi)
        if strip.whole < strip.tokens:
            ends = [(run.hi - run.lo, run.width) for run in paving.runs if run.hi <= strip.tokens]
            widths = torch.cat([torch.full((count,), width, device=rows.device) for count, width in ends])
            used = torch.arange(strip.lo, strip.hi, device=rows.device)[None, :] < widths[:, None]
            h = torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))
        y[: strip.tokens] += functional.linear(h, weights.down[:, strip.lo : strip.hi])
        maps.gather(h, strip.lo, strip.hi)
    y = maps.add_to(y)
    return y if weights.down_bias is None else y + weights.down_bias


class _LowRankMaps:
    """``U (V h)`` of each level that has such a map, gathered piece by piece; rows of one level lie together."""

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
        """Take up units lo_unit..hi_unit of the first rows: ``h`` [tokens, hi_unit - lo_unit]."""
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
