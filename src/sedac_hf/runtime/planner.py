"""What one ``generate`` call does, decided once before it starts, from times measured here: cut or full width, in
which layout the weights lie then, and which linear maps run by the compiled kernels.

A measurement takes a fraction of a second, is made once per number of rows, and is kept until policy, device or dtype
change.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.ffn.experts import Experts
from sedac_hf.ops import cut_ffn
from sedac_hf.ops.compiled import MAX_ROWS, MOST_IN_TURNS
from sedac_hf.ops.contract import SiteCut
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.threads import kernel_threads, kernels_join_torch
from sedac_hf.runtime.decode_linears import DecodeLinear, Shape

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

Call = Callable[[], object]

# In turns with itself a map of torch's finds its code in the caches; in the middle of a decode step it does not, and
# takes so much longer (128 x 896 in bf16: 22 us, and 29 us in a step), the kernels hardly (11 us and 12 us).
LINEAR_MARGIN_S = 10e-6
LEAST_REPEATS, MOST_REPEATS = 7, 60
SECONDS = 0.1  # of one comparison; a call that takes long is repeated less often
FEW_REPEATS, MOST_SECONDS = 3, 0.5  # and one that takes very long
MIN_GAIN = 0.1  # share of the FFN time: less is within a noisy machine's reach


class GenerationPlanner:
    """Compares, per number of rows, ways to run one decode step; probes and controller count against cutting."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._known: dict[tuple[object, ...], tuple[bool, str]] = {}
        self._by_kernel: dict[tuple[object, ...], bool] = {}

    def choose(self, rows: int, *, consistent: bool = False) -> tuple[bool, str]:
        """(cut?, reason) for decode steps of ``rows`` sequences; ``consistent``: cut whatever it costs, unmeasured.

        The weights are laid out for it, where nobody else reads them.
        """
        runtime = self._runtime
        if runtime.policy is None:
            return False, "not calibrated"
        if not runtime.attached:
            return False, "disabled"  # and weights lie otherwise than when they are cut: nothing to measure
        if runtime.sharded:
            return True, "the ranks of a tensor-parallel base must choose alike, so nothing is measured"
        if rows == 0:
            return False, "no rows"
        cut, reason = self._choice(rows, consistent)
        runtime.layouts.follow(cut=cut)
        if not consistent and rows <= MAX_ROWS:
            self._compare_kernels(rows)
        return cut, reason

    def _choice(self, rows: int, consistent: bool) -> tuple[bool, str]:
        runtime = self._runtime
        assert runtime.policy is not None
        if runtime.whole_depth:
            return False, "asked for"
        if consistent:
            return True, "asked for"
        weight = runtime.sites[-1].weight
        key = (runtime.policy.cut, runtime.policy.schedule, rows, weight.device, weight.dtype, kernel_threads())
        if key not in self._known:
            self._known[key] = self._compare_widths(rows)
        return self._known[key]

    def choose_captured(
        self, rows: int, *, consistent: bool = False, device_type: str | None = None
    ) -> tuple[bool, str] | None:
        """The same for decode steps by a captured graph, whose times are not those of the eager engines: by what it
        can skip. None where a graph can't serve the call, so that the choice for eager steps stands.

        device_type: to choose for; default: where the weights are.
        """
        runtime, captured = self._runtime, self._runtime.captured
        if not runtime.attached or runtime.forcing is not None or runtime.on_decision is not None:
            return None
        if captured.prepare() is not None:
            return None
        if consistent:
            return True, "asked for"
        device_type = device_type or runtime.sites[-1].weight.device.type
        governed = [site for site, segment in zip(captured.sites, runtime.segments, strict=True) if segment >= 0]
        if not any(site.skips(rows, device_type) for site in governed):
            return False, "captured graph: its FFNs run by masking, which saves nothing"
        if device_type == "cpu":
            return None  # the same kernels as in eager steps, which were timed
        return True, "captured graph: what is skipped is not known to the host, so its time is not measured"

    # ---------------------------------------------------------------- kernel or module

    def linear_by_kernel(self, shape: Shape, rows: int, threads: int) -> bool:
        """Whether linear maps of this shape run by the kernel. Where that was not measured: yes, but not in turns."""
        return self._faster(shape, rows, threads)

    def whole_by_kernel(self, kernel: CpuFFN, rows: int, threads: int) -> bool:
        """The same for whole FFNs."""
        return self._faster(_ffn_shape(kernel), rows, threads)

    def _faster(self, shape: tuple[object, ...], rows: int, threads: int) -> bool:
        if rows <= MAX_ROWS:
            return self._by_kernel.get((shape, rows, threads), True)
        return rows <= MOST_IN_TURNS and self._by_kernel.get((shape, MOST_IN_TURNS, threads), False)

    def compare_in_turns(self, tokens: int) -> None:
        """Before passes of so many tokens: measure whether kernels do better in turns, once for all such numbers. The
        fewer rows, the more of a product's time is reading weights, so what wins with the most rows wins with less."""
        runtime = self._runtime
        if MAX_ROWS < tokens <= MOST_IN_TURNS and runtime.attached and not runtime.sharded and kernels_join_torch():
            self._compare_kernels(MOST_IN_TURNS)

    def _compare_kernels(self, rows: int) -> None:
        runtime = self._runtime
        if rows > MOST_IN_TURNS or not runtime.weights.uses_kernels:
            return
        threads = kernel_threads()
        linears: dict[tuple[object, ...], list[DecodeLinear]] = {}
        for linear in runtime.decode_linears:
            linears.setdefault((linear.shape, rows, threads), []).append(linear)
        for key, alike in linears.items():
            if key not in self._by_kernel and (rows <= MAX_ROWS or len(alike) > 1):  # the head sees few rows
                self._by_kernel[key] = _linear_is_faster(alike, rows)
        sites: dict[tuple[object, ...], list[tuple[CpuFFN, nn.Module]]] = {}
        for i, site in enumerate(runtime.sites):
            kernel = runtime.weights.kernel(i)
            if isinstance(kernel, CpuFFN):  # the only one that runs whole FFNs
                sites.setdefault((_ffn_shape(kernel), rows, threads), []).append((kernel, site.owner))
        for key, of_shape in sites.items():
            if key not in self._by_kernel:
                x = _noise(rows, of_shape[0][0].hidden_size).to(of_shape[0][0].dtype)
                ours, theirs = interleaved(
                    in_turns(
                        [functools.partial(kernel.whole, x) for kernel, _ in of_shape],
                        # Outside a forward pass an owner's own forward runs.
                        [functools.partial(owner, x) for _, owner in of_shape],
                    ),
                    x.device,
                )
                self._by_kernel[key] = ours <= theirs

    # ---------------------------------------------------------------- cut or full width

    def _compare_widths(self, rows: int) -> tuple[bool, str]:
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        governed = [i for i, segment in enumerate(runtime.segments) if segment >= 0]
        timed = [i for i in governed if runtime.sites[i].plain_forward or runtime.sites[i].experts is not None]
        if policy.cut == "mask" or len(timed) < len(governed) or not governed:
            return False, "the FFNs of this model run by masking, which saves nothing"
        site = runtime.sites[timed[0]]
        x = _noise(rows, site.hidden_size).to(site.weight)
        with runtime.layouts.side_by_side(timed) as (as_usual, by_units):
            if rows <= MAX_ROWS:
                self._compare_kernels(rows)
            calls = in_turns([self._whole(i, x) for i in as_usual], [self._cut(i, x) for i in by_units])
            whole_time, cut_time = interleaved(calls, x.device)
        (decide_time,) = interleaved([lambda: self._decide_once(x.float(), rows)], x.device)
        whole_step = whole_time * len(governed)
        gain = whole_step - cut_time * len(governed) - decide_time * len(runtime.checkpoint_layers)
        figures = f"{gain * 1e6:+.0f} us of {whole_step * 1e6:.0f} us FFN time per step at {rows} row(s), measured"
        if gain < MIN_GAIN * whole_step:
            return False, f"cutting does not pay: {figures}"
        return True, f"cutting pays: {figures}"

    def _whole(self, i: int, x: Tensor) -> Call:
        """Site i at full width, as it would run."""
        runtime = self._runtime
        rows, site = x.shape[0], runtime.sites[i]
        if site.experts is not None:
            return functools.partial(site.owner, *_experts_input(site.experts, x))
        kernel = runtime.weights.kernel(i) if rows <= MAX_ROWS else None
        if isinstance(kernel, CpuFFN) and kernel.accepts(x) and self.whole_by_kernel(kernel, rows, kernel_threads()):
            return functools.partial(kernel.whole, x)
        return functools.partial(site.owner, x)

    def _cut(self, i: int, x: Tensor) -> Call:
        """Site i cut at the typical level."""
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        rows, site = x.shape[0], runtime.sites[i]
        kernel = runtime.weights.kernel(i) if rows <= MAX_ROWS else None
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

    @torch.no_grad()
    def _decide_once(self, x: Tensor, rows: int) -> None:
        runtime = self._runtime
        assert runtime.probes is not None
        state = runtime.controller.begin(rows)
        if runtime.probes_decide:
            risk = runtime.probes.risk(runtime.checkpoint_layers[0], x).to("cpu", torch.float32).numpy()
        else:
            risk = np.zeros(rows, np.float32)
        runtime.controller.plan(runtime.controller.step(state, 0, risk))


