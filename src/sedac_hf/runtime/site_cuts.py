"""What each FFN makes of the running pass's levels: its cut, or in a decode step its output by a compiled kernel."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from sedac_hf.ffn.deciders import Decider
from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.contract import Compensation, DecodeKernel, OperatingPoint, SiteCut
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.strips.columns import LEAST_TOKENS
from sedac_hf.runtime.forward_pass import ForwardPass, current_pass

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


class _KnownCut(NamedTuple):
    """A site's last cut, and what it was made of."""

    plan: LevelPlan
    points: tuple[OperatingPoint, ...]
    compensation: Compensation | None
    kernel: DecodeKernel | None
    shadow: Decider | None
    engine: str
    cut: SiteCut | None


class SiteCuts:
    """The cuts of a runtime's sites. A decode step is short: what is the same from step to step is made once."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._few: dict[bytes, LevelPlan] = {}
        self._known: list[_KnownCut | None] = [None] * len(runtime.sites)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_known": [None] * len(self._known),
        }  # they hold kernels, which are made of addresses

    def forget(self) -> None:
        """Let the kernels go that are remembered: weights have moved, and a kernel may hold what they were."""
        self._known = [None] * len(self._known)

    def cut(self, i: int) -> SiteCut | None:
        """What site i is to do in the running pass; None: run untouched."""
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or state.whole or state.n_tokens == 0:
            return None
        return self._cut(i, state, self._kernel(i, state))

    def _kernel(self, i: int, state: ForwardPass) -> DecodeKernel | None:
        """The compiled kernel that may run a cut call of site i."""
        if state.n_tokens > MAX_ROWS and not state.many_threads:
            return None
        kernel = self._runtime.weights.kernel(i)
        if isinstance(kernel, CpuFFN):
            return kernel if self._cuts_by_kernel(kernel, state) else None
        return kernel if state.n_tokens <= MAX_ROWS else None

    def _cuts_by_kernel(self, kernel: CpuFFN, state: ForwardPass) -> bool:
        """Whether the kernel runs this pass's cut calls, where it can; with few rows nothing else reads as little."""
        if state.n_tokens < LEAST_TOKENS or not state.by_time:
            return True
        threads = state.threads or state.many_threads
        return self._runtime.kernel_choice.cut_by_kernel(kernel, state.n_tokens, threads)

    def uneven(self, i: int, n_tokens: int) -> SiteCut | None:
        """The cut of a call of site i that has another number of rows than the pass has tokens, so that whose row is
        whose is not known: where all tokens have one operating point, that; else None."""
        runtime, state = self._runtime, current_pass.get()
        if state is None or state.runtime is not runtime or state.whole or n_tokens == 0:
            return None
        forced = runtime.forcing
        if forced is not None and forced.points is not None:
            alike = True
        elif runtime.segments[i] < 0:
            alike = state.prompt is None
        else:
            alike = forced is not None and isinstance(forced.levels, int)
        if not alike:
            return None
        if state.uneven is None:
            state.uneven = {}
        if n_tokens not in state.uneven:
            state.uneven[n_tokens] = replace(state, n_tokens=n_tokens, fixed_plans={}, uneven=None)
        few = state.uneven[n_tokens]
        return self._cut(i, few, self._runtime.weights.kernel(i) if n_tokens <= MAX_ROWS else None)

    def _cut(self, i: int, state: ForwardPass, kernel: DecodeKernel | None) -> SiteCut | None:
        runtime = self._runtime
        plan, points, compensation = self._resolve(i, state)
        if plan is None or plan.uniform == plan.n_levels:
            return None
        shadow = runtime.weights.shadows[i]
        known = self._known[i]
        if (
            known is None
            or known.plan is not plan
            or known.points is not points
            or known.compensation is not compensation
            or known.kernel is not kernel
            or known.shadow is not shadow
            or known.engine != runtime.engine
        ):
            cut = self._make_cut(i, plan, points, compensation, kernel, shadow)
            known = self._known[i] = _KnownCut(plan, points, compensation, kernel, shadow, runtime.engine, cut)
        return known.cut

    def _make_cut(
        self,
        i: int,
        plan: LevelPlan,
        points: tuple[OperatingPoint, ...],
        compensation: Compensation | None,
        kernel: DecodeKernel | None,
        shadow: Decider | None,
    ) -> SiteCut | None:
        runtime = self._runtime
        whole = OperatingPoint(runtime.sites[i].intermediate_size)
        used = [points[level] for level in np.unique(plan.levels)]
        if all(point == whole for point in used):
            return None
        decides = shadow is not None and any(point.importance_min > 0 for point in used)
        return SiteCut(
            points=points,
            plan=plan,
            importance=shadow.importance if decides and shadow is not None else None,
            compensation=compensation,
            engine="reference" if runtime.policy is not None and runtime.policy.cut == "mask" else runtime.engine,
            record=functools.partial(self._record, i, plan, compensation, decides),
            kernel=kernel,
            strip_planner=runtime.strip_planner,
        )

    def decoded(self, i: int, x: Tensor) -> Tensor | None:
        """The FFN of site i for x [..., d] of a decode step by its compiled kernel, cut or whole; None: the usual way.
        Of many rows the whole FFN, where that is quicker.

        A step comes here for each of its FFNs, each time with caches that the weights have swept, so that the same
        lines of Python take several times as long as alone: nothing is worked out that an earlier step has.
        """
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or not state.n_tokens:
            return None
        if not state.threads:
            if not state.many_threads:
                return None
            # Within a pass that cuts some FFNs stay whole: those before the first checkpoint, say.
            whole = state.whole or self._cut(i, state, self._kernel(i, state)) is None
            return self._many(i, x, state) if whole else None
        kernel = runtime.weights.kernel(i)
        if not isinstance(kernel, CpuFFN):  # the others do not run alone
            return None
        if not kernel.accepts(x) or x.numel() != state.n_tokens * kernel.hidden_size:
            return None
        if runtime.sites[i].owner.training:  # dropout is the class's own affair
            return None
        cut = None
        if not state.whole:
            cut = self._cut(i, state, kernel if self._cuts_by_kernel(kernel, state) else None)
        threads = state.threads
        if cut is not None:
            if not cut.kernel_alone:
                return None
            y, needed, read = kernel.run_accepted(x, cut.token_points, threads)
            state.decoded.append((i, "rust", cut.importance is not None, needed, read))
            return y
        if state.by_time:
            way = runtime.kernel_choice.whole_way(kernel, state.n_tokens, threads)
            if way != "kernel":
                return self._by_columns(i, x, state, kernel) if way == "columns" else None
        y, needed, read = kernel.run_accepted(x, kernel.whole_points[: state.n_tokens], threads)
        state.decoded.append((i, "rust, whole", False, needed, read))
        return y

    def _many(self, i: int, x: Tensor, state: ForwardPass) -> Tensor | None:
        """The whole FFN in a pass of more rows than a kernel takes at once."""
        runtime, threads = self._runtime, state.many_threads
        kernel = runtime.weights.kernel(i)
        if not isinstance(kernel, CpuFFN):
            return None
        way = runtime.kernel_choice.whole_way(kernel, state.n_tokens, threads) if state.by_time else "kernel"
        if (
            way == "module"
            or not kernel.accepts(x, in_turns=True)
            or x.numel() != state.n_tokens * kernel.hidden_size
            or runtime.sites[i].owner.training
        ):
            return None
        if way == "columns":
            return self._by_columns(i, x, state, kernel)
        units = kernel.intermediate_size
        state.decoded.append((i, "rust, whole", False, units * state.n_tokens, units))
        return kernel.whole_in_turns(x, threads)

    def _by_columns(self, i: int, x: Tensor, state: ForwardPass, kernel: CpuFFN) -> Tensor:
        units = kernel.intermediate_size
        state.decoded.append((i, "columns, whole", False, units * state.n_tokens, units))
        return kernel.whole_by_columns(x)

    def _resolve(
        self, i: int, state: ForwardPass
    ) -> tuple[LevelPlan | None, tuple[OperatingPoint, ...], Compensation | None]:
        """The plan in force at site i, what its levels mean there, and what stands in for the rest."""
        runtime = self._runtime
        whole = OperatingPoint(runtime.sites[i].intermediate_size)
        forced = runtime.forcing
        if forced is not None and forced.points is not None:
            point = forced.points[i]
            compensation = None if forced.compensation is None else forced.compensation[i]
            plan = None if point is None else self._fixed_plan(state, "point", 2)
            return plan, (OperatingPoint(0), point or whole, whole), compensation
        policy = runtime.running_policy
        if policy is None:
            return None, (), None
        compensation = None if policy.compensation is None else policy.compensation[i]
        if runtime.segments[i] < 0:
            plan = self._fixed_plan(state, "head", policy.n_levels)
        elif forced is not None:
            plan = self._fixed_plan(state, "level", policy.n_levels)
        else:
            # A checkpoint that was left out decided nothing for what is behind it.
            plan = state.plan if runtime.segments[i] < state.next_checkpoint else None
        return plan, policy.schedule.points[i], compensation

    def _fixed_plan(self, state: ForwardPass, kind: str, n_levels: int) -> LevelPlan:
        """Levels that wait for no checkpoint; made once per pass, since each FFN call asks several times."""
        forced = self._runtime.forcing
        if kind not in state.fixed_plans:
            if kind == "level" and forced is not None and forced.levels is not None:
                levels = np.broadcast_to(np.asarray(forced.levels, np.uint8), (state.n_tokens,)).copy()
                plan = LevelPlan.of(levels, n_levels)
            elif kind == "head" and state.prompt is not None:  # prompt tokens whole, the others at the fixed point
                plan = LevelPlan.of(np.where(state.prompt, n_levels, 1).astype(np.uint8), n_levels)
            else:  # level 1 stands for the one point; so do all levels below the top, before the first checkpoint
                plan = self.plan(np.ones(state.n_tokens, np.uint8), n_levels)
            state.fixed_plans[kind] = plan
        return state.fixed_plans[kind]

    def plan(self, levels: np.ndarray, n_levels: int | None = None) -> LevelPlan:
        """The batch sorted by level, by the controller where there is one; for few tokens the same object again."""
        few = len(levels) <= MAX_ROWS
        key = bytes((n_levels or 0,)) + levels.tobytes() if few else b""
        plan = self._few.get(key) if few else None
        if plan is None:
            plan = (
                LevelPlan(levels, *self._runtime.controller.plan(levels))
                if n_levels is None
                else LevelPlan.of(levels, n_levels)
            )
            if few:
                self._few[key] = plan
        return plan

    def _record(
        self,
        i: int,
        plan: LevelPlan,
        compensation: Compensation | None,
        shadow: bool,
        *,
        engine: str,
        tokens: int,
        needed: int | Tensor,
        read: int,
        computed: int,
        whole_read: int | None = None,
    ) -> None:
        state = current_pass.get()
        if state is not None:
            state.recorded.add(i)
        extra = extra_read = 0
        if compensation is not None:
            per_level = plan.at_least - np.append(plan.at_least[1:], 0)
            for level in np.flatnonzero(per_level[:-1]):
                parameters = compensation.parameters(int(level))
                extra += int(per_level[level]) * parameters
                extra_read += parameters
        self._runtime.tally.ffn(
            i,
            engine=engine,
            tokens=tokens,
            needed=needed,
            read=read,
            computed=computed,
            shadow=shadow,
            extra_parameters=extra,
            extra_read=extra_read,
            whole_read=whole_read,
        )
