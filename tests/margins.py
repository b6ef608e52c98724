"""How far the decisions of a cut decoder are from turning over by rounding, and inputs where they are far enough.

Two processes that sum in another order give hidden states that differ in their last bits, and three decisions are
discrete: a token's level, the int8 codes that the shadow reads (one code that moves from 35 to 36 moves the importance
of every unit), and which importances reach their minimum. Inputs that keep away from all three edges let a test demand
equal decisions, instead of forgiving some.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sedac_hf.ops.low_bit import int8_rows

MOST_DRAWS = 4000


class Margins(NamedTuple):
    """The least distance of any decision of a forward pass to where it would turn over.

    ratio: of a ratio to the edge of a level; code: of ``x / scale`` to the middle between two int8 codes; importance:
    of an importance to its token's ``importance_min``. The last two count at tokens that choose their units.
    """

    ratio: float
    code: float
    importance: float

    def reach(self, needed: Margins) -> bool:
        """Whether every distance is at least the needed one."""
        return all(mine >= other for mine, other in zip(self, needed, strict=True))


# Twice the most that rounding did between one process and two ranks, over 7600 random tokens of tiny decoders in
# float32: a ratio moved by 3.1e-6, x / scale by 2.5e-4 and, where all codes were the same, an importance by 6.7e-6.
NEEDED = Margins(ratio=7e-6, code=5e-4, importance=1.4e-5)
# Rows are tried one by one; the batch that they make is summed in yet another order.
_SOUGHT = Margins(ratio=1e-5, code=7e-4, importance=2e-5)


class Decisions(NamedTuple):
    """What a forward pass decided, and by how much.

    used: per FFN bool [n, units], the units that each token uses, in the order in which this process holds them.
    """

    used: list[Tensor]
    margins: Margins


@torch.no_grad()
def decisions(model: Any, **inputs: Tensor) -> Decisions:
    """The decisions of one forward pass of a wrapped decoder whose policy selects by shadows.

    inputs: of at least 5 tokens, so that what runs is no kernel with a shadow of its own.
    """
    runtime = model.runtime
    points = runtime.running_policy.schedule.points
    xs: dict[int, Tensor] = {}
    levels: dict[int, Tensor] = {}
    ratios: list[Tensor] = []

    def decided(idx: int, ratio: Any, level: Any) -> None:
        levels[idx] = torch.from_numpy(level).long()
        ratios.append(torch.from_numpy(ratio))

    with runtime.observe(on_ffn=lambda i, x, _: xs.__setitem__(i, x.clone()), on_decision=decided):
        model(**inputs)
    n_levels = len(points[0]) - 1
    edges = torch.arange(1, n_levels) / n_levels
    ratio = float((torch.cat(ratios)[:, None] - edges).abs().min())
    used, code, margin = [], float("inf"), float("inf")
    for i, segment in enumerate(runtime.segments):
        x, shadow = xs[i], runtime.weights.shadows[i]
        level = levels[segment] if segment >= 0 else torch.ones(len(x), dtype=torch.long)
        width = torch.tensor([0, *(point.width for point in points[i][1:])])[level][:, None]
        least = torch.tensor([point.importance_min for point in points[i]])[level][:, None]
        importance = shadow.importance(x)
        used.append((torch.arange(importance.shape[1]) < width) & (importance >= least))
        chooses = (least > 0).squeeze(1)
        if chooses.any():
            exact = (x / int8_rows(x).scale)[chooses]
            code = min(code, float((exact - exact.floor() - 0.5).abs().min()))
            margin = min(margin, float((importance - least).abs()[chooses].min()))
    return Decisions(used, Margins(ratio, code, margin))


def steady_rows(draw: Callable[[torch.Generator], Tensor], decide: Callable[[Tensor], Decisions], rows: int) -> Tensor:
    """[rows, ...]: the first rows [1, ...] drawn whose decisions keep their distance.

    Args:
        draw: gives a row for a seeded generator.
        decide: runs the decoder on a row.
    """
    found: list[Tensor] = []
    for seed in range(MOST_DRAWS):
        row = draw(torch.Generator().manual_seed(seed))
        if decide(row).margins.reach(_SOUGHT):
            found.append(row)
            if len(found) == rows:
                return torch.cat(found)
    raise AssertionError(f"only {len(found)} of {MOST_DRAWS} rows keep a distance of {_SOUGHT}, not {rows}")
