"""The compiled module as the engines see it: whether it is there, and what its callers must know about tensors.

Kernels are given addresses, so whoever makes one has to be sure of what lies there; see `rust_cpu`, `rust_linear` and
`rust_probe`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops import onednn
from sedac_hf.ops.threads import kernel_threads, kernels_join_torch, parallel_address

try:
    from sedac_hf import _rust
except ImportError:  # the source tree without its compiled module: the engines in torch do everything
    _rust = None  # type: ignore[assignment]

module = _rust

MAX_ROWS: int = 0 if module is None else module.MAX_ROWS
"""Most rows that a kernel runs at once."""

MOST_IN_TURNS = 16 * MAX_ROWS
"""Most rows that kernels run `MAX_ROWS` at a time, where that is quicker than torch's products of matrices."""

_ANY_NUMBER = 1 << 40

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if module is not None:
    module.set_openmp(parallel_address())


def most_in_turns(dtype: torch.dtype) -> int:
    """Most rows that kernels may run in turns: of a type that torch has no quick products of, any number."""
    return _ANY_NUMBER if module is not None and _lacks_products(dtype) else MOST_IN_TURNS


def stand_in(dtype: torch.dtype) -> bool:
    """Whether more rows than `MAX_ROWS` run by the kernels without any measuring: on torch's threads, with vector
    instructions, of a type that torch has no quick products of. A whole FFN of 896 x 4864 in bfloat16 took 0.2 of
    torch's time at 32 to 2,048 rows (AVX2, timed by hand)."""
    return _lacks_products(dtype) and kernels_join_torch() and _isa() not in ("", "portable")


def _lacks_products(dtype: torch.dtype) -> bool:
    return dtype in onednn.LOW_PRECISION and not onednn.has_products(dtype)


@cache
def _isa() -> str:
    return next(iter(instruction_sets()), "")


def available() -> bool:
    """Whether the compiled module is installed."""
    return module is not None


def instruction_sets() -> list[str]:
    """Names of the sets that the kernels can use here, the one in use first; none without the compiled module."""
    return [] if module is None else module.instruction_sets()


def read_memory(tensor: Tensor) -> None:
    """Read a tensor's memory on the kernels' threads, and nothing else: what their times are to be compared with.

    Args:
        tensor: contiguous, on the CPU; its bytes past the last multiple of four are left out.

    Raises:
        ValueError: another tensor (or one that starts between 32-bit words), or there is no compiled module.
    """
    if module is None:
        raise ValueError("reading memory takes the compiled module sedac_hf._rust, which is not installed")
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.data_ptr() % 4:
        raise ValueError(
            "reading memory takes a contiguous CPU tensor that starts at a multiple of four bytes, got one on "
            f"{tensor.device} with strides {tensor.stride()} at {tensor.data_ptr():#x}"
        )
    module.read_memory(tensor.data_ptr(), tensor.numel() * tensor.element_size() // 4 * 4, kernel_threads())


def read_rows(matrices: Sequence[Tensor], rows: Tensor) -> None:
    """Read some rows of matrices on the kernels' threads, and nothing else; as `read_memory`, for what lies apart.

    Args:
        matrices: on the CPU, each row one run of memory whose bytes are a multiple of four.
        rows: int32 [n], contiguous, indices into each of the matrices.

    Raises:
        ValueError: the arguments do not fit, or there is no compiled module.
    """
    if module is None:
        raise ValueError("reading memory takes the compiled module sedac_hf._rust, which is not installed")
    words = [_in_words(matrix) for matrix in matrices]
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"`rows` must be contiguous int32 [n], got {rows.dtype} with strides {rows.stride()}")
    least = min((matrix.shape[0] for matrix in matrices), default=0)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= least):
        raise ValueError(f"`rows` must be rows of all matrices, 0 to {least - 1}, got {rows.min()} to {rows.max()}")
    module.read_rows(words, rows.data_ptr(), rows.numel(), kernel_threads())


def _in_words(matrix: Tensor) -> tuple[int, int, int, int]:
    """`placed`, in words of four bytes."""
    if matrix.device.type == "cpu" and matrix.dim() == 2 and rows_are_runs(matrix):
        address, rows, columns, stride = placed(matrix)
        columns, stride = columns * matrix.element_size(), stride * matrix.element_size()
        if not (address % 4 or columns % 4 or stride % 4):
            return address, rows, columns // 4, stride // 4
    raise ValueError(
        "reading rows takes CPU matrices whose rows are runs of 32-bit words, got "
        f"{list(matrix.shape)} in {matrix.dtype} on {matrix.device} with strides {matrix.stride()}"
    )


def turns(rows: int) -> list[tuple[int, int]]:
    """Ranges of at most `MAX_ROWS` rows each, as few and as even as can be: each reads all weights."""
    count = -(-rows // MAX_ROWS)
    ends = [rows * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def check_input(x: Tensor, size: int, dtype: torch.dtype) -> None:
    """Raise ConfigError unless x is a kernel's input: a few rows of this size."""
    if x.shape[-1] == size and x.dtype == dtype and x.device.type == "cpu" and 0 < x.numel() <= MAX_ROWS * size:
        return
    raise ConfigError(
        f"a kernel's input must be 1 to {MAX_ROWS} rows of {size} in {dtype} on the CPU, got {x.dtype} "
        f"{list(x.shape)} on {x.device}: run other calls in torch"
    )


def is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether kernels can read a tensor's memory: an ordinary one on the CPU, of this dtype."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == dtype
        and dtype in DTYPES
    )


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd must see what is computed from these tensors, so that no kernel may."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def rows_are_runs(matrix: Tensor) -> bool:
    """Whether each row is one run of memory, and rows do not overlap."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def placed(matrix: Tensor) -> tuple[int, int, int, int]:
    """Address, rows, columns and distance of the rows in elements."""
    return matrix.data_ptr(), matrix.shape[0], matrix.shape[1], matrix.stride(0)


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
