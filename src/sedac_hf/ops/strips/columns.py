"""Products with one column per token, ``weight @ x.T``, for low-precision weights.

The usual order, ``x @ weight.T``, makes oneDNN repack the weight at each call; this one makes it repack the tokens,
which are few. A bfloat16 FFN of 896 x 4864 took 0.88 of the usual time at 64 tokens, 0.94 at 128 and 1.00 at 512
(weights not in the cache, one thread of an AVX-512 machine with bfloat16 products), 1.3 at 4; with AMX, two threads,
0.89 at 5, 0.68 at 64 and 128, 0.79 at 256, on Zen 4 1.22, 0.86, 0.97 and 0.99 (`benchmarks/layout.py`): whoever can
choose measures. float32 gains nothing. On a GPU the two orders are alike by construction; unmeasured.

Down's product of more than some 300 tokens takes oneDNN twice the usual time in this order (with AMX; 512 tokens,
4864 units, timed by hand), and in pieces of 256 tokens less than the usual time: so pieces it is.

Where oneDNN has no products of the type (`sedac_hf.ops.onednn`) torch's own are slow, and slower still in this order:
6 s for down of that FFN at 512 tokens, 0.22 s in the usual one, which is kept there (AVX2, bfloat16, timed by hand).

Shapes: units [k, n], one row per hidden unit; everything of one dtype, each product rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops import onednn
from sedac_hf.ops.contract import FFNWeights

TILE = 16
"""Kernels compute this many tokens at once; the rest of the last tile is computed and dropped."""

PIECE = 256
"""Most tokens of one product of down on a CPU."""

LEAST_TOKENS, MOST_TOKENS = 5, 512
"""Tokens of an FFN of one width for which this order was seen to be the quicker one on some machine: with fewer the
compiled kernels are."""


def may_pay(tokens: int, weight: Tensor) -> bool:
    """Whether this order may be the quicker one for an FFN with such weights, of one width for so many tokens."""
    low = weight.dtype in onednn.LOW_PRECISION
    in_range = LEAST_TOKENS <= tokens <= MOST_TOKENS
    return in_range and low and weight.device.type == "cpu" and onednn.has_products(weight.dtype)


def hidden_by_columns(x: Tensor, weights: FFNWeights, width: int) -> Tensor:
    """Values [n, width] of the first units for x [n, d], one column of memory per unit. Not under autograd."""
    return _units(x.T, weights, 0, width, out=None).T


def down_by_columns(h: Tensor, weights: FFNWeights) -> Tensor:
    """Down's output [n, d], contiguous, for what `hidden_by_columns` gave. Not under autograd."""
    if weights.down.stride(0) == 1:  # by units: the usual order takes these as quickly as any
        return functional.linear(h, weights.down[:, : h.shape[1]], weights.down_bias)
    outputs = h.new_empty(weights.down.shape[0], h.shape[0])
    _outputs(h.T, weights, out=outputs)
    return outputs.T.contiguous()


def fill_units(units: Tensor, x: Tensor, weights: FFNWeights, lo: int, hi: int) -> None:
    """Write hidden units lo..hi for x [n, d] to ``units`` [hi - lo, n], of any strides. Not under autograd."""
    if x.shape[0] < TILE or not _has_products(x):
        units.copy_(weights.hidden(x, lo, hi).T)
        return
    _units(x.T, weights, lo, hi, out=units)


def fill_outputs(outputs: Tensor, units: Tensor, weights: FFNWeights) -> None:
    """Write down's output for the first k ``units`` [k, n] to ``outputs`` [d, n]; as `fill_units`."""
    if units.shape[1] < TILE or not _has_products(units):
        columns = weights.down[:, : units.shape[0]]
        outputs.copy_(functional.linear(units.T.contiguous(), columns, weights.down_bias).T)
        return
    _outputs(units, weights, out=outputs)


def _units(columns: Tensor, weights: FFNWeights, lo: int, hi: int, *, out: Tensor | None) -> Tensor:
    """Hidden units lo..hi for the tokens in ``columns`` [d, n]."""
    up = _product(weights.up[lo:hi], columns, None if weights.up_bias is None else weights.up_bias[lo:hi])
    if weights.gate is None:
        units = weights.activation(up)
        return units if out is None else out.copy_(units)
    gate = _product(weights.gate[lo:hi], columns, None if weights.gate_bias is None else weights.gate_bias[lo:hi])
    return torch.mul(weights.activation(gate), up, out=out)


def _outputs(units: Tensor, weights: FFNWeights, *, out: Tensor) -> None:
    columns, bias = weights.down[:, : units.shape[0]], weights.down_bias
    piece = PIECE if units.device.type == "cpu" else units.shape[1]
    for some, given in zip(out.split(piece, 1), units.split(piece, 1), strict=True):
        if bias is None:
            torch.mm(columns, given, out=some)
        else:
            torch.addmm(bias[:, None], columns, given, out=some)


def _has_products(x: Tensor) -> bool:
    return x.device.type != "cpu" or onednn.has_products(x.dtype)


def _product(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
