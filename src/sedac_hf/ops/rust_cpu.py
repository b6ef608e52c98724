"""The compiled kernel of a cut FFN on torch tensors, for a few rows on a CPU.

With few rows the time of an FFN is the time of reading its weights, so the kernel reads each weight that some row uses
once, and no other. Results do not depend on the number of threads, nor a row's result on the other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops import compiled
from sedac_hf.ops.activations import name_of
from sedac_hf.ops.compiled import (
    MAX_ROWS,
    address,
    check_input,
    is_plain,
    most_in_turns,
    placed,
    rows_are_runs,
    turns,
)
from sedac_hf.ops.contract import Compensation, FFNWeights, OperatingPoint, ShadowTables, SiteCut
from sedac_hf.ops.strips.columns import down_by_columns, hidden_by_columns
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.ops.tokens import compensated


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
        self._most_in_turns = most_in_turns(self.dtype) * self.hidden_size
        self.by_units = rows_are_runs(weights.down.T)
        self._kernel = compiled.module.FfnKernel(
            str(weights.up.dtype).removeprefix("torch."),
            name,
            None if weights.gate is None else placed(weights.gate),
            placed(weights.up),
            placed(weights.down.T if self.by_units else weights.down),
            self.by_units,
            (address(weights.gate_bias), address(weights.up_bias), address(weights.down_bias)),
            None if shadow is None else tuple(address(table) for table in shadow),
            isa,
        )

    @staticmethod
    def fits(weights: FFNWeights) -> bool:
        """Whether the kernels can run an FFN: CPU memory, rows (or columns of down) contiguous, a known activation."""
        tensors = [weights.up, weights.down, *(() if weights.gate is None else (weights.gate,))]
        biases = [b for b in (weights.gate_bias, weights.up_bias, weights.down_bias) if b is not None]
        return (
            compiled.available()
            and all(is_plain(tensor, weights.up.dtype) for tensor in (*tensors, *biases))
            and all(bias.is_contiguous() for bias in biases)
            and all(rows_are_runs(tensor) for tensor in tensors[::2])
            and (rows_are_runs(weights.down) or rows_are_runs(weights.down.T))
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
        check_input(x, self.hidden_size, self.dtype)
        if x.dim() != 2 or len(points) != x.shape[0]:
            raise ConfigError(f"one operating point per row of x {list(x.shape)} is needed, got {len(points)}")
        if hidden is not None and not (
            hidden.shape == (x.shape[0], self.intermediate_size)
            and is_plain(hidden, torch.float32)
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
        """The whole FFN: x [n, d] -> y [n, d], of any number of rows."""
        if x.shape[0] <= MAX_ROWS:
            return self.run(x, self.whole_points[: x.shape[0]])[0]
        return self.whole_in_turns(x, kernel_threads())

    def whole_in_turns(self, x: Tensor, threads: int) -> Tensor:
        """`whole` without checks, for x [..., d] of so many rows that they take turns."""
        points = self.whole_points[:1] * (x.numel() // self.hidden_size)
        return self.run_in_turns(x, points, threads)[0]

    def whole_by_columns(self, x: Tensor) -> Tensor:
        """`whole` by torch's products with one column per token (`sedac_hf.ops.strips.columns`), for x [..., d]."""
        h = hidden_by_columns(x.reshape(-1, self.hidden_size), self.weights, self.intermediate_size)
        return down_by_columns(h, self.weights).view(x.shape)

    def run_in_turns(
        self, x: Tensor, points: Sequence[OperatingPoint], threads: int, hidden: Tensor | None = None
    ) -> tuple[Tensor, int, int]:
        """`run_accepted` for more rows than a kernel takes at once. Each turn reads what its rows use: rows of like
        points should lie together. Units read: those of the widest turn, as prefixes are; of units that were chosen
        it is not known how many came again, so all count, up to the FFN's."""
        x = x.contiguous()
        y = torch.empty_like(x)
        row, hidden_row = self.hidden_size * x.element_size(), 4 * self.intermediate_size
        needed = most = total = 0
        for lo, hi in turns(len(points)):
            given, taken = x.data_ptr() + lo * row, y.data_ptr() + lo * row
            kept = 0 if hidden is None else hidden.data_ptr() + lo * hidden_row
            of_turn = self._kernel.run(given, taken, points[lo:hi], threads, kept)
            needed, most, total = needed + of_turn[0], max(most, of_turn[1]), total + of_turn[1]
        choose = any(point.importance_min > 0 for point in points)
        return y, needed, min(total, self.intermediate_size) if choose else most

    def accepts(self, x: Tensor, *, in_turns: bool = False) -> bool:
        """Whether a call with x [..., d] can be run: 1 to `MAX_ROWS` rows, the weights' dtype, no gradient.

        in_turns: up to `most_in_turns` rows.
        """
        # A decode step asks this for each FFN: no device or shape objects are made.
        return (
            x.dtype is self.dtype
            and x.size(-1) == self.hidden_size
            and 0 < x.numel() <= (self._most_in_turns if in_turns else self._most)
            and x.is_cpu
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weights.learns))
        )


def rust_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by ``cut.kernel``: x [n, d] -> [n, d]. More rows than `MAX_ROWS` take turns, the widest first."""
    kernel: Any = cut.kernel
    low_rank = cut.compensation is not None and _has_low_rank(cut.compensation, cut, x)
    hidden = x.new_empty((x.shape[0], weights.intermediate_size), dtype=torch.float32) if low_rank else None
    y: Tensor
    if x.shape[0] <= MAX_ROWS:
        y, needed, read = kernel.run_accepted(x, cut.token_points, kernel_threads(), hidden)
    else:
        order = None if cut.plan.in_order else cut.plan.on(x.device, "order")
        points = [cut.token_points[i] for i in cut.plan.order.tolist()]
        rows = x if order is None else x.index_select(0, order)
        y, needed, read = kernel.run_in_turns(rows, points, kernel_threads(), hidden)
        if order is not None:
            inverse = cut.plan.on(x.device, "inverse")
            y, hidden = y.index_select(0, inverse), None if hidden is None else hidden.index_select(0, inverse)
    cut.record(engine="rust", tokens=x.shape[0], needed=needed, read=read, computed=needed)
    if cut.compensation is None:
        return y
    # Without a low-rank part nothing is read from the hidden values.
    return compensated(y, y if hidden is None else hidden.to(y.dtype), cut)


def _has_low_rank(compensation: Compensation, cut: SiteCut, x: Tensor) -> bool:
    levels = set(cut.plan.levels.tolist()) - {cut.plan.n_levels}
    return any(compensation.low_rank(level, x) is not None for level in levels)
