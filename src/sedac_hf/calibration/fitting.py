"""All that calibration fits before the budget is looked at: statistics, allocation, probes, shape of the law."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.allocation import Allocation, threshold_for
from sedac_hf.calibration.collect import Statistics, collect, stream
from sedac_hf.calibration.dial import Dial
from sedac_hf.calibration.importance import no_compensation, select_allocation, truncate_allocation
from sedac_hf.calibration.law import fit_shape
from sedac_hf.calibration.risk import fit_probes, risk_targets
from sedac_hf.calibration.text import CalibrationText
from sedac_hf.configuration import Cut, Objective
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import Batch, Window, WindowSet, kl_to, scored_logits
from sedac_hf.runtime import SedacRuntime

SPREADS = (0.5, 1.0)
"""Tried against 0 (a constant level)."""

_SENSITIVITY_TOKENS = 2048
_REFERENCE_BYTES = 1 << 30  # dense logits held while settings are compared
_CHECK_SHARE = 0.25  # of the fit part, for what must not be fitted on the probes' own tokens
_HARM_FLOOR = 0.1  # of x0, added to a token's KL before the logarithm


@dataclass
class Fitted:
    """The dial, and what was learnt on the fit part about its positions.

    rate: fall of log KL per unit of share; middle: share at which log_kl is the mean KL's logarithm.
    fit_kl: KL of each spread tried at the middle share, corrected to equal share; 0.0 is the constant level.
    """

    dial: Dial
    statistics: Statistics
    quality: tuple[float, ...]
    rate: float
    middle: float
    log_kl: float
    spread: float
    fit_kl: dict[float, float] = field(default_factory=dict)


class Reference:
    """Dense logits of a few windows, to compare settings of the runtime with."""

    def __init__(self, runtime: SedacRuntime, windows: WindowSet, tokens: int) -> None:
        self.runtime = runtime
        self.batches: list[Batch] = []
        self.dense: list[Tensor] = []
        held, seen = 0, 0
        for batch in stream(runtime, windows, False, "reference"):
            logits = scored_logits(runtime.model, batch)
            held, seen = held + logits.numel() * logits.element_size(), seen + logits.shape[0]
            if self.batches and held > _REFERENCE_BYTES:
                break
            self.batches.append(batch)
            self.dense.append(logits)
            if seen >= tokens:
                break

    def kl(self, setting: AbstractContextManager[object] | None = None) -> tuple[float, float]:
        """(mean KL in nats, needed share of bytes) of the model as it is inside ``setting``."""
        total, count = 0.0, 0
        with setting or nullcontext():
            self.runtime.tally.reset()
            for batch, dense in zip(self.batches, self.dense, strict=True):
                values = kl_to(dense, scored_logits(self.runtime.model, batch), torch.float32)
                total, count = total + float(values.double().sum()), count + values.numel()
            share = self.runtime.stats().needed_bytes_share
        if not math.isfinite(total):
            raise CalibrationError("the KL between full and cut output must be finite; got NaN or infinity")
        return max(total / count, 1e-12), share


def fit(
    runtime: SedacRuntime,
    text: CalibrationText,
    objective: Objective,
    *,
    n_levels: int,
    probe_rank: int,
    compensation_memory: float,
    moment_bytes: int,
    seed: int,
    progress: bool,
) -> Fitted:
    """Fit on ``text.fit``. The runtime must be bare; it is bare afterwards.

    Raises:
        CalibrationError, UnsupportedModelError: see `calibrate`.
    """
    select = objective == "latency"
    governed = [i for i, segment in enumerate(runtime.segments) if segment >= 0]
    if not governed:
        raise CalibrationError(
            f"a checkpoint must have an FFN behind it, got checkpoint layers {list(runtime.checkpoint_layers)} and "
            "the last FFN before them: choose earlier checkpoint layers"
        )
    try:
        if select:
            runtime.build_shadows()
        statistics = collect(runtime, text.fit, select=select, moment_bytes=moment_bytes, progress=progress)
        first = _first_windows(text.fit, _SENSITIVITY_TOKENS)
        allocation: Allocation
        if select:
            order = None
            allocation = select_allocation(runtime, statistics, first, progress)
            compensator = no_compensation
        else:
            order, compensator, allocation = truncate_allocation(
                runtime, statistics, first, compensation_memory, progress
            )
        middle = threshold_for(allocation, 0.5, governed)
        points = allocation.points(middle)
        compensation = [compensator(i, {1: point.width}, 2) for i, point in enumerate(points)]
        targets = risk_targets(runtime, text.fit, points, compensation, progress=progress)
        n_fit = int(len(targets.kl[0]) * (1 - _CHECK_SHARE))
        probes, scales, risks, quality = fit_probes(
            targets, runtime.checkpoint_layers, n_fit, rank=probe_rank, seed=seed
        )
        harm = np.stack([np.log(k[n_fit:].numpy() + _HARM_FLOOR * x) for k, x in zip(targets.kl, scales, strict=True)])
        cut: Cut = "select" if select else "truncate"
        dial = Dial(
            cut=cut,
            objective=objective,
            n_levels=n_levels,
            layers=runtime.checkpoint_layers,
            segments=runtime.segments,
            allocation=allocation,
            compensate=compensator,
            channel_order=order,
            probes=probes,
            risk_scale=scales,
            risks=risks,
            shape=fit_shape(risks, harm),
            probe_share=probes.parameters_per_token * len(scales) / float(allocation.parameters.sum()),
        )
        check = _last_windows(text.fit, len(targets.kl[0]) - n_fit)
        fitted = _compare(runtime, dial, statistics, quality, check, progress)
    finally:
        runtime.uninstall()
    return fitted


def _compare(
    runtime: SedacRuntime,
    dial: Dial,
    statistics: Statistics,
    quality: tuple[float, ...],
    check: WindowSet,
    progress: bool,
) -> Fitted:
    """Find how harm falls with the share, then the spread that harms least at equal share, a constant included."""
    share = 0.5 if dial.cut == "select" else 0.75
    reference = Reference(runtime, check, check.n_tokens)
    runs = []
    for asked in (share - 0.08, share + 0.08):
        points, compensation, _ = dial.constant(asked)
        kl, needed = reference.kl(runtime.forced(points, compensation))
        runs.append((needed, math.log(kl)))
    (low, harsh), (high, mild) = runs
    rate = max((harsh - mild) / max(high - low, 1e-3), 1.0)
    share = (low + high) / 2 + dial.probe_share
    keep = float(np.clip(share, 0.1, 0.9))
    points, compensation, _ = dial.constant(share)
    kl, needed = reference.kl(runtime.forced(points, compensation))
    found = {0.0: kl * math.exp(rate * (needed - share))}
    # A constant could do without probes, but as a policy it has them: that is what the law must beat to be chosen.
    best, best_dial, least = 0.0, dial, found[0.0] * math.exp(rate * dial.probe_share)
    for spread in SPREADS:
        trial = replace(dial, gain=spread / (4 * rate * keep * (1 - keep)), offset=0.0)
        needed = 0.0
        for _ in range(2):  # once to see what the tokens really use, once with that put right
            runtime.install(trial.policy(share))
            kl, needed = reference.kl()
            runtime.uninstall()
            trial.offset += needed - share
            if abs(needed - share) < 0.004:
                break
        found[spread] = kl * math.exp(rate * (needed - share))
        if found[spread] < least:
            best, best_dial, least = spread, trial, found[spread]
    return Fitted(
        dial=best_dial,
        statistics=statistics,
        quality=quality,
        rate=rate,
        middle=share,
        log_kl=math.log(least),
        spread=best,
        fit_kl=found,
    )


def _first_windows(windows: WindowSet, tokens: int) -> WindowSet:
    kept, seen = [], 0
    for window in windows:
        if seen >= tokens:
            break
        kept.append(window)
        seen += window.n_scored
    return replace(windows, windows=tuple(kept))


def _last_windows(windows: WindowSet, tokens: int) -> WindowSet:
    kept: list[Window] = []
    seen = 0
    for window in reversed(windows.windows):
        if kept and seen + window.n_scored > tokens:
            break
        kept.append(window)
        seen += window.n_scored
    return replace(windows, windows=tuple(reversed(kept)))
