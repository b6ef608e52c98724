"""What happens inside one forward pass: levels at the checkpoints, and what each FFN makes of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.contract import Compensation, DecodeKernel, LevelPlan, OperatingPoint, SiteCut
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.threads import begin_step, end_step, kernel_threads
from sedac_hf.runtime.decode_probes import DecodeProbes
from sedac_hf.runtime.forward_pass import ForwardPass, call_shape, current_generation, current_pass
from sedac_hf.runtime.observation import hidden_of

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


class _KnownCut(NamedTuple):
    """A site's last cut, and what it was made of."""

    plan: LevelPlan
    points: tuple[OperatingPoint, ...]
    compensation: Compensation | None
    kernel: DecodeKernel | None
    shadow: Shadow | ExactGate | None
    engine: str
    cut: SiteCut | None


class Execution:
    """The callbacks that a runtime attaches to its model."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        # A decode step is short: what is the same from step to step is made once.
        self._few: dict[bytes, LevelPlan] = {}
        self._cuts: list[_KnownCut | None] = [None] * len(runtime.sites)
        self._probes = DecodeProbes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cuts": [None] * len(self._cuts)}  # they hold kernels, which are made of addresses

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward: open a pass."""
        runtime = self._runtime
        shape = call_shape(args, dict(kwargs))
        state = ForwardPass(runtime, 0 if shape is None else shape[0] * shape[1], previous=current_pass.get())
        current_pass.set(state)
        if shape is None:
            state.whole = True
            runtime.tally.fail_safe(1)
            return
        runtime.tally.begin(state.n_tokens)
        generation = current_generation.get()
        ours = generation is not None and generation.runtime is runtime
        if runtime.weights.uses_kernels and state.n_tokens <= MAX_ROWS and not torch.is_autocast_enabled("cpu"):
            if runtime.decode_linears:
                state.torch_alone = begin_step()
            state.threads = kernel_threads()
            state.by_time = generation is not None and ours and not generation.consistent
        if runtime.forcing is not None:
            return
        if generation is not None and ours:
            state.whole = generation.full_width
            state.prompt = generation.prompt_mask(*shape, dict(kwargs))
        if runtime.whole_depth or runtime.policy is None or (state.prompt is not None and bool(state.prompt.all())):
            state.whole = True
        if not state.whole:
            state.controller_state = runtime.controller.begin(state.n_tokens)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the model's forward, also one that raised (then ``output`` is None): close the pass."""
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime:
            return
        current_pass.set(state.previous)
        if state.torch_alone:
            end_step()
        if output is None or state.n_tokens == 0:  # the forward raised, or there was nothing to read
            return
        counted = state.counted
        for idx, risks, exited, ratio in state.decided:
            failed = int(np.count_nonzero(~np.isfinite(risks[counted])))
            runtime.tally.checkpoint(idx, exited[counted], ratio[counted], failed)
        for i, is_cut, decided, needed, read in state.decoded:
            state.recorded.add(i)
            engine = "rust" if is_cut else "rust, whole"
            runtime.tally.ffn(
                i, engine=engine, tokens=state.n_tokens, needed=needed, read=read, computed=needed, shadow=decided
            )
        for i, site in enumerate(runtime.sites):
            if i not in state.recorded:
                units = site.intermediate_size
                tokens = state.n_tokens
                runtime.tally.ffn(
                    i, engine="whole", tokens=tokens, needed=units * tokens, read=units, computed=units * tokens
                )

    def decide(self, idx: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a checkpoint layer: risks, levels, and the plan of the FFNs up to the next checkpoint."""
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or state.whole or runtime.forcing is not None:
            return
        hidden = hidden_of(output)
        if hidden is None or hidden.shape[-1] != runtime.hidden_size or hidden[..., 0].numel() != state.n_tokens:
            state.whole = True  # a layer output that cannot be read: full width for the rest of the pass
            runtime.tally.fail_safe(state.n_tokens)
            return
        if state.n_tokens == 0:
            return
        values = self._risks(idx, hidden, state.n_tokens)
        controller = runtime.controller
        levels = controller.step(state.controller_state, idx, values)
        decided = state.controller_state
        if runtime.adaptive_thresholds:
            controller.update_threshold(runtime.checkpoint_layers[idx], values[state.counted])
        state.decided.append((idx, values, decided.exited, decided.ratio))
        if state.prompt is not None:
            levels = np.where(state.prompt, np.uint8(controller.n_levels), levels).astype(np.uint8)
        if runtime.on_decision is not None:
            runtime.on_decision(
                idx, np.where(levels == controller.n_levels, 0, decided.ratio).astype(np.float32), levels
            )
        state.plan = self._plan(levels)

    def _risks(self, idx: int, hidden: Tensor, n_tokens: int) -> np.ndarray:
        """float32 [n_tokens]; zeros where no risk changes a level."""
        runtime = self._runtime
        if not runtime.probes_decide:
            return np.zeros(n_tokens, np.float32)
        probes = runtime.probes
        assert probes is not None
        state = current_pass.get()
        if state is not None and state.threads and not runtime.sharded:
            risks = self._probes.risks(probes, runtime.checkpoint_layers[idx], hidden)
            if risks is not None:
                runtime.tally.probe(probes.parameters_per_token, n_tokens)
                return risks
        with torch.no_grad():
            risk = probes.risk(runtime.checkpoint_layers[idx], hidden.reshape(-1, runtime.hidden_size))
            shard = runtime.sites[0].shard
            risk = risk if shard is None else shard.agreed(risk)
        runtime.tally.probe(probes.parameters_per_token, n_tokens)
        return np.ascontiguousarray(risk.detach().to("cpu", torch.float32).numpy())

    def site_cut(self, i: int) -> SiteCut | None:
        """What site i is to do in the running pass; None: run untouched."""
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or state.whole or state.n_tokens == 0:
            return None
        return self._cut(i, state, runtime.weights.kernel(i) if state.n_tokens <= MAX_ROWS else None)

    def _cut(self, i: int, state: ForwardPass, kernel: DecodeKernel | None) -> SiteCut | None:
        runtime = self._runtime
        plan, points, compensation = self._resolve(i, state)
        if plan is None or plan.uniform == plan.n_levels:
            return None
        shadow = runtime.weights.shadows[i]
        known = self._cuts[i]
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
            known = self._cuts[i] = _KnownCut(plan, points, compensation, kernel, shadow, runtime.engine, cut)
        return known.cut

    def _make_cut(
        self,
        i: int,
        plan: LevelPlan,
        points: tuple[OperatingPoint, ...],
        compensation: Compensation | None,
        kernel: DecodeKernel | None,
        shadow: Shadow | ExactGate | None,
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

    def site_decoded(self, i: int, x: Tensor) -> Tensor | None:
        """The FFN of site i for x [..., d] of a decode step by its compiled kernel, cut or whole; None: the usual way.

        A step comes here for each of its FFNs, each time with caches that the weights have swept, so that the same
        lines of Python take several times as long as alone: nothing is worked out that an earlier step has.
        """
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or not state.threads or not state.n_tokens:
            return None
        kernel = runtime.weights.kernel(i)
        if not isinstance(kernel, CpuFFN):  # the others do not run alone
            return None
        if not kernel.accepts(x) or x.numel() != state.n_tokens * kernel.hidden_size:
            return None
        if runtime.sites[i].owner.training:  # dropout is the class's own affair
            return None
        cut = None if state.whole else self._cut(i, state, kernel)
        threads = state.threads
        if cut is not None:
            if not cut.kernel_alone:
                return None
            y, needed, read = kernel.run_accepted(x, cut.token_points, threads)
            state.decoded.append((i, True, cut.importance is not None, needed, read))
            return y
        if state.by_time and not runtime.planner.whole_by_kernel(kernel, state.n_tokens, threads):
            return None
        y, needed, read = kernel.run_accepted(x, kernel.whole_points[: state.n_tokens], threads)
        state.decoded.append((i, False, False, needed, read))
        return y

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
            plan = state.plan
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
                plan = self._plan(np.ones(state.n_tokens, np.uint8), n_levels)
            state.fixed_plans[kind] = plan
        return state.fixed_plans[kind]

    def _plan(self, levels: np.ndarray, n_levels: int | None = None) -> LevelPlan:
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
        )
