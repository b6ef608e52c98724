"""The runtime: probes, controller and cut FFNs attached to one Hugging Face decoder.

It works on any causal LM of transformers, wrapped or not; `SedacForCausalLM` owns one, calibration drives one. Nothing
of the model is changed before `install` (or `attach`), and everything is undone by `uninstall`.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.configuration import default_checkpoint_layers
from sedac_hf.control import make_controller
from sedac_hf.control.base import Controller
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.coupled import forward_replacements
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.sites import find_sites
from sedac_hf.ops.contract import Compensation, LevelPlan, OperatingPoint, SiteCut
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime.forward_pass import (
    ForwardPass,
    GenerationCall,
    call_shape,
    current_generation,
    current_pass,
    prompt_mask,
)
from sedac_hf.runtime.hooks import Attachment
from sedac_hf.runtime.observation import OnCheckpoint, OnDecision, OnFFN, hidden_of, observing
from sedac_hf.runtime.planner import GenerationPlanner
from sedac_hf.runtime.stats import SedacStats, Tally
from sedac_hf.runtime.weights import PreparedWeights


class SedacRuntime:
    """Find a decoder's FFNs, and run them cut as a policy says.

    Args:
        model: a causal LM of transformers; its forward takes ``input_ids`` or ``inputs_embeds``.
        checkpoint_layers: decoder layers with a probe, ascending, each below the number of layers; default: n/4, n/2
            and 3n/4.
        controller: "auto", "rust" or "python".
        engine: "auto", "reference", "strips" or "gather".
        adaptive_thresholds: move the thresholds with the risks seen at inference.

    Raises:
        UnsupportedModelError: no FFN that can be cut was found.
        ConfigError: a checkpoint layer does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint_layers: Sequence[int] | None = None,
        *,
        controller: str = "auto",
        engine: str = "auto",
        adaptive_thresholds: bool = False,
    ) -> None:
        found = find_sites(model)
        n_layers = len(found.decoder_layers)
        checkpoint_layers = default_checkpoint_layers(n_layers) if checkpoint_layers is None else checkpoint_layers
        if not checkpoint_layers or list(checkpoint_layers) != sorted(set(checkpoint_layers)):
            raise ConfigError(f"`checkpoint_layers` must be ascending and not empty, got {list(checkpoint_layers)}")
        if checkpoint_layers[0] < 0 or checkpoint_layers[-1] >= n_layers:
            raise ConfigError(
                f"`checkpoint_layers` must be in 0..{n_layers - 1} for this decoder of {n_layers} layers, "
                f"got {list(checkpoint_layers)}"
            )
        self.model = model
        self.decoder_layers = found.decoder_layers
        self.hidden_size = found.hidden_size
        self.sites = found.sites
        self.checkpoint_layers = tuple(checkpoint_layers)
        # The decision after checkpoint i governs the layers behind it up to and including checkpoint i + 1's.
        self.segments = tuple(bisect_left(self.checkpoint_layers, site.layer_idx) - 1 for site in self.sites)
        self.engine = engine
        self.adaptive_thresholds = adaptive_thresholds
        self.policy: Policy | None = None
        self.probes: ProbeBank | None = None
        self._controller_choice = controller
        self._controller: Controller | None = None
        self.weights = PreparedWeights(self.sites)
        self._attachment: Attachment | None = None
        self._full_width = 0
        self._forced: _Forced | None = None
        self.on_decision: OnDecision | None = None
        self.planner = GenerationPlanner(self)
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    # ---------------------------------------------------------------- policy

    @property
    def controller(self) -> Controller:
        """The controller of the installed policy."""
        if self._controller is None:
            raise ConfigError("there is no controller before a policy is installed: calibrate first")
        return self._controller

    @property
    def attached(self) -> bool:
        """Whether the model is changed at present."""
        return self._attachment is not None

    def install(self, policy: Policy) -> None:
        """Make a policy the model's: order, shadows, controller and probes, then attach.

        The former policy is taken out first. If something fails, the model is left bare.
        """
        policy.check(self.sites, self.checkpoint_layers)
        self.uninstall()
        try:
            self.policy = policy
            self.probes = policy.probes
            self._controller = make_controller(
                policy.layer_configs,
                controller=self._controller_choice,
                alpha=policy.alpha,
                confidence_decay=policy.confidence_decay,
                soft_exit=policy.soft_exit,
                n_levels=policy.n_levels,
            )
            self.weights.reorder(policy.channel_order)
            if policy.cut == "select":
                self.build_shadows()
            self.attach()
        except BaseException:
            self.uninstall()
            raise
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    def uninstall(self) -> None:
        """Give the model back with its weights bit for bit as they were; harmless when nothing is installed."""
        self.detach()
        self.weights.restore()
        self.policy = self.probes = self._controller = None

    def build_shadows(self) -> None:
        """Make the shadows of all FFNs, from the weights as they are now."""
        self.weights.build_shadows()
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    # ---------------------------------------------------------------- attach

    def attach(self) -> None:
        """Put hooks on the checkpoint layers and around the forward, and make the FFNs cuttable."""
        if self._attachment is not None:
            return
        attachment = Attachment()
        try:
            attachment.around_forward(self.model, self._begin, self._end)
            for idx, layer in enumerate(self.checkpoint_layers):
                attachment.after_forward(self.decoder_layers[layer], functools.partial(self._decide, idx))
            for i, site in enumerate(self.sites):
                attachment.replace_forwards(forward_replacements(site, functools.partial(self._site_cut, i)))
        except BaseException:
            attachment.detach()
            raise
        self._attachment = attachment

    def detach(self) -> None:
        """Take every hook and replaced forward away; the channel order stays."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare model, order restored: its logits are those of the base bit for bit. Not for concurrent use."""
        was_attached = self.attached
        self.detach()
        try:
            with self.weights.natural_order():
                yield
        finally:
            if was_attached:
                self.attach()

    @contextmanager
    def full_width(self) -> Iterator[None]:
        """Every FFN runs whole; hooks and order stay."""
        self._full_width += 1
        try:
            yield
        finally:
            self._full_width -= 1

    @contextmanager
    def forced(
        self,
        points: Sequence[OperatingPoint | None],
        compensation: Sequence[Compensation | None] | None = None,
    ) -> Iterator[None]:
        """Run each FFN at one operating point for all tokens (None: whole), without probes or controller."""
        if len(points) != len(self.sites):
            raise ConfigError(f"one operating point per FFN is needed: {len(self.sites)}, got {len(points)}")
        # Level 1 of a two-level plan stands for the point; compensation tables are indexed the same way.
        if any(point is not None and point.importance_min > 0 for point in points) and not self.weights.has_shadows:
            self.build_shadows()
        with self._force(_Forced(points=tuple(points), compensation=compensation)):
            yield

    @contextmanager
    def forced_levels(self, levels: int | np.ndarray) -> Iterator[None]:
        """Run the governed FFNs at these levels of the installed schedule, one for all tokens or uint8 [n_tokens]."""
        with self._force(_Forced(levels=levels)):
            yield

    @contextmanager
    def _force(self, forced: _Forced) -> Iterator[None]:
        previous, self._forced = self._forced, forced
        bare = not self.attached
        self.attach()
        try:
            yield
        finally:
            self._forced = previous
            if bare:
                self.detach()

    def observe(
        self,
        *,
        on_checkpoint: OnCheckpoint | None = None,
        on_ffn: OnFFN | None = None,
        on_decision: OnDecision | None = None,
    ) -> AbstractContextManager[None]:
        """Show what flows by during a ``with`` block; see `sedac_hf.runtime.observation`."""
        return observing(self, on_checkpoint, on_ffn, on_decision)

    # ---------------------------------------------------------------- one forward pass

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        shape = call_shape(args, dict(kwargs))
        state = ForwardPass(self, 0 if shape is None else shape[0] * shape[1], previous=current_pass.get())
        current_pass.set(state)
        if shape is None:
            state.whole = True
            self.tally.fail_safe(1)
            return
        self.tally.begin(state.n_tokens)
        if self._forced is not None:
            return
        generation = current_generation.get()
        if generation is not None and generation.runtime is self:
            state.whole = generation.full_width
            state.prompt = prompt_mask(*shape, dict(kwargs), generation.prompt_length)
        if self._full_width or self.policy is None or (state.prompt is not None and bool(state.prompt.all())):
            state.whole = True
        if not state.whole:
            state.controller_state = self.controller.begin(state.n_tokens)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = current_pass.get()
        if state is None or state.runtime is not self:
            return
        current_pass.set(state.previous)
        if output is None or state.n_tokens == 0:  # the forward raised, or there was nothing to read
            return
        for i, site in enumerate(self.sites):
            if i not in state.recorded:
                units = site.intermediate_size
                tokens = state.n_tokens
                self.tally.ffn(
                    i, engine="whole", tokens=tokens, needed=units * tokens, read=units, computed=units * tokens
                )

    def _decide(self, idx: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = current_pass.get()
        if state is None or state.runtime is not self or state.whole or self._forced is not None:
            return
        hidden = hidden_of(output)
        if hidden is None or hidden.shape[-1] != self.hidden_size or hidden[..., 0].numel() != state.n_tokens:
            state.whole = True  # a layer output that cannot be read: full width for the rest of the pass
            self.tally.fail_safe(state.n_tokens)
            return
        if state.n_tokens == 0:
            return
        assert self.probes is not None
        with torch.no_grad():
            risk = self.probes.risk(self.checkpoint_layers[idx], hidden.reshape(-1, self.hidden_size))
        values = np.ascontiguousarray(risk.detach().to("cpu", torch.float32).numpy())
        controller = self.controller
        levels = controller.step(state.controller_state, idx, values)
        decided = state.controller_state
        if self.adaptive_thresholds:
            controller.update_threshold(self.checkpoint_layers[idx], values[state.counted])
        counted = state.counted
        failed = int(np.count_nonzero(~np.isfinite(values[counted])))
        self.tally.checkpoint(idx, decided.exited[counted], decided.ratio[counted], failed)
        self.tally.probe(self.probes.parameters_per_token, state.n_tokens)
        if state.prompt is not None:
            levels = np.where(state.prompt, np.uint8(controller.n_levels), levels).astype(np.uint8)
        if self.on_decision is not None:
            self.on_decision(idx, np.where(levels == controller.n_levels, 0, decided.ratio).astype(np.float32), levels)
        state.plan = LevelPlan(levels, *controller.plan(levels))

    def _site_cut(self, i: int) -> SiteCut | None:
        """What site i is to do in the running pass; None: run untouched."""
        state = current_pass.get()
        if state is None or state.runtime is not self or state.whole or state.n_tokens == 0:
            return None
        plan, points, compensation = self._resolve(i, state)
        if plan is None or plan.uniform == plan.n_levels:
            return None
        cached = state.cuts.get(i)
        if cached is not None and cached[0] is plan:
            return cached[1]
        whole = OperatingPoint(self.sites[i].intermediate_size)
        used = [points[level] for level in np.unique(plan.levels)]
        if all(point == whole for point in used):
            return None
        shadow = self.weights.shadows[i] if any(point.importance_min > 0 for point in used) else None
        cut = SiteCut(
            points=points,
            plan=plan,
            importance=None if shadow is None else shadow.importance,
            compensation=compensation,
            engine="reference" if self.policy is not None and self.policy.cut == "mask" else self.engine,
            record=functools.partial(self._record, i, state, plan, compensation, shadow is not None),
        )
        state.cuts[i] = (plan, cut)
        return cut

    def _resolve(
        self, i: int, state: ForwardPass
    ) -> tuple[LevelPlan | None, tuple[OperatingPoint, ...], Compensation | None]:
        """The plan in force at site i, what its levels mean there, and what stands in for the rest."""
        whole = OperatingPoint(self.sites[i].intermediate_size)
        forced = self._forced
        if forced is not None and forced.points is not None:
            point = forced.points[i]
            compensation = None if forced.compensation is None else forced.compensation[i]
            plan = None if point is None else self._fixed_plan(state, "point", 2)
            return plan, (OperatingPoint(0), point or whole, whole), compensation
        policy = self.policy
        if policy is None:
            return None, (), None
        compensation = None if policy.compensation is None else policy.compensation[i]
        if self.segments[i] < 0:
            plan = self._fixed_plan(state, "head", policy.n_levels)
        elif forced is not None:
            plan = self._fixed_plan(state, "level", policy.n_levels)
        else:
            plan = state.plan
        return plan, policy.schedule.points[i], compensation

    def _fixed_plan(self, state: ForwardPass, kind: str, n_levels: int) -> LevelPlan:
        """Levels that wait for no checkpoint; made once per pass, since each FFN call asks several times."""
        if kind not in state.fixed_plans:
            if kind == "level" and self._forced is not None and self._forced.levels is not None:
                levels = np.broadcast_to(np.asarray(self._forced.levels, np.uint8), (state.n_tokens,)).copy()
                plan = LevelPlan.of(levels, n_levels)
            elif kind == "head" and state.prompt is not None:  # prompt tokens whole, the others at the fixed point
                plan = LevelPlan.of(np.where(state.prompt, n_levels, 1).astype(np.uint8), n_levels)
            else:  # level 1 stands for the one point; so do all levels below the top, before the first checkpoint
                plan = LevelPlan.same(state.n_tokens, 1, n_levels)
            state.fixed_plans[kind] = plan
        return state.fixed_plans[kind]

    def _record(
        self,
        i: int,
        state: ForwardPass,
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
        state.recorded.add(i)
        extra = extra_read = 0
        if compensation is not None:
            per_level = plan.at_least - np.append(plan.at_least[1:], 0)
            for level in np.flatnonzero(per_level[:-1]):
                parameters = compensation.parameters(int(level))
                extra += int(per_level[level]) * parameters
                extra_read += parameters
        self.tally.ffn(
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

    def generation_call(self, rows: int, prompt_length: int, *, consistent: bool, full_prompt: bool) -> GenerationCall:
        """The one choice of a ``generate`` call: cut as calibrated, or full width where cutting does not pay."""
        cut, reason = (self.policy is not None, "asked for") if consistent else self.planner.choose(rows)
        self.tally.choice(f"{'cut' if cut else 'full width'}: {reason}")
        return GenerationCall(self, not cut, reason, prompt_length if full_prompt else 0)

    def stats(self) -> SedacStats:
        """Totals since the last `reset_stats`."""
        return self.tally.snapshot()


class _Forced:
    """What a calibration or test run asks for instead of the policy."""

    def __init__(
        self,
        *,
        points: tuple[OperatingPoint | None, ...] | None = None,
        levels: int | np.ndarray | None = None,
        compensation: Sequence[Compensation | None] | None = None,
    ) -> None:
        self.points = points
        self.levels = levels
        self.compensation = compensation
