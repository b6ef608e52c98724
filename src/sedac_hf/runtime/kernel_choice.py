"""Which linear maps and FFNs the compiled kernels run in a ``generate`` call, by times measured here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sedac_hf.ffn.experts import Experts
from sedac_hf.ops import cut_ffn
from sedac_hf.ops.compiled import MAX_ROWS, MOST_IN_TURNS
from sedac_hf.ops.contract import DecodeKernel, SiteCut
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.threads import kernel_threads, kernels_join_torch
from sedac_hf.runtime import timed_calls
from sedac_hf.runtime.decode_linears import DecodeLinear, Shape
from sedac_hf.runtime.timed_calls import Call, in_turns, noise

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

# In turns with itself a map of torch's finds its code in the caches; in the middle of a decode step it does not, and
# takes so much longer (128 x 896 in bf16: 22 us, and 29 us in a step), the kernels hardly (11 us and 12 us).
LINEAR_MARGIN_S = 10e-6
# Of a kernel's time over that of the module it stands in for, timed alone: in a step a small lead turns into a loss.
LEAST_LEAD = 0.9


class KernelChoice:
    """Compares kernels with what else would run: per shape, layout, number of rows and number of threads, once."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._by_kernel: dict[tuple[object, int, int], bool] = {}  # of shape, rows and threads
        # Looking at a hundred weights to find that all of them are known takes a third of a millisecond.
        self._weights: tuple[object, ...] = ()
        self._seen: set[tuple[int, int]] = set()

    def linear_by_kernel(self, shape: Shape, rows: int, threads: int) -> bool:
        """Whether linear maps of this shape run by the kernel. Where that was not measured: yes, but not in turns."""
        return self._faster(shape, rows, threads)

    def whole_by_kernel(self, kernel: CpuFFN, rows: int, threads: int) -> bool:
        """The same for whole FFNs."""
        return self._faster(_ffn_shape(kernel), rows, threads)

    def cut_by_kernel(self, kernel: CpuFFN, rows: int, threads: int) -> bool:
        """The same for FFNs that are cut by `truncate`."""
        return self._faster(("cut", *_ffn_shape(kernel)), rows, threads)

    def turns_pay(self, threads: int) -> bool:
        """Whether anything at all was measured to be quicker in turns: else a pass need not ask at every layer."""
        return any(faster for (_, rows, n), faster in self._by_kernel.items() if rows > MAX_ROWS and n == threads)

    def _faster(self, shape: tuple[object, ...], rows: int, threads: int) -> bool:
        if rows <= MAX_ROWS:
            return self._by_kernel.get((shape, rows, threads), True)
        return rows <= MOST_IN_TURNS and self._by_kernel.get((shape, _measured_with(rows), threads), False)

    def idle(self, rows: int, prompt: int) -> list[nn.Module]:
        """The modules that no kernel runs in a call at full width, of so many rows per step and tokens of prompt."""
        runtime, threads = self._runtime, kernel_threads()
        passes = (rows, prompt) if prompt > MAX_ROWS else (rows,)
        idle: list[nn.Module] = []
        for linear in runtime.decode_linears:
            if not any(self.linear_by_kernel(linear.shape, n, threads) for n in passes):
                idle.append(linear.module)
        for i, site in enumerate(runtime.sites):
            kernel = runtime.weights.kernel(i) if site.plain_forward else None
            runs = isinstance(kernel, CpuFFN) and any(self.whole_by_kernel(kernel, n, threads) for n in passes)
            if site.experts is None and not runs:
                idle += [site.owner, *site.linears]
        return idle

    def compare(self, rows: int) -> None:
        """Before passes of so many rows: measure what is not known yet."""
        if rows <= MAX_ROWS:
            self._compare_kernels(rows)
        else:
            self.compare_in_turns(rows)

    def compare_in_turns(self, tokens: int) -> None:
        """Before passes of so many tokens: measure whether kernels do better in turns, with 128 rows or 256 for all
        numbers up to that. The fewer rows, the more of a product's time is reading weights, so what wins with more
        rows wins with less."""
        runtime = self._runtime
        if MAX_ROWS < tokens <= MOST_IN_TURNS and runtime.attached and not runtime.sharded and kernels_join_torch():
            self._compare_kernels(_measured_with(tokens))
            if runtime.policy is not None and runtime.policy.cut == "truncate":
                self._compare_cuts(_measured_with(tokens))

    def _compare_cuts(self, rows: int) -> None:
        """FFNs that are cut: kernels in turns, or strips."""
        runtime, threads = self._runtime, kernel_threads()
        alike: dict[tuple[object, int, int], list[int]] = {}
        for i, segment in enumerate(runtime.segments):
            kernel = runtime.weights.kernel(i)
            if segment >= 0 and isinstance(kernel, CpuFFN):
                alike.setdefault((("cut", *_ffn_shape(kernel)), rows, threads), []).append(i)
        for key, sites in alike.items():
            if key not in self._by_kernel:
                site = runtime.sites[sites[0]]
                x = noise(rows, site.hidden_size).to(site.weight)
                by_kernel = [self.cut(i, x, runtime.weights.kernel(i)) for i in sites]
                ours, theirs = timed_calls.interleaved(
                    in_turns(by_kernel, [self.cut(i, x, None) for i in sites]), x.device
                )
                self._by_kernel[key] = ours <= theirs

    def _compare_kernels(self, rows: int) -> None:
        runtime = self._runtime
        if rows > MOST_IN_TURNS or not runtime.weights.uses_kernels:
            return
        threads = kernel_threads()
        weights = runtime.decode_linears, runtime.weights.moves, runtime.sites[-1].weight.dtype
        if weights != self._weights:
            self._weights, self._seen = weights, set()
        if (rows, threads) in self._seen:
            return
        self._seen.add((rows, threads))
        linears: dict[tuple[object, int, int], list[DecodeLinear]] = {}
        for linear in runtime.decode_linears:
            linears.setdefault((linear.shape, rows, threads), []).append(linear)
        for key, alike in linears.items():
            if key not in self._by_kernel and (rows <= MAX_ROWS or len(alike) > 1):  # the head sees few rows
                self._by_kernel[key] = _linear_is_faster(alike, rows)
        sites: dict[tuple[object, int, int], list[tuple[CpuFFN, nn.Module]]] = {}
        for i, site in enumerate(runtime.sites):
            kernel = runtime.weights.kernel(i)
            if isinstance(kernel, CpuFFN):  # the only one that runs whole FFNs
                sites.setdefault((_ffn_shape(kernel), rows, threads), []).append((kernel, site.owner))
        for key, of_shape in sites.items():
            if key not in self._by_kernel:
                x = noise(rows, of_shape[0][0].hidden_size).to(of_shape[0][0].dtype)
                ours, theirs = timed_calls.interleaved(
                    in_turns(
                        [functools.partial(kernel.whole, x) for kernel, _ in of_shape],
                        # Outside a forward pass an owner's own forward runs.
                        [functools.partial(owner, x) for _, owner in of_shape],
                    ),
                    x.device,
                )
                self._by_kernel[key] = ours <= LEAST_LEAD * theirs

    # ---------------------------------------------------------------- one FFN alone

    def whole(self, i: int, x: Tensor) -> Call:
        """Site i at full width, as it would run."""
        runtime = self._runtime
        rows, site = x.shape[0], runtime.sites[i]
        if site.experts is not None:
            return functools.partial(site.owner, *_experts_input(site.experts, x))
        kernel = self.kernel(i, rows, "whole")
        if isinstance(kernel, CpuFFN) and kernel.accepts(x, in_turns=True):
            return functools.partial(kernel.whole, x)
        return functools.partial(site.owner, x)

    def kernel(self, i: int, rows: int, what: Literal["whole", "cut"]) -> DecodeKernel | None:
        """The kernel that runs site i, if it is to run by one."""
        kernel, threads = self._runtime.weights.kernel(i), kernel_threads()
        if not isinstance(kernel, CpuFFN):
            return kernel if what == "cut" and rows <= MAX_ROWS else None
        faster = self.whole_by_kernel if what == "whole" else self.cut_by_kernel
        return kernel if faster(kernel, rows, threads) else None

    def cut(self, i: int, x: Tensor, kernel: DecodeKernel | None) -> Call:
        """Site i cut at the typical level."""
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        rows, site = x.shape[0], runtime.sites[i]
        cut = SiteCut(
            points=policy.schedule.points[i],
            plan=LevelPlan.same(rows, policy.typical_level, policy.n_levels),
            importance=runtime.weights.importance(i),
            compensation=None if policy.compensation is None else policy.compensation[i],
            engine=runtime.engine,
            record=_forget,
            kernel=kernel,
        )
        if site.experts is not None:
            kernels = runtime.weights.expert_kernels(i)
            return functools.partial(site.experts.output, _experts_input(site.experts, x), cut, kernels)
        return functools.partial(cut_ffn, x, site.weights(), cut)


