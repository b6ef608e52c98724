"""What a `SiteCut` means for the tokens of one call: widths, units in use, compensation. Shared by all engines.

Shapes: n tokens, d hidden size, f units; ``present`` walks the levels that occur, widest first, because
``LevelPlan.order`` sorts the tokens by descending level.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.ops.contract import SiteCut
from sedac_hf.ops.level_plan import LevelPlan


def level_widths(cut: SiteCut, intermediate_size: int) -> tuple[int, ...]:
    """Units that exist at each level 0..n_levels, clipped to the FFN's size; level 0 is down's bias alone, so 0."""
    return (0, *(min(max(point.width, 0), intermediate_size) for point in cut.points[1:]))


def present(plan: LevelPlan) -> tuple[tuple[int, int, int], ...]:
    """(level, lo, hi) for each level that occurs, descending: rows ``plan.order[lo:hi]`` have that level."""
    return plan.runs


def widest(cut: SiteCut, intermediate_size: int) -> int:
    """The largest width that a token of this call has; 0 for an empty call."""
    widths = level_widths(cut, intermediate_size)
    return max((widths[level] for level, _, _ in present(cut.plan)), default=0)


def units_by_width(cut: SiteCut, intermediate_size: int) -> int:
    """Sum over tokens of their widths: the units needed where importance does not choose."""
    widths = level_widths(cut, intermediate_size)
    return sum(widths[level] * (hi - lo) for level, lo, hi in present(cut.plan))


def is_whole(cut: SiteCut, intermediate_size: int) -> bool:
    """Whether every token runs the whole FFN, so that the untouched module must run."""
    level = cut.plan.uniform
    if level is None or level != cut.plan.n_levels:
        return False
    point = cut.points[level]
    return point.width >= intermediate_size and point.importance_min <= 0


def used_units(
    cut: SiteCut, intermediate_size: int, hi: int, importance: Tensor | None, device: torch.device
) -> Tensor:
    """bool [n, hi]: the units below ``hi`` that each token uses.

    importance: float32 [n, >= hi], or None where nobody chooses. A NaN importance keeps its unit: a token that is
    already broken must not look healthy because its units were cut.
    """
    levels = cut.plan.on(device)
    widths = torch.tensor(level_widths(cut, intermediate_size), device=device)[levels]
    used = torch.arange(hi, device=device)[None, :] < widths[:, None]
    if importance is not None:
        least = torch.tensor([point.importance_min for point in cut.points], dtype=torch.float32, device=device)
        # A minimum of 0 means all units; importances are never negative, so the comparison says the same.
        used &= ~(importance[:, :hi] < least[levels][:, None])
    return used


def compensated(y: Tensor, h: Tensor, cut: SiteCut) -> Tensor:
    """``y`` [n, d] plus what stands in for the units left out; ``h`` [n, k] holds the units used, zeros elsewhere.

    Rows are in call order. Level n_levels gains nothing. Out of place, so that autograd and views stay safe.
    """
    return y if cut.compensation is None else add_low_rank(add_level_bias(y, cut), h, cut)


def add_low_rank(y: Tensor, h: Tensor, cut: SiteCut) -> Tensor:
    """``y`` [n, d] plus ``U V h`` of each token's level, where it has one; see `compensated`."""
    if cut.compensation is None:
        return y
    for level, lo, hi in present(cut.plan):
        factors = None if level == cut.plan.n_levels else cut.compensation.low_rank(level, y)
        if factors is None:
            continue
        u, v = factors
        width = min(v.shape[1], h.shape[1])
        if hi - lo == cut.plan.n_tokens:
            return y + (h[:, :width] @ v[:, :width].T) @ u.T
        rows = cut.plan.on(y.device, "order")[lo:hi]
        y = y.index_add(0, rows, (h[rows, :width] @ v[:, :width].T) @ u.T)
    return y


def add_level_bias(y: Tensor, cut: SiteCut) -> Tensor:
    """``y`` [n, d] in call order plus the compensation's bias of each token's level; none at level n_levels."""
    table = None if cut.compensation is None else cut.compensation.bias(y)
    whole = int(cut.plan.at_least[cut.plan.n_levels])
    if table is None or whole == cut.plan.n_tokens:
        return y
    levels = cut.plan.on(y.device)
    if whole == 0:
        return y + table[levels]
    rows = cut.plan.on(y.device, "order")[whole:]
    return y.index_add(0, rows, table[levels[rows]])
