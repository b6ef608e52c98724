"""The compiled kernel of a linear map on torch tensors, for a few rows on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.ops import compiled
from sedac_hf.ops.compiled import MAX_ROWS, address, check_input, is_plain, most_in_turns, placed, rows_are_runs, turns
from sedac_hf.ops.threads import kernel_threads


class CpuLinear:
    """The kernel of one linear map ``x W^T + b`` on its own memory; the arguments must satisfy `fits`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, isa: str | None = None) -> None:
        self._keep = (weight, bias)
        self.dtype = weight.dtype
        self.inputs, self.outputs = weight.shape[1], weight.shape[0]
        self._most = most_in_turns(self.dtype) * self.inputs
        self._outputs_like: dict[tuple[int, int, int], Tensor] = {}
        self._kernel = compiled.module.LinearKernel(
            str(weight.dtype).removeprefix("torch."), placed(weight), address(bias), isa
        )

    @staticmethod
    def fits(weight: Tensor, bias: Tensor | None) -> bool:
        """Whether the kernels can run this map: CPU memory, contiguous rows."""
        return (
            compiled.available()
            and is_plain(weight, weight.dtype)
            and weight.dim() == 2
            and rows_are_runs(weight)
            and (bias is None or (is_plain(bias, weight.dtype) and bias.is_contiguous()))
        )

    def run(self, x: Tensor) -> Tensor:
        """x [..., inputs] of at most `MAX_ROWS` rows in the weight's dtype -> [..., outputs].

        Raises:
            ConfigError: the input does not fit.
        """
        check_input(x, self.inputs, self.dtype)
        return self.run_accepted(x, kernel_threads())

    def accepts(self, x: Tensor) -> bool:
        """Whether `run_accepted` may be called with this input: 1 to `most_in_turns` rows of the weight's dtype."""
        return x.dtype is self.dtype and x.size(-1) == self.inputs and 0 < x.numel() <= self._most and x.is_cpu

    def run_accepted(self, x: Tensor, threads: int) -> Tensor:
        """`run` without its checks, for inputs that `accepts` has seen; more than `MAX_ROWS` rows take turns."""
        x = x.contiguous()  # the last tokens of a batch's prompts, which the head gets, lie apart
        rows = x.numel() // self.inputs
        if rows <= MAX_ROWS:
            y = torch.empty_like(x if self.outputs == self.inputs else self._output_like(x))
            self._kernel.run(x.data_ptr(), y.data_ptr(), rows, threads)
            return y
        y = x.new_empty((*x.shape[:-1], self.outputs))
        row, out = self.inputs * x.element_size(), self.outputs * y.element_size()
        for lo, hi in turns(rows):
            self._kernel.run(x.data_ptr() + lo * row, y.data_ptr() + lo * out, hi - lo, threads)
        return y

    def _output_like(self, x: Tensor) -> Tensor:
        """A tensor of the output's shape. With the caches of a decode step, making a shape takes longer than all else
        around a small map, so the tensors are kept; up to three dimensions these numbers tell shapes apart."""
        key = x.dim(), x.size(0), x.numel()
        like = self._outputs_like.get(key)
        if like is None or key[0] > 3:
            like = self._outputs_like[key] = x.new_empty((*x.shape[:-1], self.outputs))
        return like
