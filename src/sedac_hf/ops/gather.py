"""The gather engine for `select` at one row: exact rows are read for the chosen units only, in plain torch.

Gate and up rows are copied by `index_select`, a piece at a time, and multiplied; where more than a third of them are
chosen, copying costs more than it saves and all rows up to the width are multiplied. Down's chosen columns go through
`embedding_bag`, torch's fused gather-and-sum, where they are contiguous (a Conv1D, or a Linear laid out transposed).
An ordinary Linear has them strided, and there reading whole rows costs less than picking every few elements, so down
runs over all units up to the width with zeros in between. No second copy of a weight is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.tokens import compensated, level_widths

_LARGEST_COPIED_SHARE = 1 / 3
_PIECE_BYTES = 1 << 20  # rows copied at a time; smaller pieces cost more in calls than they save


def gather_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN of one token: x [1, d] -> [1, d]. The token's level must be one that chooses by importance."""
    level = int(cut.plan.levels[0])
    point, width = cut.points[level], level_widths(cut, weights.intermediate_size)[level]
    if cut.importance is None:
        chosen = torch.arange(width, device=x.device)
    else:
        least = torch.tensor(point.importance_min, dtype=torch.float32, device=x.device)
        chosen = (~(cut.importance(x)[0, :width] < least)).nonzero().squeeze(1)
    count = chosen.shape[0]
    copies = count <= width * _LARGEST_COPIED_SHARE
    h = chosen_hidden(x, weights, chosen) if copies else weights.hidden(x, 0, width).index_select(1, chosen)
    spread = x.new_zeros(1, width).index_copy(1, chosen, h)
    if columns_are_contiguous(weights.down):
        start = torch.zeros(1, dtype=torch.int64, device=x.device)
        y = functional.embedding_bag(chosen, weights.down.T, start, mode="sum", per_sample_weights=h[0])
        y = y if weights.down_bias is None else y + weights.down_bias
        read_down = count
    else:
        y = functional.linear(spread, weights.down[:, :width], weights.down_bias)
        read_down = width
    y = compensated(y, spread, cut)
    matrices = weights.matrices
    # More may have been read than was chosen, of some matrices: reported as whole units, rounded up.
    read = -(-((matrices - 1) * (count if copies else width) + read_down) // matrices)
    cut.record(engine="gather", tokens=1, needed=count, read=read, computed=read)
    return y


def chosen_hidden(x: Tensor, weights: FFNWeights, chosen: Tensor) -> Tensor:
    """Hidden units ``chosen`` (int64 [m]) for x [1, d] -> [1, m]."""

    def rows(weight: Tensor, bias: Tensor | None) -> Tensor:
        # Copied rows are multiplied while they are still in the cache: one read of memory instead of two and a write.
        step = max(1, _PIECE_BYTES // max(1, weight.shape[1] * weight.element_size()))
        parts = [functional.linear(x, weight.index_select(0, piece)) for piece in chosen.split(step)]
        z = torch.cat(parts, dim=-1)
        return z if bias is None else z + bias[chosen]

    up = rows(weights.up, weights.up_bias)
    if weights.gate is None:
        return weights.activation(up)
    return weights.activation(rows(weights.gate, weights.gate_bias)) * up


def columns_are_contiguous(down: Tensor) -> bool:
    """Whether a unit's column of down [d, f] is one run of memory, as `embedding_bag` needs it."""
    return down.stride(0) == 1 and down.stride(1) >= down.shape[0]
