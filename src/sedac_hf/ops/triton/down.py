"""The down projection of cut FFNs: hidden units, zeros where unused, to outputs.

    y[t] = sum over units j < width[t] of h[t, j] * down[:, j]  + down_bias

Units are shared out over splits: split s takes the steps s, s + splits, s + 2 splits, ... below the widest token of
the tile, so that all splits stay busy at every width. Their float32 sums go to a buffer and a second kernel adds them
in the order of the splits: no atomics, the same bits every time. A step is read whole, so h must hold zeros up to the
end of the step in which its tile's widest token ends (the hidden kernels write them); beyond it h is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sedac_hf.ops.triton.launch import Launch, options
from sedac_hf.ops.triton.tiles import NUMBER_OF_TOKENS, plus_product, tile_widths

_ADDED_OUTPUTS = 512  # outputs that one program of the second kernel adds


@triton.jit
def covered_units(widths, DOWN_UNITS: tl.constexpr):
    """Units that `down_tiles` reads of h for a tile of tokens with these widths: whole steps."""
    return tl.cdiv(tl.max(widths, 0), DOWN_UNITS) * DOWN_UNITS


@triton.jit(do_not_specialize=NUMBER_OF_TOKENS)
def down_tiles(
    H, DOWN, DOWN_BIAS, WIDTHS, ALIVE, SUMS, Y, n, outputs, f, h_token, down_output, down_unit, y_token,
    UNITS_ADJACENT: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, DOWN_UNITS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Program (output tile, split, token tile). ALIVE int8 [f] or None: units whose column is to be read at all."""
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    widths = tile_widths(WIDTHS, token, n, f)
    widest = tl.max(widths, 0)
    steps = tl.cdiv(widest, DOWN_UNITS)
    if split < tl.maximum(tl.minimum(steps, SPLITS), 1):
        total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
        h_rows = H + token.to(tl.int64)[None, :] * h_token
        down_rows = DOWN + output.to(tl.int64)[:, None] * down_output
        for step in range(split, steps, SPLITS):
            unit = step * DOWN_UNITS + tl.arange(0, DOWN_UNITS)
            h = tl.load(h_rows + unit[:, None], mask=(unit < f)[:, None] & (token < n)[None, :], other=0.0)
            if UNITS_ADJACENT:
                # A bound that is no multiple of 16 along adjacent elements would forbid 16-byte loads; h is 0 beyond.
                read = unit < f
            elif ALIVE is not None:
                read = tl.load(ALIVE + unit, mask=unit < f, other=0) != 0
            else:
                read = unit < widest
            cells = down_rows + unit.to(tl.int64)[None, :] * down_unit
            weights = tl.load(cells, mask=(output < outputs)[:, None] & read[None, :], other=0.0)
            total = plus_product(weights, h, total)
        inside = (output < outputs)[:, None] & (token < n)[None, :]
        if SPLITS == 1:
            if DOWN_BIAS is not None:
                total += tl.load(DOWN_BIAS + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
            cells = Y + token.to(tl.int64)[None, :] * y_token + output[:, None]
            tl.store(cells, total.to(Y.dtype.element_ty), mask=inside)
        else:
            row = split.to(tl.int64) * n + token
            tl.store(SUMS + row[None, :] * outputs + output[:, None], total, mask=inside)


@triton.jit(do_not_specialize=NUMBER_OF_TOKENS)
def add_splits(
    SUMS, DOWN_BIAS, WIDTHS, Y, n, outputs, f, y_token,
    DOWN_UNITS: tl.constexpr, SPLITS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Program (token, output tile): the sums of the splits that have units of this token, in their order."""
    token = tl.program_id(0)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    width = tl.minimum(tl.maximum(tl.load(WIDTHS + token), 0), f)
    total = tl.zeros((OUTPUTS,), tl.float32)
    for split in range(0, tl.minimum(tl.cdiv(width, DOWN_UNITS), SPLITS)):
        row = token.to(tl.int64) + split * n
        total += tl.load(SUMS + row * outputs + output, mask=output < outputs, other=0.0)
    if DOWN_BIAS is not None:
        total += tl.load(DOWN_BIAS + output, mask=output < outputs, other=0.0).to(tl.float32)
    tl.store(Y + token.to(tl.int64) * y_token + output, total.to(Y.dtype.element_ty), mask=output < outputs)


def project_down(
    h: Tensor, widths: Tensor, alive: Tensor | None, down: Tensor, down_bias: Tensor | None, launch: Launch
) -> Tensor:
    """h [n, f] -> [n, outputs] in h's dtype; widths int32 [n]; down [outputs, f], any strides."""
    n, f = h.shape
    outputs = down.shape[0]
    y = h.new_empty(n, outputs)
    # In the graph's own pool during a capture, as every buffer here: it comes from torch.
    sums = None if launch.splits == 1 else h.new_empty(launch.splits, n, outputs, dtype=torch.float32)
    grid = (triton.cdiv(outputs, launch.outputs), launch.splits, triton.cdiv(n, launch.tokens))
    down_tiles[grid](
        h, down, down_bias, widths, alive, sums, y, n, outputs, f, h.stride(0), down.stride(0), down.stride(1),
        y.stride(0),
        UNITS_ADJACENT=down.stride(1) == 1, TOKENS=launch.tokens, OUTPUTS=launch.outputs, DOWN_UNITS=launch.down_units,
        SPLITS=launch.splits, **options(launch.down_warps, launch.down_stages),
    )  # fmt: skip
    if sums is not None:
        add_splits[(n, triton.cdiv(outputs, _ADDED_OUTPUTS))](
            sums, down_bias, widths, y, n, outputs, f, y.stride(0),
            DOWN_UNITS=launch.down_units, SPLITS=launch.splits, OUTPUTS=_ADDED_OUTPUTS, **options(4, 1),
        )  # fmt: skip
    return y
