"""All that calibration fits before the budget is looked at: statistics, allocation, probes, shape of the law."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sedac_hf.calibration.allocation import Allocation, threshold_for
from sedac_hf.calibration.collect import Statistics, collect
from sedac_hf.calibration.dial import Dial
from sedac_hf.calibration.importance import no_compensation, select_allocation, truncate_allocation
from sedac_hf.calibration.law import fit_shape
from sedac_hf.calibration.risk import fit_probes, risk_targets
from sedac_hf.calibration.spread import HarmCurve, Reference
from sedac_hf.calibration.text import CalibrationText
from sedac_hf.configuration import SHADOW_BITS, Cut, Objective
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import Window, WindowSet
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime

_STATISTICS_TOKENS = 20480  # moments and importances need no more; the probes do
_SENSITIVITY_TOKENS = 2048
_CHECK_SHARE = 0.25  # of the fit part, for what must not be fitted on the probes' own tokens
_HARM_FLOOR = 0.1  # of x0, added to a token's KL before the logarithm


@dataclass
class Fitted:
    """The dial (spread 0 as yet), and what was learnt on the fit part.

    quality: rank correlation of each probe; sample: windows that the statistics are of; check: windows of the fit part
    that no probe was fitted on.
    """

    dial: Dial
    statistics: Statistics
    quality: tuple[float, ...]
    curve: HarmCurve
    sample: WindowSet
    check: WindowSet


def fit(
    runtime: SedacRuntime,
    text: CalibrationText,
    objective: Objective,
    *,
    n_levels: int,
    probe_rank: int,
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
        probes_size = ProbeBank.bytes_of(runtime.hidden_size, probe_rank, len(runtime.checkpoint_layers))
        shadow_bits = runtime.shadow_bits(probes_size) if select else SHADOW_BITS[0]
        if select:
            runtime.build_shadows(shadow_bits)
        sample = _first_windows(text.fit, _STATISTICS_TOKENS)
        statistics = collect(runtime, sample, select=select, moment_bytes=moment_bytes, progress=progress)
        first = _first_windows(text.fit, _SENSITIVITY_TOKENS)
        allocation: Allocation
        if select:
            order = None
            allocation = select_allocation(runtime, statistics, first, progress)
            compensator = no_compensation
        else:
            order, compensator, allocation = truncate_allocation(
                runtime, statistics, first, n_levels, probes_size, progress
            )
        middle = threshold_for(allocation, 0.5, governed)
        points = allocation.points(middle)
        compensation = [compensator(i, {1: point.width}, 2) for i, point in enumerate(points)]
        targets = risk_targets(runtime, text.fit, points, compensation, progress=progress)
        n_tokens = len(targets.kl[0])
        n_fit = int(n_tokens * (1 - _CHECK_SHARE))
        probes, scales, risks, quality = fit_probes(
            targets, runtime.checkpoint_layers, n_fit, rank=probe_rank, seed=seed
        )
        harm = np.stack([np.log(k[n_fit:].numpy() + _HARM_FLOOR * x) for k, x in zip(targets.kl, scales, strict=True)])
        del targets  # hidden states of every token and checkpoint: not beside the reference's logits
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
            shadow_bits=shadow_bits,
            probes=probes,
            risk_scale=scales,
            risks=risks,
            shape=fit_shape(risks, harm),
            probe_share=probes.parameters_per_token * len(scales) / float(allocation.parameters.sum()),
        )
        check = _last_windows(text.fit, n_tokens - n_fit)
        curve = HarmCurve.measure(Reference(runtime, check), dial)
    finally:
        runtime.uninstall()
    return Fitted(dial, statistics, quality, curve, sample, check)


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