def _ffn_shape(kernel: CpuFFN) -> tuple[object, ...]:
    return "ffn", kernel.intermediate_size, kernel.hidden_size, kernel.dtype, kernel.by_units


def _linear_is_faster(alike: Sequence[DecodeLinear], rows: int) -> bool:
    """Whether the kernels of linear maps of one shape take no longer than the modules themselves."""
    with torch.no_grad():
        x = _noise(rows, alike[0].shape[1]).to(alike[0].shape[2])
        if any(linear.by_kernel(x) is None for linear in alike):
            return False
        ours, theirs = interleaved(
            in_turns(
                [functools.partial(linear.by_kernel, x) for linear in alike],
                [functools.partial(linear.original, x) for linear in alike],
            ),
            x.device,
        )
    return ours <= theirs + LINEAR_MARGIN_S


def in_turns(*alternatives: Sequence[Call]) -> list[Call]:
    """One call per alternative, which goes from layer to layer: a decoder's layers find their weights in memory.

    Each starts at a place of its own. On the layer that another has just read it would find the weights in the
    last-level cache, which holds an FFN on servers.
    """
    calls: list[Call] = []
    for n, layers in enumerate(alternatives):
        start = n * len(layers) // len(alternatives)
        turns = itertools.cycle([*layers[start:], *layers[:start]])
        calls.append(functools.partial(_call_next, turns))
    return calls


def _call_next(turns: Iterator[Call]) -> object:
    return next(turns)()


def _noise(rows: int, size: int) -> Tensor:
    """Activations to time with; drawn apart, since `generate` may be about to sample."""
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


def _experts_input(experts: Experts, x: Tensor) -> tuple[Any, ...]:
    """Arguments of a module of experts for x [rows, d]: other experts for each row as far as there are any, of equal
    weight."""
    rows, top_k, count = x.shape[0], experts.top_k, experts.count
    index = torch.arange(rows * top_k).remainder(count).view(rows, top_k)
    return experts.reading.arguments(count, x, index.to(x.device), x.new_full((rows, top_k), 1 / top_k))


def _forget(**_: object) -> None:
    """A record that nobody keeps."""


@torch.no_grad()
def interleaved(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Median seconds of each call, taken in turns so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for repeat in range(MOST_REPEATS + 1):
        spent = time.perf_counter() - started
        if (repeat > LEAST_REPEATS and spent > SECONDS) or (repeat > FEW_REPEATS and spent > MOST_SECONDS):
            break
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]
