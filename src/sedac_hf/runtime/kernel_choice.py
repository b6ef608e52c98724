"""What runs the linear maps and FFNs of a ``generate`` call, by times measured here: the compiled kernels, of whole
FFNs also torch's products with one column per token, or the modules themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sedac_hf.ffn.experts import Experts
from sedac_hf.ops import cut_ffn
from sedac_hf.ops.compiled import MAX_ROWS, MOST_IN_TURNS, most_in_turns, stand_in
from sedac_hf.ops.contract import DecodeKernel, SiteCut
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.strips import columns
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
MEASURED_WITH = (2 * MAX_ROWS, MOST_IN_TURNS // 2, MOST_IN_TURNS)  # rows, for all up to that; the last for more, too


Way = Literal["kernel", "columns", "module"]


class _Times(NamedTuple):
    """Seconds by each way, infinite by one that is not there."""

    kernel: float
    columns: float
    module: float

    def fastest(self) -> Way:
        if min(self.kernel, self.columns) > LEAST_LEAD * self.module:
            return "module"
        return "kernel" if self.kernel <= self.columns else "columns"


_KERNEL, _MODULE = _Times(0.0, math.inf, math.inf), _Times(math.inf, math.inf, 0.0)


class KernelChoice:
    """Compares kernels with what else would run: per shape, layout, number of rows and number of threads, once."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._times: dict[tuple[tuple[object, ...], int, int], _Times] = {}  # of shape, rows and threads
        # Looking at a hundred weights to find that all of them are known takes a third of a millisecond.
        self._weights: tuple[object, ...] = ()
        self._seen: set[tuple[int, int]] = set()

    def linear_by_kernel(self, shape: Shape, rows: int, threads: int) -> bool:
        """Whether linear maps of this shape run by the kernel. Where that was not measured: yes, but not in turns."""
        return self._of(shape, rows, threads).fastest() == "kernel"

    def whole_way(self, kernel: CpuFFN, rows: int, threads: int) -> Way:
        """What runs whole FFNs; the kernel where that was not measured, but not in turns."""
        return self._of(_ffn_shape(kernel), rows, threads).fastest()

    def cut_by_kernel(self, kernel: CpuFFN, rows: int, threads: int) -> bool:
        """Whether FFNs that are cut by `truncate` run by the kernel."""
        return self._of(("cut", *_ffn_shape(kernel)), rows, threads).fastest() == "kernel"

    def whole_leads_module(self, kernel: CpuFFN, rows: int, threads: int) -> bool:
        """Whether whole FFNs do better by the kernel than by the module, where no other way can be had."""
        return self._of(_ffn_shape(kernel), rows, threads)._replace(columns=math.inf).fastest() == "kernel"

    def stands_in(self) -> bool:
        """Whether more rows than kernels take at once run by them without being timed."""
        kernel = self._runtime.weights.kernel(len(self._runtime.sites) - 1)
        return isinstance(kernel, CpuFFN) and stand_in(kernel.dtype)

    def many_rows_pay(self, rows: int, threads: int) -> bool:
        """Whether anything at all with more rows than kernels take at once is known to be quicker than its module:
        else a pass need not ask at every layer."""
        return self.stands_in() or (
            rows <= self._most_rows()
            and any(
                self._of(shape, rows, threads).fastest() != "module" for shape, n, on in self._times if on == threads
            )
        )

    def _of(self, shape: tuple[object, ...], rows: int, threads: int) -> _Times:
        if rows <= MAX_ROWS:
            return self._times.get((shape, rows, threads), _KERNEL)
        if self.stands_in():
            return _KERNEL
        known = self._times.get((shape, _measured_with(rows), threads)) if rows <= self._most_rows() else None
        if known is None:
            return _MODULE
        return known if _kernels_take(rows) else known._replace(kernel=math.inf)

    def idle(self, rows: int, prompt: int) -> list[nn.Module]:
        """The modules that run themselves in a call at full width, of so many rows per step and tokens of prompt."""
        runtime, threads = self._runtime, kernel_threads()
        passes = (rows, prompt) if prompt > MAX_ROWS else (rows,)
        idle: list[nn.Module] = []
        for linear in runtime.decode_linears:
            if not any(self.linear_by_kernel(linear.shape, n, threads) for n in passes):
                idle.append(linear.module)
        for i, site in enumerate(runtime.sites):
            kernel = runtime.weights.kernel(i) if site.plain_forward else None
            alone = not isinstance(kernel, CpuFFN) or all(
                self.whole_way(kernel, n, threads) == "module" for n in passes
            )
            if site.experts is None and alone:
                idle += [site.owner, *site.linears]
        return idle

    def compare(self, rows: int) -> None:
        """Before passes of so many rows: measure what is not known yet."""
        if rows <= MAX_ROWS:
            self._compare_kernels(rows)
            if columns.may_pay(rows, self._runtime.sites[-1].like):
                self._compare_cuts(rows)
        else:
            self.compare_many(rows)

    def compare_many(self, tokens: int) -> None:
        """Before passes of more tokens than kernels take at once: measure whether kernels in turns or columns do
        better, with some of `MEASURED_WITH`. The fewer rows, the more of a product's time is reading weights, so that
        the kernels that win with more rows win with less."""
        runtime = self._runtime
        if self.stands_in():
            return
        if MAX_ROWS < tokens <= self._most_rows() and runtime.attached and not runtime.sharded:
            rows = _measured_with(tokens)
            self._compare_kernels(rows)
            if kernels_join_torch():
                self._compare_cuts(rows)

    def _most_rows(self) -> int:
        return most_in_turns(self._runtime.sites[-1].like.dtype)

    def _compare_cuts(self, rows: int) -> None:
        """FFNs that `truncate` cuts: kernels, or strips."""
        runtime, threads = self._runtime, kernel_threads()
        if runtime.policy is None or runtime.policy.cut != "truncate":
            return
        alike: dict[tuple[tuple[object, ...], int, int], list[int]] = {}
        for i, segment in enumerate(runtime.segments):
            kernel = runtime.weights.kernel(i)
            if segment >= 0 and isinstance(kernel, CpuFFN):
                alike.setdefault((("cut", *_ffn_shape(kernel)), rows, threads), []).append(i)
        for key, sites in alike.items():
            if key not in self._times:
                site = runtime.sites[sites[0]]
                x = noise(rows, site.hidden_size).to(site.like)
                by_kernel = [self.cut(i, x, runtime.weights.kernel(i)) for i in sites]
                ours, theirs = timed_calls.interleaved(
                    in_turns(by_kernel, [self.cut(i, x, None) for i in sites]), x.device
                )
                # Two ways of cutting: neither stands in for the module, so the quicker one it is.
                self._times[key] = _Times(ours, math.inf, theirs / LEAST_LEAD)

    def _compare_kernels(self, rows: int) -> None:
        runtime = self._runtime
        if not runtime.weights.uses_kernels:
            return
        threads = kernel_threads()
        weights = runtime.decode_linears, runtime.weights.moves, runtime.sites[-1].like.dtype
        if weights != self._weights:
            self._weights, self._seen = weights, set()
        if (rows, threads) in self._seen:
            return
        self._seen.add((rows, threads))
        linears: dict[tuple[tuple[object, ...], int, int], list[DecodeLinear]] = {}
        for linear in runtime.decode_linears:
            linears.setdefault((linear.shape, rows, threads), []).append(linear)
        for key, alike in linears.items():
            if key not in self._times and (rows <= MAX_ROWS or len(alike) > 1):  # the head sees few rows
                self._times[key] = _linear_times(alike, rows)
        sites: dict[tuple[tuple[object, ...], int, int], list[tuple[CpuFFN, nn.Module]]] = {}
        for i, site in enumerate(runtime.sites):
            kernel = runtime.weights.kernel(i)
            if isinstance(kernel, CpuFFN):  # the only one that runs whole FFNs
                sites.setdefault((_ffn_shape(kernel), rows, threads), []).append((kernel, site.owner))
        for key, of_shape in sites.items():
            if key not in self._times:
                self._times[key] = _whole_times(of_shape, rows)

    # ---------------------------------------------------------------- one FFN alone

    def whole(self, i: int, x: Tensor) -> Call:
        """Site i at full width, as it would run."""
        runtime = self._runtime
        rows, site = x.shape[0], runtime.sites[i]
        if site.experts is not None:
            return functools.partial(site.owner, *_experts_input(site.experts, x))
        kernel = runtime.weights.kernel(i)
        way = self.whole_way(kernel, rows, kernel_threads()) if isinstance(kernel, CpuFFN) else "module"
        if isinstance(kernel, CpuFFN) and way != "module":
            return functools.partial(kernel.whole if way == "kernel" else kernel.whole_by_columns, x)
        return functools.partial(site.owner, x)

    def cutting_kernel(self, i: int, rows: int) -> DecodeKernel | None:
        """The kernel that runs cut calls of site i, if they are to run by one."""
        kernel, threads = self._runtime.weights.kernel(i), kernel_threads()
        if not isinstance(kernel, CpuFFN):
            return kernel if rows <= MAX_ROWS else None
        return kernel if self.cut_by_kernel(kernel, rows, threads) else None

    def cut(self, i: int, x: Tensor, kernel: DecodeKernel | None, plan: LevelPlan | None = None) -> Call:
        """Site i cut, at the typical level where no plan is given."""
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        rows, site = x.shape[0], runtime.sites[i]
        cut = SiteCut(
            points=policy.schedule.points[i],
            plan=plan or LevelPlan.same(rows, policy.typical_level, policy.n_levels),
            importance=runtime.weights.importance(i),
            compensation=None if policy.compensation is None else policy.compensation[i],
            engine=runtime.engine,
            record=_forget,
            kernel=kernel,
            strip_planner=runtime.strip_planner,
        )
        if site.experts is not None:
            kernels = runtime.weights.expert_kernels(i)
            return functools.partial(site.experts.output, _experts_input(site.experts, x), cut, kernels)
        return functools.partial(cut_ffn, x, site.weights(), cut)


