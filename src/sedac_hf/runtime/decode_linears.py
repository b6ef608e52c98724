"""The large linear maps of a decoder besides its FFNs (attention projections, the head), for a few rows.

In a decode step they are read once per token, like the FFNs. Run by the same kernels, on the same threads, they make a
step whose time is that of reading what it needs; run beside them by torch, they would be what is left to wait for. So
are short prompts where the kernels are quicker even so (`ForwardPass.many_threads`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sedac_hf.ffn.linears import is_plain, is_readable, original_forward, weight_of
from sedac_hf.ops.compiled import MAX_ROWS, most_in_turns, wants_gradient
from sedac_hf.ops.rust_linear import CpuLinear
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.runtime.forward_pass import current_pass

_LEAST_NUMBERS = 1 << 15  # of a weight: smaller maps are over before a call has begun

_Place = tuple[int, int, int, int]  # addresses and bytes of weight and bias: a kernel reads that memory and no other
_NO_KERNEL: tuple[_Place, CpuLinear | None] = ((0, 0, 0, 0), None)

Shape = tuple[int, int, torch.dtype]
Usable = Callable[[Shape, int, int], bool]


class DecodeLinear:
    """The forward of one linear map: few rows by the compiled kernel, all else by the module's own.

    Args:
        module: a plain `nn.Linear` on the CPU.
        usable: asked with shape, rows and threads whether the kernel may run.
    """

    def __init__(self, module: nn.Linear, usable: Usable) -> None:
        self.module = module
        self.usable = usable
        self.original = original_forward(module)
        weight = weight_of(module)
        self.shape: Shape = (weight.shape[0], weight.shape[1], weight.dtype)
        self._most = self.shape[1] * most_in_turns(weight.dtype)
        self._kernel = _NO_KERNEL

    def forward(self, input: Tensor) -> Any:
        # Named as nn.Linear names it. A decode step calls this about a hundred times, each time with caches that the
        # weights have swept: every call of torch's counts.
        if input.numel() <= self._most:
            y = self.by_kernel(input, ask=True)
            if y is not None:
                return y
        return self.original(input)

    def by_kernel(self, x: Tensor, *, ask: bool = False) -> Tensor | None:
        """x [..., inputs] of few rows -> [..., outputs]; None where the kernel can't run this call.

        ask: None too where the module was measured to be quicker, in a pass that goes by time.
        """
        rows, state = x.numel() // self.shape[1], current_pass.get()
        if ask and rows > MAX_ROWS and (state is None or not state.many_threads):
            return None
        held = self.module._parameters
        weight, bias = held.get("weight"), held.get("bias")
        if weight is None:  # pruned or parametrised since: a function of other parameters
            return None
        kernel = self._kernel_on(weight, bias)
        if kernel is None or not kernel.accepts(x) or wants_gradient(x, weight, bias):
            return None
        if state is None:
            return None if torch.is_autocast_enabled("cpu") else kernel.run_accepted(x, kernel_threads())
        threads = state.many_threads if rows > MAX_ROWS else state.threads or state.many_threads
        if not threads or (ask and state.by_time and not self.usable(self.shape, rows, threads)):
            return None
        return kernel.run_accepted(x, threads)

    def in_graph(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """`by_kernel` for a captured graph, which brings the parameters along and has settled all else."""
        kernel = self._kernel_on(weight, bias)
        if kernel is None or not kernel.accepts(x):
            return None
        return kernel.run_accepted(x, kernel_threads())

    def _kernel_on(self, weight: Tensor, bias: Tensor | None) -> CpuLinear | None:
        """The kernel on the parameters as they lie now."""
        if bias is None:
            place = weight.data_ptr(), weight.nbytes, 0, 0
        else:
            place = weight.data_ptr(), weight.nbytes, bias.data_ptr(), bias.nbytes
        known, kernel = self._kernel
        if known != place:
            outputs, inputs, _ = self.shape
            fits = weight.shape == (outputs, inputs) and CpuLinear.fits(weight, bias)
            kernel = CpuLinear(weight, bias) if fits else None
            self.shape = (outputs, inputs, weight.dtype)
            self._kernel = (place, kernel)
        return kernel

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernel": _NO_KERNEL}  # a kernel is made of addresses


def decode_linears(model: nn.Module, others: set[int], usable: Usable) -> Iterator[DecodeLinear]:
    """The linear maps of a model that kernels can run, without those whose ``id`` is in ``others``."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module) not in others and is_plain(module) and is_readable(module):
            weight = weight_of(module)
            if weight.device.type == "cpu" and weight.numel() >= _LEAST_NUMBERS:
                yield DecodeLinear(module, usable)
