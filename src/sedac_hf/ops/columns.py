"""A cut FFN's products with one column per token: ``weight @ x.T``, for low-precision weights and 16 tokens or more.

The usual order, ``x @ weight.T``, makes oneDNN repack the weight at each call; this one makes it repack the tokens,
which are few. A bfloat16 FFN of 896 x 4864 took 0.88 of the usual time at 64 tokens, 0.94 at 128 and 1.00 at 512
(weights not in the cache, one thread of an AVX-512 machine with bfloat16 products), 1.3 at 4: hence the 16, which is
also the kernels' tile of tokens. float32 gains nothing. On a GPU the two orders are alike by construction; unmeasured.

Where oneDNN has no products of the type (bfloat16 on an AVX2 machine), torch's own come in, and are slow: 0.22 s for
down of that FFN at 512 tokens (float32: 0.03 s), and 6 s in this order (timed by hand). There the usual one is kept.

Shapes: units [k, n], one row per hidden unit; everything of one dtype, each product rounded once.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops.contract import FFNWeights

TILE = 16
"""Kernels compute this many tokens at once; the rest of the last tile is computed and dropped."""


def fill_units(units: Tensor, x: Tensor, weights: FFNWeights, lo: int, hi: int) -> None:
    """Write hidden units lo..hi for x [n, d] to ``units`` [hi - lo, n], of any strides. Not under autograd."""
    if x.shape[0] < TILE or not _has_products(x.device.type, x.dtype):
        units.copy_(weights.hidden(x, lo, hi).T)
        return
    up = _product(weights.up[lo:hi], x.T, None if weights.up_bias is None else weights.up_bias[lo:hi])
    if weights.gate is None:
        units.copy_(weights.activation(up))
        return
    gate = _product(weights.gate[lo:hi], x.T, None if weights.gate_bias is None else weights.gate_bias[lo:hi])
    torch.mul(weights.activation(gate), up, out=units)


def fill_outputs(outputs: Tensor, units: Tensor, weights: FFNWeights) -> None:
    """Write down's output for the first k ``units`` [k, n] to ``outputs`` [d, n]; as `fill_units`."""
    columns, bias = weights.down[:, : units.shape[0]], weights.down_bias
    if units.shape[1] < TILE or not _has_products(units.device.type, units.dtype):
        outputs.copy_(functional.linear(units.T.contiguous(), columns, bias).T)
    elif bias is None:
        torch.mm(columns, units, out=outputs)
    else:
        torch.addmm(bias[:, None], columns, units, out=outputs)


@cache
def _has_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of a low precision here."""
    if device_type != "cpu":
        return True
    mkldnn = torch.ops.mkldnn
    return bool(mkldnn._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else mkldnn._is_mkldnn_fp16_supported())


def _product(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
