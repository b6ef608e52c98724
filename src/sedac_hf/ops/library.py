"""Cut FFNs as PyTorch operators: what `torch.compile(fullgraph=True)` and CUDA graphs take whole.

    sedac_hf::truncated_ffn    units up to each token's width
    sedac_hf::selected_ffn     of those, the units whose importance for this token, by the 4-bit shadow, is enough
    sedac_hf::linear           a linear map; for graphs on a CPU, whose few rows the compiled kernel runs

How much a token computes is data on the device (``widths``, ``importance_min``), never a shape and never a number on
the host, so nothing is recompiled or recaptured when it changes. Devices: CUDA runs the Triton kernels (`selected_ffn`
up to `triton.launch.MOST_SELECTING_ROWS` rows, where choosing saves anything, and with a shadow that is not
interleaved); a CPU runs up to `compiled.MAX_ROWS` rows by the compiled kernel that ``kernel`` names (see
`Handle`); all else computes every unit in plain torch and zeroes what is not used. All give the same function.

Shapes, for n tokens, d inputs, f units: x [n, d]; widths int32 [n], clipped to 0..f; importance_min float32 [n];
gate and up [f, d], down [d, f], any strides; biases [f], [f], [d]. Of the shadow: codes and scales as `LowBitMatrix`
holds them for 4 bits, deciding_bias and unit_norm float32 [f]. ``activation`` is a name in `activations.KNOWN`,
``kernel`` a `Handle`'s number or 0. The result is [n, d] in x's dtype, which is the weights'. Of `linear`: x [..., d],
weight [outputs, d], bias [outputs]; the result is [..., outputs]. No gradient is defined: training runs the masking
engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.compiled import wants_gradient
from sedac_hf.ops.contract import FFNWeights, OperatingPoint, ShadowTables
from sedac_hf.ops.low_bit import LowBitMatrix, importance
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS

# What follows in both; functions below take it as ``*ffn``.
_FFN = (
    "Tensor? gate, Tensor up, Tensor down, Tensor? gate_bias, Tensor? up_bias, Tensor? down_bias, str activation, "
    "int kernel) -> Tensor"
)
_TRUNCATED = f"(Tensor x, Tensor widths, {_FFN}"
_SELECTED = (
    "(Tensor x, Tensor widths, Tensor importance_min, Tensor codes, Tensor scales, Tensor? deciding_bias, "
    f"Tensor unit_norm, {_FFN}"
)
_LINEAR = "(Tensor x, Tensor weight, Tensor? bias, int kernel) -> Tensor"


class Handle:
    """The number by which graphs name a kernel of the host: they can hold no object.

    Args:
        kernel: of an FFN: gives the kernel on the weights as they lie now, or None; of a linear map: runs it on x,
            weight and bias, or gives None. Kept no longer than this object.
    """

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel = kernel
        self.number = next(_numbers)
        _handles[self.number] = self


_numbers = itertools.count(1)
_handles: WeakValueDictionary[int, Handle] = WeakValueDictionary()


def _by_kernel(x: Tensor, widths: Tensor, importance_min: Tensor | None, up: Tensor, number: int) -> Tensor | None:
    """The FFN by its compiled kernel; None where there is none for this call."""
    handle = _handles.get(number)
    kernel = None if handle is None else handle.kernel()
    if (
        not isinstance(kernel, CpuFFN)
        or kernel.weights.up.data_ptr() != up.data_ptr()
        or x.dim() != 2
        or not kernel.accepts(x)
    ):
        return None
    if importance_min is None:
        points = [OperatingPoint(max(width, 0)) for width in widths.tolist()]
    elif kernel.selects:
        least = importance_min.tolist()
        points = [OperatingPoint(max(width, 0), value) for width, value in zip(widths.tolist(), least, strict=True)]
    else:
        return None
    return kernel.run_accepted(x, points, kernel_threads())[0]


def _truncated(x: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, *ffn: Any) -> Tensor:
    # A decode step comes here once per FFN: nothing in front of the kernel.
    y = _by_kernel(x, widths, None, up, ffn[-1])
    if y is not None:
        return y
    weights = _weights(x, gate, up, *ffn)
    return _masked(x, weights, _below(widths, weights.intermediate_size))


def _selected(
    x: Tensor,
    widths: Tensor,
    importance_min: Tensor,
    codes: Tensor,
    scales: Tensor,
    deciding_bias: Tensor | None,
    unit_norm: Tensor,
    gate: Tensor | None,
    up: Tensor,
    *ffn: Any,
) -> Tensor:
    y = _by_kernel(x, widths, importance_min, up, ffn[-1])
    if y is not None:
        return y
    weights = _weights(x, gate, up, *ffn)
    sizes = (weights.hidden_size, 4, weights.intermediate_size)
    deciding = LowBitMatrix(codes, scales, *sizes, interleaved=codes.dim() == 5)
    worth = importance(x, deciding, deciding_bias, unit_norm, weights.activation)
    # Written so that a NaN keeps its unit: a token that is already broken must not look healthy.
    used = _below(widths, weights.intermediate_size) & ~(worth < importance_min[:, None])
    return _masked(x, weights, used)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: int) -> Tensor:
    handle = _handles.get(kernel)
    y: Tensor | None = None if handle is None else handle.kernel(x, weight, bias)
    if y is not None:
        return y
    _need_no_gradient(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def _below(widths: Tensor, intermediate_size: int) -> Tensor:
    """bool [n, f]: the units that exist for each token."""
    return torch.arange(intermediate_size, device=widths.device)[None, :] < widths[:, None]


def _masked(x: Tensor, weights: FFNWeights, used: Tensor) -> Tensor:
    with torch.no_grad():
        h = weights.hidden(x)
        # A product with 0 would let an inf or NaN of an unused unit through.
        h = torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))
        return torch.nn.functional.linear(h, weights.down, weights.down_bias)


def _weights(
    x: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    kernel: int = 0,
) -> FFNWeights:
    if activation not in KNOWN:
        raise ConfigError(
            f"`activation` must be one of {', '.join(KNOWN)}, got {activation!r}: other functions run in the masking "
            "engine"
        )
    if x.dim() != 2 or x.dtype != up.dtype:
        raise ConfigError(
            f"x must be [tokens, hidden] in the weights' dtype {up.dtype}, got {list(x.shape)} in {x.dtype}: flatten "
            "the batch and cast x"
        )
    _need_no_gradient(x, gate, up, down, gate_bias, up_bias, down_bias)
    return FFNWeights(gate, up, down, gate_bias, up_bias, down_bias, KNOWN[activation])


def _need_no_gradient(*tensors: Tensor | None) -> None:
    if wants_gradient(*tensors):
        raise ConfigError(
            "these operators define no gradient, and x or a weight wants one: call them under `torch.no_grad()`, or "
            "train with plain forward calls, which run in engines that autograd follows"
        )


def _like_output(x: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], down.shape[0])


def triton_is_installed() -> bool:
    """Whether the operators can run on CUDA; PyTorch brings Triton along for Linux only."""
    return find_spec("triton") is not None


def _truncated_on_cuda(x: Tensor, widths: Tensor, *ffn: Any) -> Tensor:
    weights = _weights(x, *ffn)
    if x.shape[0] == 0:
        return _like_output(x, weights.down)
    _need_triton()
    # Not at the top: a machine without a GPU need not have Triton.
    from sedac_hf.ops.triton.truncate import truncated

    return truncated(x, widths, weights, ffn[-2])


def _selected_on_cuda(
    x: Tensor,
    widths: Tensor,
    importance_min: Tensor,
    codes: Tensor,
    scales: Tensor,
    deciding_bias: Tensor | None,
    unit_norm: Tensor,
    *ffn: Any,
) -> Tensor:
    shadow = (codes, scales, deciding_bias, unit_norm)
    if not 1 <= x.shape[0] <= MOST_SELECTING_ROWS or codes.dim() != 2:
        return _selected(x, widths, importance_min, *shadow, *ffn)
    weights = _weights(x, *ffn)
    _need_triton()
    from sedac_hf.ops.triton.select import selected

    return selected(x, widths, importance_min, ShadowTables(*shadow), weights, ffn[-2])


def _need_triton() -> None:
    if not triton_is_installed():
        raise ConfigError(
            "cut FFNs on CUDA inside a captured graph need Triton, which is not installed: install it, or generate "
            "without a static cache (the eager engines run in plain PyTorch)"
        )


def _like_truncated(x: Tensor, widths: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, *rest: Any) -> Tensor:
    return _like_output(x, down)


def _like_selected(
    x: Tensor,
    widths: Tensor,
    importance_min: Tensor,
    codes: Tensor,
    scales: Tensor,
    deciding_bias: Tensor | None,
    unit_norm: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    *rest: Any,
) -> Tensor:
    return _like_output(x, down)


def _like_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _operator(name: str, schema: str, fake: Callable[..., Tensor], **kernels: Callable[..., Tensor]) -> Any:
    """Register an operator with its kernels by device.

    Not by `torch.library.custom_op`: its layers in Python around a kernel add to each call of a decode step.
    """
    qualified = f"sedac_hf::{name}"
    # Weights keep their strides, which say how they lie; the first of these is there since PyTorch 2.7.
    strides = getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)
    torch.library.define(qualified, schema, tags=(strides, torch.Tag.pt2_compliant_tag))
    for device, kernel in kernels.items():
        torch.library.impl(qualified, device, kernel)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.sedac_hf, name).default


truncated_ffn = _operator("truncated_ffn", _TRUNCATED, _like_truncated, cpu=_truncated, cuda=_truncated_on_cuda)
selected_ffn = _operator("selected_ffn", _SELECTED, _like_selected, cpu=_selected, cuda=_selected_on_cuda)
linear = _operator("linear", _LINEAR, _like_linear, cpu=_linear)
