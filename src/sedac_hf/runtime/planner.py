"""Whether cutting pays for one ``generate`` call: decided once, before it starts, from times measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from sedac_hf.ops import cut_ffn
from sedac_hf.ops.contract import LevelPlan, SiteCut

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

REPEATS = 7
MIN_GAIN = 0.1  # share of the dense FFN time: less is within a noisy machine's reach


class GenerationPlanner:
    """Measures, per number of rows, the time of one decode step's FFNs, dense against cut at the typical level.

    Probes and controller are counted against the gain. Results are kept until the policy, device or dtype changes.
    """

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._known: dict[tuple[object, ...], tuple[bool, str]] = {}

    def choose(self, rows: int) -> tuple[bool, str]:
        """(cut?, reason) for decode steps of ``rows`` sequences."""
        runtime = self._runtime
        if runtime.policy is None:
            return False, "not calibrated"
        weight = runtime.sites[-1].down.weight
        key = (id(runtime.policy), rows, weight.device, weight.dtype, torch.get_num_threads())
        if key not in self._known:
            self._known[key] = self._measure(rows)
        return self._known[key]

    def _measure(self, rows: int) -> tuple[bool, str]:
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        governed = [i for i, segment in enumerate(runtime.segments) if segment >= 0]
        timed = [i for i in governed if runtime.sites[i].plain_forward]
        if policy.cut == "mask" or len(timed) < len(governed) or not governed:
            return False, "the FFNs of this model run by masking, which saves nothing"
        site_idx = timed[len(timed) // 2]
        site = runtime.sites[site_idx]
        weight = site.weights().up
        x = torch.randn(rows, site.hidden_size, device=weight.device).to(weight.dtype)
        cut = SiteCut(
            points=policy.schedule.points[site_idx],
            plan=LevelPlan.same(rows, policy.typical_level, policy.n_levels),
            importance=runtime.weights.importance(site_idx),
            compensation=None if policy.compensation is None else policy.compensation[site_idx],
            engine=runtime.engine,
            record=_forget,
        )
        dense_time, cut_time = _interleaved(
            [lambda: site.owner(x), lambda: cut_ffn(x, site.weights(), cut)], weight.device
        )
        (decide_time,) = _interleaved([lambda: self._decide_once(x.float(), rows)], weight.device)
        dense = dense_time * len(governed)
        gain = dense - cut_time * len(governed) - decide_time * len(runtime.checkpoint_layers)
        figures = f"{gain * 1e6:+.0f} us of {dense * 1e6:.0f} us FFN time per step at {rows} row(s), measured"
        if gain < MIN_GAIN * dense:
            return False, f"cutting does not pay: {figures}"
        return True, f"cutting pays: {figures}"

    @torch.no_grad()
    def _decide_once(self, x: torch.Tensor, rows: int) -> None:
        runtime = self._runtime
        assert runtime.probes is not None
        state = runtime.controller.begin(rows)
        if runtime.probes_decide:
            risk = runtime.probes.risk(runtime.checkpoint_layers[0], x).to("cpu", torch.float32).numpy()
        else:
            risk = np.zeros(rows, np.float32)
        runtime.controller.plan(runtime.controller.step(state, 0, risk))


def _forget(**_: object) -> None:
    """A record that nobody keeps."""


@torch.no_grad()
def _interleaved(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each call, taken in turns so that a busy machine slows all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 1):
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]
