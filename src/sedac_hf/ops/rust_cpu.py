"""The compiled kernels on torch tensors: a cut FFN, and a plain linear map, for one to four rows on a CPU.

With few rows the time of an FFN is the time of reading its weights, so the kernels read each weight that some row uses
once, and no other. Results do not depend on the number of threads, nor a row's result on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops.activations import name_of
from sedac_hf.ops.contract import Compensation, FFNWeights, OperatingPoint, ShadowTables, SiteCut
from sedac_hf.ops.threads import kernel_threads, parallel_address
from sedac_hf.ops.tokens import compensated

try:
    from sedac_hf import _rust
except ImportError:  # the source tree without its compiled module: the engines in torch do everything
    _rust = None  # type: ignore[assignment]

MAX_ROWS = 4
"""Most rows that a kernel runs; with more, products of matrices are the better way."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if _rust is not None:
    _rust.set_openmp(parallel_address())


def available() -> bool:
    """Whether the compiled module is installed."""
    return _rust is not None


def instruction_sets() -> list[str]:
    """Names of the sets that the kernels can use here, the one in use first; none without the compiled module."""
    return [] if _rust is None else _rust.instruction_sets()


def read_memory(tensor: Tensor) -> None:
    """Read a tensor's memory on the kernels' threads, and nothing else: what their times are to be compared with.

    Args:
        tensor: contiguous, on the CPU; its bytes past the last multiple of four are left out.

    Raises:
        ValueError: another tensor (or one that starts between 32-bit words), or there is no compiled module.
    """
    if _rust is None:
        raise ValueError("reading memory takes the compiled module sedac_hf._rust, which is not installed")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() % 4:
        raise ValueError(
            "reading memory takes a contiguous CPU tensor that starts at a multiple of four bytes, got one on "
            f"{tensor.device} with strides {tensor.stride()} at {tensor.data_ptr():#x}"
        )
    _rust.read_memory(tensor.data_ptr(), tensor.numel() * tensor.element_size() // 4 * 4, kernel_threads())


class CpuFFN:
    """The kernel of one FFN, on the FFN's own memory.

    Args:
        weights: on the CPU, see `fits`; the kernel keeps the tensors, and must be made anew when they move.
        shadow: what decides, where tokens choose their units; interleaved.
    """

    engine = "rust"
    truncates = True

    def __init__(self, weights: FFNWeights, shadow: ShadowTables | None = None, *, isa: str | None = None) -> None:
        name = name_of(weights.activation)
        if name is None or not CpuFFN.fits(weights):
            raise ValueError("the kernels must be able to read the weights and know the activation; ask `fits` first")
        self.weights = weights
        self._shadow = shadow
        self.hidden_size, self.intermediate_size = weights.hidden_size, weights.intermediate_size
        self.dtype = weights.up.dtype
        self.selects = shadow is not None
        self.whole_points = [OperatingPoint(self.intermediate_size)] * MAX_ROWS
        self._most = MAX_ROWS * self.hidden_size
        by_columns = _rows_are_runs(weights.down.T)
        self._kernel = _rust.FfnKernel(
            str(weights.up.dtype).removeprefix("torch."),
            name,
            None if weights.gate is None else _placed(weights.gate),
            _placed(weights.up),
            _placed(weights.down.T if by_columns else weights.down),
            by_columns,
            (_address(weights.gate_bias), _address(weights.up_bias), _address(weights.down_bias)),
            None if shadow is None else tuple(_address(table) for table in shadow),
            isa,
        )

    @staticmethod
    def fits(weights: FFNWeights) -> bool:
        """Whether the kernels can run an FFN: CPU memory, rows (or columns of down) contiguous, a known activation."""
        tensors = [weights.up, weights.down, *(() if weights.gate is None else (weights.gate,))]
        biases = [b for b in (weights.gate_bias, weights.up_bias, weights.down_bias) if b is not None]
        return (
            _rust is not None
            and all(_is_plain(tensor, weights.up.dtype) for tensor in (*tensors, *biases))
            and all(bias.is_contiguous() for bias in biases)
            and all(_rows_are_runs(tensor) for tensor in tensors[::2])
            and (_rows_are_runs(weights.down) or _rows_are_runs(weights.down.T))
            and name_of(weights.activation) is not None
        )

    def run(
        self, x: Tensor, points: Sequence[OperatingPoint], hidden: Tensor | None = None
    ) -> tuple[Tensor, int, int]:
        """x [n, d] with one point per row -> (y [n, d], units needed over all rows, units read).

        hidden: float32 [n, f], contiguous; receives the hidden values of the units in use, zeros elsewhere.

        Raises:
            ConfigError: an argument does not fit; the kernel sees addresses alone and could not tell.
        """
        _check_input(x, self.hidden_size, self.dtype)
        if x.dim() != 2 or len(points) != x.shape[0]:
            raise ConfigError(f"one operating point per row of x {list(x.shape)} is needed, got {len(points)}")
        if hidden is not None and not (
            hidden.shape == (x.shape[0], self.intermediate_size)
            and _is_plain(hidden, torch.float32)
            and hidden.is_contiguous()
        ):
            raise ConfigError(
                f"`hidden` must be contiguous float32 [{x.shape[0]}, {self.intermediate_size}] on the CPU, got "
                f"{hidden.dtype} {list(hidden.shape)} with strides {hidden.stride()} on {hidden.device}"
            )
        return self.run_accepted(x, points, kernel_threads(), hidden)

    def run_accepted(
        self, x: Tensor, points: Sequence[OperatingPoint], threads: int, hidden: Tensor | None = None
    ) -> tuple[Tensor, int, int]:
        """`run` without its checks, for x [..., d] that `accepts` has seen, with one point per row."""
        x = x.contiguous()
        y = torch.empty_like(x)
        address = 0 if hidden is None else hidden.data_ptr()
        needed, read = self._kernel.run(x.data_ptr(), y.data_ptr(), points, threads, address)
        return y, needed, read

    def whole(self, x: Tensor) -> Tensor:
        """The whole FFN: x [n, d] -> y [n, d]."""
        return self.run(x, self.whole_points[: x.shape[0]])[0]

    def accepts(self, x: Tensor) -> bool:
        """Whether a call with x [..., d] can be run: one to four rows, the weights' dtype, no gradient."""
        # A decode step asks this for each FFN: no device or shape objects are made.
        return (
            x.dtype is self.dtype
            and x.size(-1) == self.hidden_size
            and 0 < x.numel() <= self._most
            and x.is_cpu
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weights.learns))
        )


