"""The runtime: probes, controller and cut FFNs attached to one Hugging Face decoder.

It works on any causal LM of transformers, wrapped or not; `SedacForCausalLM` owns one, calibration drives one. Nothing
of the model is changed before `install` (or `attach`), and everything is undone by `uninstall`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
from torch import nn

from sedac_hf.configuration import DEFAULT_EXTRA_MEMORY, check_extra_memory
from sedac_hf.control import make_controller, strip_planner
from sedac_hf.control.base import Controller
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule
from sedac_hf.ffn.sites import find_sites
from sedac_hf.layer_config import default_checkpoint_layers
from sedac_hf.ops.compiled import available
from sedac_hf.ops.contract import Compensation, OperatingPoint
from sedac_hf.ops.library import triton_is_installed
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime.arrangement import Arrangement
from sedac_hf.runtime.attaching import attach
from sedac_hf.runtime.captured.execution import CapturedExecution
from sedac_hf.runtime.decode_linears import DecodeLinear
from sedac_hf.runtime.execution import let_passes_go
from sedac_hf.runtime.forward_pass import Forced, GenerationCall, close_left_open, current_generation
from sedac_hf.runtime.hooks import Attachment, Whereabouts
from sedac_hf.runtime.kernel_choice import KernelChoice
from sedac_hf.runtime.memory import MemoryUse, bits_allowed, memory_use, shadow_bits_within
from sedac_hf.runtime.observation import OnCheckpoint, OnDecision, OnExpert, OnFFN, observing
from sedac_hf.runtime.planner import GenerationPlanner
from sedac_hf.runtime.stats import SedacStats, Tally, strip_costs
from sedac_hf.runtime.weights import PreparedWeights

_LARGEST_RISK = 64.0  # log1p(KL / x0): beyond any KL over any x0 that float32 holds


class SedacRuntime:
    """Find a decoder's FFNs, and run them cut as a policy says.

    Args:
        model: a causal LM of transformers; its forward takes ``input_ids`` or ``inputs_embeds``.
        checkpoint_layers: decoder layers with a probe, ascending, each below the number of layers; default: n/4, n/2
            and 3n/4.
        controller: "auto", "rust" or "python".
        engine: "auto", or the name of an FFN engine: "reference", "strips", "gather", "rust" (the
            kernels for CPUs) or "triton" (those for CUDA).
        adaptive_thresholds: move the thresholds with the risks seen at inference.
        extra_memory: most bytes beside the base, as a share of its own (`sedac_hf.runtime.memory`).

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
        extra_memory: float = DEFAULT_EXTRA_MEMORY,
    ) -> None:
        if engine == "rust" and not available():
            raise ConfigError(
                "engine='rust' needs the compiled module sedac_hf._rust, which is not installed: build it with "
                "`pip install .` or `maturin develop --release`, or use engine='auto'"
            )
        if engine == "triton" and not triton_is_installed():
            raise ConfigError(
                "engine='triton' needs Triton, which is not installed: install it (PyTorch brings it along on Linux), "
                "or use engine='auto'"
            )
        found = find_sites(model)
        n_layers = len(found.decoder_layers)
        self._chosen_layers = checkpoint_layers is not None
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
        self.stacks = tuple(name.rpartition(".")[0] for name in found.layer_names)  # the list that each layer is in
        self.hidden_size = found.hidden_size
        self.sites = found.sites
        self.engine = engine
        self.adaptive_thresholds = adaptive_thresholds
        self.extra_memory = check_extra_memory(extra_memory)
        self.policy: Policy | None = None
        self.running_policy: Policy | None = None  # the same; of a tensor-parallel base, this rank's part of it
        self.probes: ProbeBank | None = None
        self._controller_choice = controller
        self.strip_planner = strip_planner(controller)
        self._controller: Controller | None = None
        self.weights = PreparedWeights(self.sites, kernels=("rust", "triton") if engine == "auto" else (engine,))
        self._attachment: Attachment | None = None
        self.masked: tuple[str, ...] = ()  # why, of each FFN that was last attached to be cut by zeroing alone
        self.decode_linears: tuple[DecodeLinear, ...] = ()
        self.whole_depth = 0  # `full_width` blocks entered and not left
        self.forcing: Forced | None = None
        self.probes_decide = True
        self.on_decision: OnDecision | None = None
        self.arrangement = Arrangement(self)
        self.kernel_choice = KernelChoice(self)
        self.planner = GenerationPlanner(self)
        self.captured = CapturedExecution(self)
        self.place_checkpoints(checkpoint_layers)
        self.whereabouts = Whereabouts(model, (part for site in found.sites for part in (site.owner, *site.linears)))

    # ---------------------------------------------------------------- checkpoints

    def place_checkpoints(self, checkpoint_layers: Sequence[int]) -> None:
        """Have the checkpoints after these decoder layers; only without a policy, whose law is made for its own."""
        self.checkpoint_layers = tuple(checkpoint_layers)
        # The decision after checkpoint i governs the layers behind it up to and including checkpoint i + 1's.
        self.segments = tuple(bisect_left(self.checkpoint_layers, site.layer_idx) - 1 for site in self.sites)
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    def avoid_idle_layers(self, runs: Sequence[int]) -> None:
        """Move default checkpoints away from layers that do not run; ``runs``: calls of each layer, [n_layers].

        Raises:
            ConfigError: a checkpoint that was chosen is after such a layer.
        """
        idle = [layer for layer in self.checkpoint_layers if not runs[layer]]
        ran = [layer for layer, calls in enumerate(runs) if calls]
        if not idle or not ran:
            return
        if self._chosen_layers:
            raise ConfigError(
                f"`checkpoint_layers` must be layers that run, got {list(self.checkpoint_layers)}, of which "
                f"{idle} did not run in any forward; choose among {ran}"
            )
        self.place_checkpoints([ran[place] for place in default_checkpoint_layers(len(ran))])

    # ---------------------------------------------------------------- policy

    @property
    def controller(self) -> Controller:
        """The controller of the installed policy."""
        if self._controller is None:
            raise ConfigError("there is no controller before a policy is installed: calibrate first")
        return self._controller

    @property
    def sharded(self) -> bool:
        """Whether the base is tensor parallel: then every rank must make the same calls."""
        return any(site.shard is not None for site in self.sites)

    @property
    def attached(self) -> bool:
        """Whether the model is changed at present."""
        return self._attachment is not None

    def install(self, policy: Policy) -> None:
        """Make a policy the model's: order, shadows, controller and probes, then attach.

        The former policy is taken out first. If something fails, the model is left bare.

        Raises:
            ConfigError: the policy does not fit the model, or its tables not into `extra_memory`.
        """
        policy.check(self.sites, self.checkpoint_layers)
        shadow_bits = bits_allowed(self.model, self.sites, policy, self.extra_memory)
        self.uninstall()
        try:
            self.policy = policy
            self.running_policy = policy.dealt(self.sites)
            self.probes = policy.probes
            self._controller = make_controller(
                policy.layer_configs,
                controller=self._controller_choice,
                alpha=policy.alpha,
                confidence_decay=policy.confidence_decay,
                soft_exit=policy.soft_exit,
                n_levels=policy.n_levels,
            )
            self.probes_decide = self.adaptive_thresholds or _risks_matter(self._controller)
            self.weights.reorder(self.running_policy.channel_order)
            if policy.cut == "select":
                self.build_shadows(shadow_bits)
                self.weights.lay_out(self.arrangement.by_choice)
            self.attach()
        except BaseException:
            self.uninstall()
            raise
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    def reschedule(self, schedule: WidthSchedule) -> None:
        """Let the levels of the installed policy mean other operating points; law, order and shadows stay.

        Raises:
            ConfigError: no policy is installed, or the schedule is for other FFNs or another number of levels.
        """
        if self.policy is None:
            raise ConfigError("there is no policy to reschedule: calibrate first")
        if schedule.n_levels != self.policy.n_levels:
            raise ConfigError(f"`schedule` must have {self.policy.n_levels} levels, got {schedule.n_levels}")
        policy = replace(self.policy, schedule=schedule)
        policy.check(self.sites, self.checkpoint_layers)
        self.policy, self.running_policy = policy, policy.dealt(self.sites)

    def uninstall(self) -> None:
        """Give the model back with its weights bit for bit as they were; harmless when nothing is installed.

        Raises:
            UnsupportedModelError: weights have been offloaded since; nothing has been changed.
        """
        self.weights.check_restorable()
        self.detach()
        self.captured.reset()
        self.arrangement.fixed = False
        self.weights.restore()
        self.policy = self.running_policy = self.probes = self._controller = None

    def build_shadows(self, bits: int | None = None) -> None:
        """Make the shadows of all FFNs, from the weights as they are now; bits: see `Policy`, None: what fits."""
        self.weights.build_shadows(self.shadow_bits() if bits is None else bits)
        self.tally = Tally(self.weights.costs(), self.checkpoint_layers)

    # ---------------------------------------------------------------- memory

    def memory(self) -> MemoryUse:
        """Bytes of the base and of all that is held beside it at present."""
        return memory_use(self.model, self.policy, self.weights.shadow_bytes, self.extra_memory)

    def shadow_bits(self, reserved: int = 0) -> int:
        """The most bits of the shadows for which the cap leaves room beside ``reserved`` bytes."""
        return shadow_bits_within(self.sites, self.memory().cap - reserved)

    # ---------------------------------------------------------------- attach

    def attach(self) -> None:
        """Put hooks on the checkpoint layers and around the forward, and make the FFNs cuttable."""
        if self._attachment is not None:
            return
        self._attachment, self.decode_linears, self.masked = attach(self)

    def put_forwards_aside(self, modules: Sequence[nn.Module]) -> None:
        """Have these modules run their own forwards, until `put_back_forwards`."""
        if self._attachment is not None:
            self._attachment.put_aside(modules)

    def put_back_forwards(self) -> None:
        if self._attachment is not None:
            self._attachment.put_back()

    def detach(self) -> None:
        """Take every hook and replaced forward away; the channel order stays."""
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None
            self.decode_linears = ()
            let_passes_go(self.model)  # a forward that was interrupted has not
            close_left_open(self)

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
        self.whole_depth += 1
        try:
            yield
        finally:
            self.whole_depth -= 1

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
        with self._force(Forced(points=tuple(points), compensation=compensation)):
            yield

    @contextmanager
    def forced_levels(self, levels: int | np.ndarray) -> Iterator[None]:
        """Run the governed FFNs at these levels of the installed schedule, one for all tokens or uint8 [n_tokens]."""
        with self._force(Forced(levels=levels)):
            yield

    @contextmanager
    def _force(self, forcing: Forced) -> Iterator[None]:
        previous, self.forcing = self.forcing, forcing
        bare = not self.attached
        self.attach()
        try:
            yield
        finally:
            self.forcing = previous
            if bare:
                self.detach()

    def observe(
        self,
        *,
        on_checkpoint: OnCheckpoint | None = None,
        on_ffn: OnFFN | None = None,
        on_decision: OnDecision | None = None,
        on_expert: OnExpert | None = None,
    ) -> AbstractContextManager[None]:
        """Show what flows by during a ``with`` block; see `sedac_hf.runtime.observation`."""
        return observing(self, on_checkpoint, on_ffn, on_decision, on_expert)

    # ---------------------------------------------------------------- what ran

    def generation_call(
        self, rows: int, prompt_length: int, *, consistent: bool, full_prompt: bool | None
    ) -> GenerationCall:
        """The one choice of a ``generate`` call: cut as calibrated, or full width where cutting does not pay.

        full_prompt: whether the prompt runs at full width in a call that cuts; None: where cutting it does not pay.
        """
        cut, reason = self.planner.choose(rows, prompt_length, consistent=consistent)
        if full_prompt is None:
            cut_prompt, why = self.planner.cut_prompt(rows * prompt_length) if cut and not consistent else (True, "")
            full_prompt, reason = not cut_prompt, f"{reason}; {why}" if why else reason
        return GenerationCall(self, rows, not cut, reason, prompt_length if full_prompt else 0, consistent)

    def choose_for_graphs(self) -> None:
        """Choose again for the running ``generate`` call, whose decode steps will go by a captured graph."""
        call = current_generation.get()
        if call is None or call.runtime is not self:
            return
        choice = self.planner.choose_captured(call.rows, consistent=call.consistent)
        if self.attached and self.policy is not None:
            self.arrangement.fix(readers=1)  # this call's own
        if choice is not None:
            call.full_width, call.reason = not choice[0], choice[1]

    def stats(self) -> SedacStats:
        """Totals since the last `reset_stats`."""
        self.captured.flush()
        return replace(
            self.tally.snapshot(),
            memory=self.memory().to_dict(),
            strip_costs=strip_costs(),
            masked=dict(Counter(self.masked)),
        )


def _risks_matter(controller: Controller) -> bool:
    """Whether the least and the largest risk that a probe gives lead to different levels somewhere.

    Levels never rise as risks fall, so if these two agree all do: a constant level, which needs no probe.
    """
    risks = np.zeros((len(controller.layer_configs), 2), np.float32)
    risks[:, 1] = _LARGEST_RISK
    levels = controller.evaluate_batch(risks).levels
    return not np.array_equal(levels[:, 0], levels[:, 1])