def _measured_with(rows: int) -> int:
    """Rows of the calls that calls of so many are judged by."""
    return next((some for some in MEASURED_WITH if rows <= some), MEASURED_WITH[-1])


def _ffn_shape(kernel: CpuFFN) -> tuple[object, ...]:
    return "ffn", kernel.intermediate_size, kernel.hidden_size, kernel.dtype, kernel.by_units


def _kernels_take(rows: int) -> bool:
    """Whether kernels can run so many rows beside torch: some at once, more in turns on its threads."""
    return rows <= MAX_ROWS or kernels_join_torch()


@torch.no_grad()
def _linear_times(alike: Sequence[DecodeLinear], rows: int) -> _Times:
    """Times of linear maps of one shape; a kernel's less what it gains in the middle of a step."""
    x = noise(rows, alike[0].shape[1]).to(alike[0].shape[2])
    if not _kernels_take(rows) or any(linear.by_kernel(x) is None for linear in alike):
        return _MODULE
    kernels = [functools.partial(linear.by_kernel, x) for linear in alike]
    modules = [functools.partial(linear.original, x) for linear in alike]
    ours, theirs = timed_calls.interleaved(in_turns(kernels, modules), x.device)
    return _Times(ours - LINEAR_MARGIN_S, math.inf, theirs)


