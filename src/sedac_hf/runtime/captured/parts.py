"""What replaced forwards do in a trace: the part of a module in a captured graph.

Each stands in front of the eager forward, which a decode step outside of a graph calls some hundred times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sedac_hf.ffn.linears import original_forward, weight_of
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.library import Handle, linear
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.threads import kernel_threads

if TYPE_CHECKING:
    from sedac_hf.runtime.captured.execution import CapturedExecution
    from sedac_hf.runtime.decode_linears import DecodeLinear
    from sedac_hf.runtime.runtime import SedacRuntime

Replacement = tuple[nn.Module, Callable[..., Any]]


class Untouched:
    """A module that a trace runs as it is.

    Attributes:
        by_kernel: where it has not been cut, a compiled kernel runs it. A trace guards on this, so it is set between
            calls alone.
    """

    by_kernel = False

    def __init__(self, execution: CapturedExecution, i: int, module: nn.Module, eager: Callable[..., Any]) -> None:
        self.execution = execution
        self.i = i
        self.module = module
        self.eager = eager
        self.original = original_forward(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        execution = self.execution  # a decode step comes here some hundred times
        if not execution.serving or not execution.tracing:
            return self.eager(*args, **kwargs)
        return self.traced(*args, **kwargs)

    def traced(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def levels(self, x: Tensor) -> Tensor | None:
        return self.execution.levels_at(self.i, x.numel() // x.shape[-1])

    def choose(self, runtime: SedacRuntime, rows: int, threads: int, by_time: bool) -> bool:
        """Whether a kernel is to run it in calls of so many rows."""
        return False


class WholeCall(Untouched):
    """The owner of a recognised FFN."""

    def traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured, levels = self.execution.sites[self.i], self.levels(x)
        unusual = args or kwargs or self.module.training or torch.is_autocast_enabled(x.device.type)
        if unusual or not captured.whole_call or x.dtype != weight_of(captured.site.down).dtype:
            return self.original(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        if levels is not None:
            y = captured.run(rows, levels)
        elif self.by_kernel:
            y = captured.run_whole(rows)
        else:
            return self.original(x)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def choose(self, runtime: SedacRuntime, rows: int, threads: int, by_time: bool) -> bool:
        kernel = runtime.weights.kernel(self.i) if self.execution.sites[self.i].operator else None
        return isinstance(kernel, CpuFFN) and (
            not by_time or runtime.kernel_choice.whole_leads_module(kernel, rows, threads)
        )


class First(Untouched):
    """Gate, or what stands in its place: leaves for down what decides which units are used."""

    def traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = self.original(x, *args, **kwargs)
        captured, current = self.execution.sites[self.i], self.execution.current
        if captured.selects and current.state is not None:
            current.x = x
            current.z = captured.gate_part(output)
        return output


class Down(Untouched):
    """Down of an FFN whose own forward runs: units that a token does not use are zeroed in front of it."""

    def traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        captured, current, levels = self.execution.sites[self.i], self.execution.current, self.levels(x)
        given, gate = current.x, current.z
        current.x = current.z = None
        if levels is None:
            return self.original(x, *args, **kwargs)
        given = None if given is None else given.reshape(-1, given.shape[-1])
        gate = None if gate is None else gate.reshape(-1, gate.shape[-1])
        h = captured.mask(x.reshape(-1, x.shape[-1]), levels, given, gate)
        y = self.original(h.reshape(x.shape), *args, **kwargs)
        return captured.compensated(y.reshape(-1, y.shape[-1]), h, levels).reshape(y.shape)


class Linear(Untouched):
    """A linear map besides the FFNs."""

    def __init__(self, execution: CapturedExecution, decode_linear: DecodeLinear, handle: Handle) -> None:
        super().__init__(execution, -1, decode_linear.module, decode_linear.forward)
        self._of_decode = decode_linear
        self.number = handle.number

    def traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not self.by_kernel or torch.is_autocast_enabled(x.device.type):
            return self.original(x, *args, **kwargs)
        return linear(x, self.module.weight, self.module.bias, self.number)

    def choose(self, runtime: SedacRuntime, rows: int, threads: int, by_time: bool) -> bool:
        return not by_time or self._of_decode.usable(self._of_decode.shape, rows, threads)


class CapturedParts:
    """The parts of all modules of a model, and which of them run by kernels.

    Attributes:
        whole_by_kernel: the FFNs that kernels run where they are not cut.
    """

    def __init__(self, runtime: SedacRuntime, execution: CapturedExecution) -> None:
        self._runtime = runtime
        self._execution = execution
        self._parts: list[Untouched] = []
        # A graph knows their numbers, so they stay through all that may be attached and built anew.
        self._of_sites: dict[int, Handle] = {}
        self._of_linears: dict[int, Handle] = {}  # by ``id``
        self._chosen_for: tuple[object, ...] = ()
        self.whole_by_kernel: frozenset[int] = frozenset()

    def fresh(self) -> None:
        """The model has been let go of and is attached to anew; graphs that were made before stay good."""
        self._parts, self._chosen_for, self.whole_by_kernel = [], (), frozenset()

    def handle(self, i: int) -> Handle:
        """Of the compiled kernel of an FFN."""
        if i not in self._of_sites:
            self._of_sites[i] = Handle(functools.partial(self._runtime.weights.kernel, i))
        return self._of_sites[i]

    def of_site(self, i: int, site: FFNSite, replacements: Iterable[Replacement]) -> list[Replacement]:
        """The forwards of `forward_replacements`, each with its part in a trace in front of it."""
        parts: dict[int, type[Untouched]] = {}
        if site.experts is None:
            parts = {id(site.owner): WholeCall, id(site.down): Down}
            first = site.up if site.gate is None else site.gate
            parts.setdefault(id(first), First)
        return self._added(
            parts.get(id(module), Untouched)(self._execution, i, module, eager) for module, eager in replacements
        )

    def of_linears(self, linears: Iterable[DecodeLinear]) -> list[Replacement]:
        made = []
        for decode_linear in linears:
            handle = self._of_linears.setdefault(id(decode_linear.module), Handle(decode_linear.in_graph))
            handle.kernel = decode_linear.in_graph
            made.append(Linear(self._execution, decode_linear, handle))
        return self._added(made)

    def untouched(self, replacements: Iterable[Replacement]) -> list[Replacement]:
        """Replaced forwards of other modules, which a trace is to run as they were."""
        return self._added(Untouched(self._execution, -1, module, eager) for module, eager in replacements)

    def _added(self, parts: Iterable[Untouched]) -> list[Replacement]:
        made = list(parts)
        self._parts += made
        return [(part.module, part.forward) for part in made]

    def choose(self, rows: int, *, by_time: bool) -> None:
        """Which modules run by kernels in the calls of so many rows that follow.

        by_time: where that was measured to be quicker; else wherever a kernel can.
        """
        runtime, threads = self._runtime, kernel_threads()
        chosen_for = (rows, by_time, threads, id(runtime.policy), runtime.weights.moves)
        if chosen_for == self._chosen_for:
            return
        self._chosen_for = chosen_for
        usable = rows <= MAX_ROWS and runtime.weights.uses_kernels and not runtime.sharded
        for part in self._parts:
            part.by_kernel = usable and part.choose(runtime, rows, threads, by_time)
        owners = (part for part in self._parts if isinstance(part, WholeCall))
        self.whole_by_kernel = frozenset(part.i for part in owners if part.by_kernel)