def _measured_with(rows: int) -> int:
    """Rows of the calls that calls of so many are judged by, where rows take turns."""
    return MOST_IN_TURNS // 2 if rows <= MOST_IN_TURNS // 2 else MOST_IN_TURNS


def _ffn_shape(kernel: CpuFFN) -> tuple[object, ...]:
    return "ffn", kernel.intermediate_size, kernel.hidden_size, kernel.dtype, kernel.by_units


def _linear_is_faster(alike: Sequence[DecodeLinear], rows: int) -> bool:
    """Whether the kernels of linear maps of one shape take no longer than the modules themselves."""
    with torch.no_grad():
        x = noise(rows, alike[0].shape[1]).to(alike[0].shape[2])
        if any(linear.by_kernel(x) is None for linear in alike):
            return False
        ours, theirs = timed_calls.interleaved(
            in_turns(
                [functools.partial(linear.by_kernel, x) for linear in alike],
                [functools.partial(linear.original, x) for linear in alike],
            ),
            x.device,
        )
    return ours <= LEAST_LEAD * theirs + LINEAR_MARGIN_S


def _experts_input(experts: Experts, x: Tensor) -> tuple[Any, ...]:
    """Arguments of a module of experts for x [rows, d]: other experts for each row as far as there are any, of equal
    weight."""
    rows, top_k, count = x.shape[0], experts.top_k, experts.count
    index = torch.arange(rows * top_k).remainder(count).view(rows, top_k)
    return experts.reading.arguments(count, x, index.to(x.device), x.new_full((rows, top_k), 1 / top_k))


def _forget(**_: object) -> None:
    """A record that nobody keeps."""