@torch.no_grad()
def _whole_times(alike: Sequence[tuple[CpuFFN, nn.Module]], rows: int) -> _Times:
    """Times of whole FFNs of one shape."""
    first = alike[0][0]
    x = noise(rows, first.hidden_size).to(first.dtype)
    calls: dict[Way, Sequence[Call]] = {}
    by_columns = columns.may_pay(rows, first.weights.up)
    # A machine with products of a low precision has no use for kernels in turns.
    if _kernels_take(rows) and not (rows > MAX_ROWS and by_columns):
        calls["kernel"] = [functools.partial(kernel.whole, x) for kernel, _ in alike]
    if by_columns:
        calls["columns"] = [functools.partial(kernel.whole_by_columns, x) for kernel, _ in alike]
    if not calls:
        return _MODULE
    # Outside a forward pass an owner's own forward runs.
    calls["module"] = [functools.partial(owner, x) for _, owner in alike]
    seconds = dict(zip(calls, timed_calls.interleaved(in_turns(*calls.values()), x.device), strict=True))
    return _Times(seconds.get("kernel", math.inf), seconds.get("columns", math.inf), seconds["module"])


def _experts_input(experts: Experts, x: Tensor) -> tuple[Any, ...]:
    """Arguments of a module of experts for x [rows, d]: other experts for each row as far as there are any, of equal
    weight."""
    rows, top_k, count = x.shape[0], experts.top_k, experts.count
    index = torch.arange(rows * top_k).remainder(count).view(rows, top_k)
    return experts.reading.arguments(count, x, index.to(x.device), x.new_full((rows, top_k), 1 / top_k))


def _forget(**_: object) -> None:
    """A record that nobody keeps."""
