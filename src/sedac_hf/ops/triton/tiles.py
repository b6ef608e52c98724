"""Parts that the Triton kernels of cut FFNs share: activations, products, one tile of hidden units.

In all of them the weights are the left operand (units or outputs x inputs) and tokens the columns of the right one: at
few tokens the tensor cores then get their height from the weights, and the columns of a product are independent, so
a token's bits do not depend on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NUMBER_OF_TOKENS = ("n",)
"""The argument of kernels that changes from call to call: no variants of a kernel are compiled for its values."""


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """`activations.KNOWN[ACTIVATION]` of float32 z; a NaN stays one."""
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif ACTIVATION == "quick_gelu":
        return z * tl.sigmoid(1.702 * z)
    elif ACTIVATION == "relu":
        return tl.where(z < 0.0, 0.0, z)
    else:
        tl.static_assert(ACTIVATION == "relu_squared")
        return tl.where(z < 0.0, 0.0, z * z)


INTERPRETED = tl.constexpr(not isinstance(activated, triton.runtime.jit.JITFunction))
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run as Python, on CPU tensors."""

INLINE_PTX = tl.constexpr(not INTERPRETED.value and torch.version.hip is None)
"""Whether NVIDIA's instructions can be written out."""


@triton.jit
def plus_product(a, b, total):
    """``total + a @ b`` in float32; float32 operands are not rounded to tf32."""
    if INTERPRETED:  # its product of bfloat16 multiplies the raw bits (triton 3.9)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tile_widths(WIDTHS, token, n, f):
    """Widths of a tile's tokens, clipped to 0..f; 0 for rows beyond the last token."""
    widths = tl.load(WIDTHS + token, mask=token < n, other=0)
    return tl.minimum(tl.maximum(widths, 0), f)


@triton.jit
def hidden_tile(
    X, GATE, UP, GATE_BIAS, UP_BIAS, H, used, read, unit, token, n, d, f,
    x_token, gate_unit, gate_input, up_unit, up_input, h_token,
    ACTIVATION: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Hidden units [units, tokens] of one tile, written to H [n, f] with zeros where ``used`` is false.

    Returns what was written. Weights of units that are not in ``read`` are not loaded; ``read`` must cover ``used``.
    """
    UNITS: tl.constexpr = used.shape[0]
    TOKENS: tl.constexpr = used.shape[1]
    exists = token < n
    x_rows = X + token.to(tl.int64)[None, :] * x_token
    up_rows = UP + unit.to(tl.int64)[:, None] * up_unit
    if GATE is not None:
        gate_rows = GATE + unit.to(tl.int64)[:, None] * gate_unit
    up_sum = tl.zeros((UNITS, TOKENS), tl.float32)
    gate_sum = tl.zeros((UNITS, TOKENS), tl.float32)
    for start in range(0, d, INPUTS):
        i = start + tl.arange(0, INPUTS)
        inside = i < d
        x = tl.load(x_rows + i[:, None], mask=inside[:, None] & exists[None, :], other=0.0)
        weights = read[:, None] & inside[None, :]
        up_sum = plus_product(tl.load(up_rows + i[None, :] * up_input, mask=weights, other=0.0), x, up_sum)
        if GATE is not None:
            gate_sum = plus_product(tl.load(gate_rows + i[None, :] * gate_input, mask=weights, other=0.0), x, gate_sum)
    if UP_BIAS is not None:
        up_sum += tl.load(UP_BIAS + unit, mask=unit < f, other=0.0).to(tl.float32)[:, None]
    if GATE is not None:
        if GATE_BIAS is not None:
            gate_sum += tl.load(GATE_BIAS + unit, mask=unit < f, other=0.0).to(tl.float32)[:, None]
        h = activated(gate_sum, ACTIVATION) * up_sum
    else:
        h = activated(up_sum, ACTIVATION)
    # By selection, not by a product with 0: an inf or NaN of an unused unit must not get through.
    h = tl.where(used, h, 0.0).to(H.dtype.element_ty)
    cells = H + token.to(tl.int64)[None, :] * h_token + unit[:, None]
    tl.store(cells, h, mask=(unit < f)[:, None] & exists[None, :])
    return h