class CpuLinear:
    """The kernel of one linear map ``x W^T + b`` on its own memory; the arguments must satisfy `fits`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, isa: str | None = None) -> None:
        self._keep = (weight, bias)
        self.dtype = weight.dtype
        self.inputs, self.outputs = weight.shape[1], weight.shape[0]
        self._most = MAX_ROWS * self.inputs
        self._outputs_like: dict[tuple[int, int, int], Tensor] = {}
        self._kernel = _rust.LinearKernel(
            str(weight.dtype).removeprefix("torch."), _placed(weight), _address(bias), isa
        )

    @staticmethod
    def fits(weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernels can run this map: CPU memory, contiguous rows."""
        return (
            _rust is not None
            and _is_plain(weight, weight.dtype)
            and weight.dim() == 2
            and _rows_are_runs(weight)
            and (bias is None or (_is_plain(bias, weight.dtype) and bias.is_contiguous()))
        )

    def run(self, x: Tensor) -> Tensor:
        """x [..., inputs] of at most `MAX_ROWS` rows in the weight's dtype -> [..., outputs].

        Raises:
            ConfigError: the input does not fit.
        """
        _check_input(x, self.inputs, self.dtype)
        return self.run_accepted(x.contiguous(), kernel_threads())

    def accepts(self, x: Tensor) -> bool:
        """Whether `run_accepted` may be called with this input: one to four rows as they must lie."""
        return (
            x.dtype is self.dtype
            and x.size(-1) == self.inputs
            and 0 < x.numel() <= self._most
            and x.is_cpu
            and x.is_contiguous()
        )

    def run_accepted(self, x: Tensor, threads: int) -> Tensor:
        """`run` without its checks, for inputs that `accepts` has seen."""
        y = torch.empty_like(x if self.outputs == self.inputs else self._output_like(x))
        self._kernel.run(x.data_ptr(), y.data_ptr(), x.numel() // self.inputs, threads)
        return y

    def _output_like(self, x: Tensor) -> Tensor:
        """A tensor of the output's shape. With the caches of a decode step, making a shape takes longer than all else
        around a small map, so the tensors are kept; up to three dimensions these numbers tell shapes apart."""
        key = x.dim(), x.size(0), x.numel()
        like = self._outputs_like.get(key)
        if like is None or key[0] > 3:
            like = self._outputs_like[key] = x.new_empty((*x.shape[:-1], self.outputs))
        return like


class CpuProbe:
    """The kernel of one probe: LayerNorm, low-rank map, GELU, scalar, softplus, as `sedac_hf.probes` defines it.

    Args:
        parameters: LayerNorm's weight and bias [d], the map's weight [rank, d] and bias [rank], the output's weight
            [1, rank] and bias [1]; must satisfy `fits`. The kernel keeps them.
        eps: LayerNorm's.
        dtype: of the hidden states.
    """

    def __init__(self, parameters: Sequence[Tensor], eps: float, dtype: torch.dtype) -> None:
        self._keep = norm, norm_bias, down, down_bias, out, out_bias = tuple(parameters)
        self.dtype, self.hidden_size = dtype, down.shape[1]
        self._most = MAX_ROWS * self.hidden_size
        self._kernel = _rust.ProbeKernel(
            str(dtype).removeprefix("torch."),
            (norm.data_ptr(), norm_bias.data_ptr(), eps),
            _placed(down),
            (down_bias.data_ptr(), out.data_ptr(), out_bias.data_ptr()),
        )

    @staticmethod
    def fits(parameters: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether the kernel can run a probe: float32 in contiguous CPU memory, hidden states of a known dtype."""
        plain = all(_is_plain(tensor, torch.float32) and tensor.is_contiguous() for tensor in parameters)
        return _rust is not None and dtype in _DTYPES and plain

    def accepts(self, hidden: Tensor) -> bool:
        """Whether the kernel can run this input [..., d]: one to four rows, contiguous, of its dtype."""
        return (
            hidden.dtype is self.dtype
            and hidden.size(-1) == self.hidden_size
            and 0 < hidden.numel() <= self._most
            and hidden.is_cpu
            and hidden.is_contiguous()
        )

    def run_accepted(self, hidden: Tensor) -> np.ndarray:
        """Risks float32 [n] of hidden [..., d] that `accepts` has seen."""
        risks: np.ndarray = self._kernel.run(hidden.data_ptr(), hidden.numel() // self.hidden_size)
        return risks


def rust_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by ``cut.kernel``: x [n, d] -> [n, d], n at most `MAX_ROWS`."""
    kernel: Any = cut.kernel
    low_rank = cut.compensation is not None and _has_low_rank(cut.compensation, cut, x)
    hidden = x.new_empty((x.shape[0], weights.intermediate_size), dtype=torch.float32) if low_rank else None
    y: Tensor
    y, needed, read = kernel.run_accepted(x, cut.token_points, kernel_threads(), hidden)
    cut.record(engine="rust", tokens=x.shape[0], needed=needed, read=read, computed=needed)
    if cut.compensation is None:
        return y
    # Without a low-rank part nothing is read from the hidden values.
    return compensated(y, y if hidden is None else hidden.to(y.dtype), cut)


def _has_low_rank(compensation: Compensation, cut: SiteCut, x: Tensor) -> bool:
    levels = set(cut.plan.levels.tolist()) - {cut.plan.n_levels}
    return any(compensation.low_rank(level, x) is not None for level in levels)


def _check_input(x: Tensor, size: int, dtype: torch.dtype) -> None:
    if x.shape[-1] == size and x.dtype == dtype and x.device.type == "cpu" and 0 < x.numel() <= MAX_ROWS * size:
        return
    raise ConfigError(
        f"a kernel's input must be 1 to {MAX_ROWS} rows of {size} in {dtype} on the CPU, got {x.dtype} "
        f"{list(x.shape)} on {x.device}: run other calls in torch"
    )


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and dtype in _DTYPES
    )


def _rows_are_runs(matrix: Tensor) -> bool:
    """Whether each row is one run of memory, and rows do not overlap."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _placed(matrix: Tensor) -> tuple[int, int, int, int]:
    return matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.stride(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
