"""The captured execution: what the hooks do while `torch.compile` traces the model, so that one graph holds it all.

`Execution` asks the controller on the host at each checkpoint and cuts the FFNs by numbers that it knows. A captured
graph can do neither: here the law runs on the device (`DeviceLaw`), levels are a tensor that goes from one layer to
the next on a shared object, set in the first layer and cleared after the last, and each FFN looks its operating points
up by level. No shape and no branch depends on a level, so nothing breaks the graph and nothing is compiled again when
levels or thresholds change. The compiled controller replays the graph's log behind its back.

`generate` compiles decode steps alone; prompts, and every call that a graph cannot serve, run as `Execution` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from sedac_hf.control.audit import AuditCounts, DecisionAudit
from sedac_hf.control.decision_log import DecisionLog
from sedac_hf.control.torch_engine import DeviceLaw
from sedac_hf.ffn.shadow import Shadow
from sedac_hf.runtime.captured.parts import CapturedParts
from sedac_hf.runtime.captured.sites import CapturedSite
from sedac_hf.runtime.captured.stats import CapturedTotals
from sedac_hf.runtime.execution import Execution
from sedac_hf.runtime.forward_pass import call_shape, current_generation
from sedac_hf.runtime.observation import token_rows

if TYPE_CHECKING:
    from sedac_hf.ffn.policy import Policy
    from sedac_hf.runtime.runtime import SedacRuntime

logger = logging.get_logger(__name__)


class CapturedPass:
    """What goes from layer to layer while a forward is traced; empty before and after it."""

    def __init__(self) -> None:
        # On the object from the start: a trace guards on which attributes there are.
        self.state: Tensor | None = None
        self.levels: Tensor | None = None
        self.next_checkpoint = 0
        self.shape: tuple[int, int] | None = None
        self.x: Tensor | None = None  # an FFN's input, from its first linear to down
        self.z: Tensor | None = None  # the gate's output, where the gate itself decides


class CapturedExecution(Execution):
    """`Execution` outside of a trace; the law on the device inside of one that `around` began.

    Two threads may not run compiled calls of one model at once: law and log are one set of buffers.
    """

    def __init__(self, runtime: SedacRuntime) -> None:
        super().__init__(runtime)
        self.parts = CapturedParts(runtime, self)
        self.reset()

    def reset(self) -> None:
        """Forget law, log and tables; decisions that were not replayed yet are not counted any more."""
        self.serving = False  # a compiled call of ours is running
        self.whole = False  # every FFN of it runs untouched
        self._policy: Policy | None = None
        self._made_for: tuple[Any, ...] | None = None
        self.current = CapturedPass()

    def fresh(self) -> CapturedExecution:
        """This execution with nothing remembered of earlier eager steps; graphs that know it stay good."""
        super().__init__(self._runtime)
        self.parts.fresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_runtime": self._runtime, "site_cuts": self.site_cuts, "_probes": self._probes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.irregular = None
        self.parts = CapturedParts(self._runtime, self)
        self.reset()

    @property
    def tracing(self) -> bool:
        return self.serving and torch.compiler.is_compiling()

    # ---------------------------------------------------------------- on the host, between calls

    def prepare(self) -> str | None:
        """Make sure that the law and the tables are on the device; None, or why this runtime cannot be captured."""
        runtime = self._runtime
        weight = runtime.sites[0].like
        made_for = (runtime.adaptive_thresholds, weight.device, weight.dtype)
        if self._policy is not runtime.policy or made_for != self._made_for:
            why = self._obstacle()
            if why is not None:
                return why
            self.flush()
            self._build(weight.device)
            self._policy, self._made_for = runtime.policy, made_for
        self.law.upload()
        return None

    def _obstacle(self) -> str | None:
        runtime = self._runtime
        if runtime.policy is None:
            return "no policy is installed"
        if not hasattr(runtime.controller, "parameter_block"):
            return "the controller is not the compiled one"
        weights = [getattr(linear, "weight", None) for site in runtime.sites for linear in site.linears]
        weights += [site.weight for site in runtime.sites if site.experts is not None]
        if any(not isinstance(weight, Tensor) or weight.is_meta for weight in weights):
            return "weights of the FFNs are offloaded"
        if any(site.shard is not None for site in runtime.sites):
            return "the weights of the FFNs are shared out over several processes"
        if len({weight.device for weight in weights if isinstance(weight, Tensor)}) > 1:
            return "the FFNs are on several devices"
        return None

    def _build(self, device: torch.device) -> None:
        runtime, policy = self._runtime, self._runtime.running_policy
        assert policy is not None
        self.law = DeviceLaw(runtime.controller, device)
        self.log = DecisionLog(self.law.n_checkpoints, device)
        compensation = policy.compensation or (None,) * len(runtime.sites)
        for shadow in runtime.weights.shadows:
            if isinstance(shadow, Shadow):
                shadow.move(device)  # the model may have been moved since the shadow was made
        self.sites = [
            CapturedSite(
                site,
                policy.schedule.points[i],
                runtime.weights.shadows[i],
                compensation[i],
                self.parts.handle(i),
            )
            for i, site in enumerate(runtime.sites)
        ]
        if runtime.probes is not None:
            runtime.probes.to(device)
        self.totals = CapturedTotals(runtime, self.sites, device)
        self.audit = DecisionAudit(
            runtime.controller,
            self.law,
            self.log,
            adaptive_thresholds=runtime.adaptive_thresholds,
            on_replay=self.totals.replayed,
        )
        for module in (self.law, self.log, *self.sites):
            tensors = module.static_tensors() if isinstance(module, CapturedSite) else list(module.buffers())
            for tensor in tensors:  # or CUDA graphs would copy them before each replay
                torch._dynamo.mark_static_address(tensor)

    def around(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """A compiled forward with the host's part around it; ``eager`` serves the calls that a graph cannot."""

        @functools.wraps(compiled)
        def call(*args: Any, **kwargs: Any) -> Any:
            runtime = self._runtime
            if not runtime.attached:  # nothing of ours is in the graph
                return compiled(*args, **kwargs)
            shape = call_shape(args, kwargs)
            generation = current_generation.get()
            if generation is not None and generation.runtime is not runtime:
                generation = None
            if shape is None or runtime.forcing is not None or runtime.on_decision is not None:
                return eager(*args, **kwargs)
            if generation is not None and generation.prompt_mask(*shape, kwargs) is not None:
                return eager(*args, **kwargs)
            why = self.irregular or self.prepare()  # the prompt ran eagerly just now
            if why is not None:
                logger.warning_once(f"decode steps are not compiled: {why}; they run eagerly, with the same result")
                return eager(*args, **kwargs)
            self.whole = bool(runtime.whole_depth) or (generation is not None and generation.full_width)
            n_tokens = shape[0] * shape[1]
            self.parts.choose(n_tokens, by_time=generation is not None and not generation.consistent)
            self.totals.starts(n_tokens, before_change=self.audit.flush)
            self.serving = True
            try:
                output = compiled(*args, **kwargs)
            finally:
                self.serving = False
            self.totals.ran(n_tokens, whole=self.whole, by_kernel=self.parts.whole_by_kernel)
            if not self.whole:
                self.audit.after_pass(n_tokens)
            return output

        return call

    def flush(self) -> AuditCounts | None:
        """Replay and count everything that graphs have decided so far; None where none ever ran."""
        return None if self._made_for is None else self.audit.flush()

    # ---------------------------------------------------------------- inside the trace

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.tracing:
            return super().begin(module, args, kwargs)
        shape = call_shape(args, dict(kwargs))
        self.current.state = None if shape is None or self.whole else self.law.begin(shape[0] * shape[1])
        self.current.levels = None
        self.current.next_checkpoint = 0
        self.current.shape = shape

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.tracing:
            return super().end(module, args, output)
        self.current.state = self.current.levels = None

    def decide(self, idx: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.tracing:
            return super().decide(idx, module, args, output)
        current, runtime = self.current, self._runtime
        hidden = token_rows(output, runtime.hidden_size, current.shape)
        expected, current.next_checkpoint = current.next_checkpoint, idx + 1
        if current.state is None:
            return
        if hidden is None or hidden.shape[0] != current.state.numel() or idx != expected:
            current.state = current.levels = None  # cannot be read: full width for the rest of the pass
            return
        if runtime.probes_decide and runtime.probes is not None:
            risk = runtime.probes.risk(runtime.checkpoint_layers[idx], hidden).detach().float()
        else:
            risk = torch.zeros(current.state.shape, device=hidden.device)
        risk_q = self.law.quantise(idx, risk)
        current.state, current.levels = self.law.step(idx, current.state, risk_q)
        self.log.write(idx, risk_q, current.levels, self.law.version)

    def levels_at(self, i: int, n_tokens: int) -> Tensor | None:
        """int32 [n_tokens], the levels at site i in the running trace; None: run untouched."""
        current, captured = self.current, self.sites[i]
        if current.state is None or not captured.cuts or current.state.numel() != n_tokens:
            return None
        if self._runtime.segments[i] < 0:
            # In front of the first checkpoint all levels below the top are alike.
            return torch.ones(n_tokens, dtype=torch.int32, device=current.state.device)
        return current.levels
