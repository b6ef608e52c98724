"""The masking engine: computes every unit, zeroes those that a token does not use. It defines the result.

    h = act(gate x) * up x          (plain: act(up x))
    y = down(h * used) + down_bias + compensation

``used`` holds the first ``width`` units of the channel order whose importance is at least ``importance_min``. Works
for any mixture of levels, any dtype, under autograd; saves nothing but the units beyond the widest token when told to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.tokens import compensated, units_by_width, used_units, widest


def reference_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by masking: x [n, d] -> [n, d] in x's dtype, all units computed."""
    return masked_ffn(x, weights, cut, weights.intermediate_size, engine="reference")


def bounded_reference_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The same, but the units that are beyond the width of every token are neither read nor computed."""
    return masked_ffn(x, weights, cut, widest(cut, weights.intermediate_size), engine="masked")


def masked_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut, hi: int, *, engine: str) -> Tensor:
    """The cut FFN over units 0..hi, which must cover the widest token; reports itself as ``engine``."""
    n, f = x.shape[0], weights.intermediate_size
    importance = cut.importance(x) if cut.chooses and cut.importance is not None else None
    used = used_units(cut, f, hi, importance, x.device)
    h = weights.hidden(x, 0, hi)
    # A product with 0 would let an inf or NaN of an unused unit through.
    h = torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))
    y = compensated(torch.nn.functional.linear(h, weights.down[:, :hi], weights.down_bias), h, cut)
    needed = units_by_width(cut, f) if importance is None else used.sum()
    cut.record(engine=engine, tokens=n, needed=needed, read=hi, computed=n * hi)
    return y
