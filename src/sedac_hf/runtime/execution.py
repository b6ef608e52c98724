"""One forward pass: it is opened, levels are decided at the checkpoints, and at its end is counted what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.threads import begin_step, end_step, kernel_threads
from sedac_hf.runtime.decode_probes import DecodeProbes
from sedac_hf.runtime.forward_pass import (
    ForwardPass,
    OfItsPass,
    call_shape,
    close_left_open,
    current_generation,
    current_pass,
)
from sedac_hf.runtime.observation import hidden_of, token_rows
from sedac_hf.runtime.site_cuts import SiteCuts

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


_OTHER_ROWS = "its layers see other rows than there are input tokens"
_OUT_OF_ORDER = "its layers do not run one after the other, each of them once"


class Execution:
    """The callbacks that a runtime attaches to its model.

    Attributes:
        irregular: what kept the last pass from being one that a captured graph could run; None: nothing did.
    """

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self.site_cuts = SiteCuts(runtime)
        self._probes = DecodeProbes()
        self.irregular: str | None = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the model's forward: open a pass."""
        runtime = self._runtime
        runtime.whereabouts.check()
        shape = call_shape(args, dict(kwargs))
        n_tokens = 0 if shape is None else shape[0] * shape[1]
        around = close_left_open(runtime)  # no pass runs within one of the same model
        generation = current_generation.get()
        if generation is not None and generation.runtime is not runtime:
            generation = None
        if generation is None:  # a plain call gives the same whatever ran before it
            runtime.arrangement.follow(cut=True)
        runtime.arrangement.enter(cut=generation is None or not generation.full_width)
        state = ForwardPass(runtime, n_tokens, shape=shape, previous=around)
        current_pass.set(state)
        if shape is None:
            state.whole = True
            runtime.tally.fail_safe(1)
            return
        if torch.is_grad_enabled():
            _keep_passes(runtime.model)
        runtime.tally.begin(state.n_tokens)
        if runtime.weights.uses_kernels and not torch.is_autocast_enabled("cpu"):
            state.by_time = generation is not None and not generation.consistent
            if state.n_tokens <= MAX_ROWS:
                if runtime.decode_linears:
                    state.torch_alone = begin_step()
                state.threads = kernel_threads()
            else:
                threads = kernel_threads()  # of torch's own, for much of such a pass is torch's
                if state.by_time:
                    pays = runtime.kernel_choice.many_rows_pay(state.n_tokens, threads)
                else:
                    pays = runtime.kernel_choice.stands_in()
                state.many_threads = threads if pays else 0
        if runtime.forcing is not None:
            return
        if generation is not None:
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
        runtime.arrangement.leave()
        if torch.is_grad_enabled() and runtime.model.training:
            let_passes_go(runtime.model)
        if state.torch_alone:
            end_step()
        if output is None or state.n_tokens == 0:  # the forward raised, or there was nothing to read
            return
        if state.next_checkpoint != len(runtime.checkpoint_layers):
            state.irregular = _OUT_OF_ORDER
            if not state.whole and state.controller_state is not None:
                runtime.tally.fail_safe(state.n_tokens)  # what is behind the missing checkpoint ran whole
        self.irregular = state.irregular
        state.over = True
        counted = state.counted
        for idx, risks, exited, ratio in state.decided:
            failed = int(np.count_nonzero(~np.isfinite(risks[counted])))
            runtime.tally.checkpoint(idx, exited[counted], ratio[counted], failed)
        for i, engine, decided, needed, read in state.decoded:
            state.recorded.add(i)
            runtime.tally.ffn(
                i, engine=engine, tokens=state.n_tokens, needed=needed, read=read, computed=needed, shadow=decided
            )
        for i, cost in enumerate(runtime.tally.costs):
            if i not in state.recorded:
                units, calls = cost.units, 1
                if state.irregular is not None:
                    calls = self._calls(i, state)
                tokens = state.n_tokens * calls
                runtime.tally.ffn(
                    i,
                    engine="whole",
                    tokens=tokens,
                    needed=units * tokens,
                    read=cost.whole_read(state.n_tokens) * calls,
                    computed=units * tokens,
                    calls=calls,
                )

    def decide(self, idx: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a checkpoint layer: risks, levels, and the plan of the FFNs up to the next checkpoint."""
        runtime = self._runtime
        state = current_pass.get()
        if state is None or state.runtime is not runtime or state.over:
            return
        expected, state.next_checkpoint = state.next_checkpoint, idx + 1
        state.came.append(idx)
        if idx != expected:
            state.irregular = _OUT_OF_ORDER
        if state.whole or runtime.forcing is not None:
            if state.prompt is not None:  # decode steps follow, and whoever captures them wants to know
                self._look(state, output)
            return
        hidden = hidden_of(output)
        size = runtime.hidden_size
        if hidden is None or hidden.shape[-1] != size or hidden.numel() != state.n_tokens * size:
            hidden = self._other_rows(state, output)
            if hidden is None:
                return
        if idx > expected:
            self._give_up(state)  # the law knows no cascade with a checkpoint left out
            return
        if state.n_tokens == 0:
            return
        values = self._risks(idx, hidden, state.n_tokens)
        controller = runtime.controller
        usable = values if idx == expected else self._begin_anew(idx, state, values)
        levels = controller.step(state.controller_state, idx, usable)
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
        state.plan = self.site_cuts.plan(levels)

    def _look(self, state: ForwardPass, output: Any) -> None:
        rows = token_rows(output, self._runtime.hidden_size, state.shape)
        if rows is None or rows.shape[0] != state.n_tokens:
            state.irregular = _OTHER_ROWS

    def _other_rows(self, state: ForwardPass, output: Any) -> Tensor | None:
        """Hidden states [n, d] that are not one row per token of the call as they come; None: the rest is whole."""
        runtime = self._runtime
        rows = token_rows(output, runtime.hidden_size, state.shape)
        if rows is None or (state.decided and rows.shape[0] != state.n_tokens):
            self._give_up(state)  # a layer output that cannot be read
            return None
        if rows.shape[0] != state.n_tokens:
            state.irregular = _OTHER_ROWS
            runtime.tally.recount(rows.shape[0] - state.n_tokens)
            state.n_tokens = rows.shape[0]
            state.fixed_plans.clear()
            if state.prompt is not None:  # which rows are the prompt's is not known: take them all for it
                state.prompt, state.whole = None, True
                return None
            state.controller_state = runtime.controller.begin(state.n_tokens)
        return rows

    def _give_up(self, state: ForwardPass) -> None:
        """Full width for the rest of the pass, counted."""
        state.whole = True
        self._runtime.tally.fail_safe(state.n_tokens)

    def _begin_anew(self, idx: int, state: ForwardPass, risks: np.ndarray) -> np.ndarray:
        """A checkpoint that comes again, in layers that run in a loop, begins the cascade anew; the checkpoints in
        front of it are read as they last were. Gives this one's risks: a token that failed stays failed."""
        controller, failed = self._runtime.controller, state.controller_state.failed
        latest = {seen: values for seen, values, _, _ in state.decided}
        state.controller_state = controller.begin(state.n_tokens)
        for earlier in range(idx):
            controller.step(state.controller_state, earlier, _without(failed, latest[earlier]))
        return _without(failed, risks)

    def _calls(self, i: int, state: ForwardPass) -> int:
        """How often FFN i ran in a pass with loops, told by a checkpoint of its stack, the one behind it if there is
        one, else by the one behind it in another stack."""
        runtime = self._runtime
        last, before = len(runtime.checkpoint_layers) - 1, runtime.segments[i]
        near = [min(before + 1, last), max(before, 0)]
        stack = runtime.stacks[runtime.sites[i].layer_idx]
        own = [checkpoint for checkpoint in near if runtime.stacks[runtime.checkpoint_layers[checkpoint]] == stack]
        return max(1, state.came.count((own or near)[0]))

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


def _keep_passes(model: nn.Module) -> None:
    """Make layers that a backward pass runs again (gradient checkpointing) see their own pass then."""
    if model.training:
        module: Any
        for module in model.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, OfItsPass):
                module._gradient_checkpointing_func = OfItsPass(function)


def let_passes_go(model: nn.Module) -> None:
    """Undo `_keep_passes`: layers that have run hold their pass already."""
    module: Any
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, OfItsPass):
            module._gradient_checkpointing_func = function.function


def _without(failed: np.ndarray, risks: np.ndarray) -> np.ndarray:
    """Risks [n], unusable where a token has failed."""
    return np.where(failed, np.float32(np.nan), risks) if failed.any() else risks
