"""What one ``generate`` call does, decided once before it starts, from times measured here: cut or full width, in
which layout the weights lie then, and what the compiled kernels run (`sedac_hf.runtime.kernel_choice`).

A measurement takes a fraction of a second, is made once per number of rows, and is kept until policy, device or dtype
change.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.runtime import timed_calls
from sedac_hf.runtime.timed_calls import in_turns, noise

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

MIN_GAIN = 0.1  # share of the FFN time: less is within a noisy machine's reach
PROMPTS = (32, 64, 128, 256, 512)  # tokens of the prompts that are timed; longer ones are judged by the last
SPREAD = 2  # levels to either side of the typical one that a prompt's tokens are timed with


class GenerationPlanner:
    """Compares, per number of rows, ways to run one decode step; probes and controller count against cutting."""

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._known: dict[tuple[object, ...], tuple[bool, str]] = {}

    def choose(self, rows: int, prompt_length: int = 0, *, consistent: bool = False) -> tuple[bool, str]:
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
        runtime.arrangement.follow(cut=cut)
        if consistent:
            return cut, reason
        runtime.kernel_choice.compare(rows)
        runtime.kernel_choice.compare_many(rows * prompt_length)
        if not cut:
            runtime.arrangement.follow(cut=False, idle=runtime.kernel_choice.idle(rows, rows * prompt_length))
        return cut, reason

    def cut_prompt(self, tokens: int) -> tuple[bool, str]:
        """(cut?, reason) for a prompt of so many tokens in a ``generate`` call that cuts; few run as decode steps do,
        and no reason is given."""
        runtime = self._runtime
        if tokens <= MAX_ROWS or runtime.policy is None or runtime.policy.cut != "truncate" or runtime.sharded:
            return True, ""
        weight, size = runtime.sites[-1].like, next((n for n in PROMPTS if tokens <= n), PROMPTS[-1])
        key = ("prompt", runtime.policy.schedule, size, weight.device, weight.dtype, kernel_threads())
        if key not in self._known:
            self._known[key] = self._compare_prompts(size)
        return self._known[key]

    def _choice(self, rows: int, consistent: bool) -> tuple[bool, str]:
        runtime = self._runtime
        assert runtime.policy is not None
        if runtime.whole_depth:
            return False, "asked for"
        if consistent:
            return True, "asked for"
        weight = runtime.sites[-1].like
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
        device_type = device_type or runtime.sites[-1].like.device.type
        governed = [site for site, segment in zip(captured.sites, runtime.segments, strict=True) if segment >= 0]
        if not any(site.skips(rows, device_type) for site in governed):
            return False, "captured graph: its FFNs run by masking, which saves nothing"
        if device_type == "cpu":
            return None  # the same kernels as in eager steps, which were timed
        return True, "captured graph: what is skipped is not known to the host, so its time is not measured"

    # ---------------------------------------------------------------- cut or full width

    def _compare_widths(self, rows: int) -> tuple[bool, str]:
        governed, timed = self._sites()
        if not timed:
            return False, "the FFNs of this model run by masking, which saves nothing"
        runtime = self._runtime
        x = self._input(rows)
        with runtime.arrangement.side_by_side(timed) as (as_usual, by_units):
            runtime.kernel_choice.compare(rows)
            kernels = runtime.kernel_choice
            whole = [kernels.whole(i, x) for i in as_usual]
            cut = [kernels.cut(i, x, kernels.cutting_kernel(i, rows)) for i in by_units]
            whole_time, cut_time = timed_calls.interleaved(in_turns(whole, cut), x.device)
        gain, whole_step = self._gain(x, governed, whole_time, cut_time)
        figures = f"{gain * 1e6:+.0f} us of {whole_step * 1e6:.0f} us FFN time per step at {rows} row(s), measured"
        if gain < MIN_GAIN * whole_step:
            return False, f"cutting does not pay: {figures}"
        return True, f"cutting pays: {figures}"

    def _compare_prompts(self, tokens: int) -> tuple[bool, str]:
        """The same for prompts, whose tokens have several levels, one after the other."""
        governed, timed = self._sites()
        if not timed:
            return False, "prompt at full width"
        kernels, policy = self._runtime.kernel_choice, self._runtime.policy
        assert policy is not None
        kernels.compare_many(tokens)
        around = np.arange(tokens) % (2 * SPREAD + 1) - SPREAD + policy.typical_level
        plan = LevelPlan.of(around.clip(1, policy.n_levels).astype(np.uint8), policy.n_levels)
        x = self._input(tokens)
        whole = [kernels.whole(i, x) for i in timed]
        cut = [kernels.cut(i, x, kernels.cutting_kernel(i, tokens), plan) for i in timed]
        whole_time, cut_time = timed_calls.interleaved(in_turns(whole, cut), x.device)
        gain, whole_pass = self._gain(x, governed, whole_time, cut_time)
        if gain < MIN_GAIN * whole_pass:
            figures = f"{gain * 1e3:+.1f} ms of {whole_pass * 1e3:.1f} ms FFN time at {tokens} tokens, measured"
            return False, f"prompt at full width: cutting does not pay: {figures}"
        return True, ""

    def _sites(self) -> tuple[int, list[int]]:
        """How many FFNs checkpoints govern, and those to time: none where some of them can only be masked."""
        runtime, policy = self._runtime, self._runtime.policy
        governed = [i for i, segment in enumerate(runtime.segments) if segment >= 0]
        timed = [i for i in governed if runtime.sites[i].plain_forward or runtime.sites[i].experts is not None]
        masked = policy is None or policy.cut == "mask" or len(timed) < len(governed)
        return len(governed), [] if masked else timed

    def _input(self, rows: int) -> Tensor:
        site = self._runtime.sites[self._sites()[1][0]]
        return noise(rows, site.hidden_size).to(site.like)

    def _gain(self, x: Tensor, governed: int, whole: float, cut: float) -> tuple[float, float]:
        """Seconds that cutting saves in a pass, deciding counted against it, and those of its FFNs at full width."""
        decide = functools.partial(self._decide_once, x.float(), x.shape[0])
        (seconds,) = timed_calls.interleaved([decide], x.device)
        return (whole - cut) * governed - seconds * len(self._runtime.checkpoint_layers), whole * governed

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
