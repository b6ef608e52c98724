"""Everything that calibration fits before the budget is looked at: statistics, allocation, probes, shape of the law."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.allocation import Allocation, SelectAllocation, TruncateAllocation, threshold_for
from sedac_hf.calibration.collect import Statistics, collect, stream
from sedac_hf.calibration.compensate import fit_compensation
from sedac_hf.calibration.dial import Dial
from sedac_hf.calibration.law import fit_shape
from sedac_hf.calibration.risk import fit_probes, risk_targets
from sedac_hf.calibration.sensitivity import sensitivities
from sedac_hf.calibration.text import CalibrationText
from sedac_hf.configuration import Cut, Objective
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import Batch, WindowSet, kl_to, scored_logits
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.stats import NEEDED_ELEMENT_BYTES

SPREADS = (0.4, 0.8)
"""Tried against 0 (a constant level)."""

_SENSITIVITY_TOKENS = 2048
_REFERENCE_BYTES = 1 << 30  # dense logits held while settings are compared
_CHECK_SHARE = 0.25  # of the fit part, for what must not be fitted on the probes' own tokens
_RANK_DIVISOR = 24  # hidden size over rank of the compensation: the best trade measured, at 1.4% of FFN bytes
_HARM_FLOOR = 0.01  # of x0, added to a token's KL before the logarithm


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
            f"a checkpoint must have an FFN behind it, got checkpoint layers {list(runtime.checkpoint_layers)} and the "
            "last FFN before them: choose earlier checkpoint layers"
        )
    try:
        if select:
            runtime.build_shadows()
        statistics = collect(runtime, text.fit, select=select, moment_bytes=moment_bytes, progress=progress)
        first = _first_windows(text.fit, _SENSITIVITY_TOKENS)
        allocation: Allocation
        if select:
            order = None
            allocation = _select_allocation(runtime, statistics, first, progress)
            compensator = _no_compensation
        else:
            order, compensator, allocation = _truncate_allocation(
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
    """Find how harm falls with the share, then the spread that harms least at equal share; a constant level included."""
    share = 0.5 if dial.cut == "select" else 0.75
    reference = Reference(runtime, check, check.n_tokens)
    runs = []
    for asked in (share - 0.08, share + 0.08):
        points, compensation, reached = dial.constant(asked)
        kl, needed = reference.kl(runtime.forced(points, compensation))
        runs.append((needed, math.log(kl)))
    (low, harsh), (high, mild) = runs
    rate = max((harsh - mild) / max(high - low, 1e-3), 1.0)
    share = (low + high) / 2 + dial.probe_share
    keep = float(np.clip(share, 0.1, 0.9))
    found: dict[float, float] = {0.0: math.exp((harsh + mild) / 2)}
    found[0.0] = _constant_kl(runtime, dial, reference, share, rate)
    best, best_dial = 0.0, dial
    for spread in SPREADS:
        trial = replace(dial, gain=spread / (4 * rate * keep * (1 - keep)), _level_compensation=dial._level_compensation)
        needed = 0.0
        for _ in range(2):  # once to see what the tokens really use, once with that put right
            runtime.install(trial.policy(share))
            kl, needed = reference.kl()
            runtime.uninstall()
            trial.offset += needed - share
            if abs(needed - share) < 0.004:
                break
        found[spread] = kl * math.exp(rate * (needed - share))
        if found[spread] < found[best]:
            best, best_dial = spread, trial
    return Fitted(
        dial=best_dial,
        statistics=statistics,
        quality=quality,
        rate=rate,
        middle=share,
        log_kl=math.log(found[best]),
        spread=best,
        fit_kl=found,
    )


def _constant_kl(runtime: SedacRuntime, dial: Dial, reference: Reference, share: float, rate: float) -> float:
    """KL of the best constant operating points at ``share`` minus nothing: a constant needs no probes."""
    points, compensation, _ = dial.constant(share)
    kl, needed = reference.kl(runtime.forced(points, compensation))
    return kl * math.exp(rate * (needed - share))


def _select_allocation(
    runtime: SedacRuntime, statistics: Statistics, windows: WindowSet, progress: bool
) -> SelectAllocation:
    importance = [values.double().numpy() for values in statistics.importance]
    sizes = [site.intermediate_size for site in runtime.sites]
    medians = [float(values[len(values) // 2]) for values in importance]
    points = [OperatingPoint(f, m) for f, m in zip(sizes, medians, strict=True)]
    left_out = [
        f * float(np.square(values[: len(values) // 2]).sum()) / len(values)
        for f, values in zip(sizes, importance, strict=True)
    ]
    measured = sensitivities(runtime, windows, points, left_out, progress=progress)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    overhead = np.asarray([cost.shadow_bytes for cost in costs]) / (NEEDED_ELEMENT_BYTES * parameters)
    return SelectAllocation(importance, measured, sizes, parameters, overhead)


def _truncate_allocation(
    runtime: SedacRuntime, statistics: Statistics, windows: WindowSet, memory: float, progress: bool
) -> tuple[tuple[Tensor | None, ...], _Compensator, TruncateAllocation]:
    worth = []
    for site, power in zip(runtime.sites, statistics.power, strict=True):
        norm = torch.linalg.vector_norm(site.parts()[2].detach(), dim=0, dtype=torch.float32).cpu()
        worth.append(power.sqrt() * norm)
    order = tuple(values.argsort(descending=True, stable=True) for values in worth)
    runtime.weights.reorder(order)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    compensator = _Compensator(runtime, statistics, order, _rank(runtime, statistics, memory))
    ordered = [values[places].double().numpy() for values, places in zip(worth, order, strict=True)]
    points = [OperatingPoint(max(site.intermediate_size // 2, 1)) for site in runtime.sites]
    left_out = [float(np.square(values[point.width :]).sum()) for values, point in zip(ordered, points, strict=True)]
    compensation = [compensator(i, {1: point.width}, 2) for i, point in enumerate(points)]
    measured = sensitivities(runtime, windows, points, left_out, compensation=compensation, progress=progress)
    return order, compensator, TruncateAllocation(ordered, measured, parameters, runtime.hidden_size, compensator.rank)


def _rank(runtime: SedacRuntime, statistics: Statistics, memory: float) -> int:
    """Rank of the compensation: what pays, as far as the memory cap allows (all levels of all FFNs are stored)."""
    if any(second is None for second in statistics.moment):
        return 0
    base = sum(parameter.numel() for parameter in runtime.model.parameters())
    d = runtime.hidden_size
    per_rank = sum(7 * (d + site.intermediate_size // 2) for site in runtime.sites)
    return int(min(max(d // _RANK_DIVISOR, 4), memory * base / per_rank))


class _Compensator:
    """Fits compensation of a site from the statistics, put in channel order."""

    def __init__(
        self, runtime: SedacRuntime, statistics: Statistics, order: tuple[Tensor, ...], rank: int
    ) -> None:
        self.down = [site.parts()[2].detach().float().cpu().clone() for site in runtime.sites]
        self.mean = [mean[places] for mean, places in zip(statistics.mean, order, strict=True)]
        self.statistics = statistics
        self.order = order
        self.rank = rank

    def __call__(self, site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
        second = self.statistics.moment[site] if self.rank else None
        if second is not None:
            places = self.order[site]
            second = second[places][:, places]
        return fit_compensation(self.down[site], self.mean[site], second, widths, n_levels, self.rank)


def _no_compensation(site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
    return None


def _first_windows(windows: WindowSet, tokens: int) -> WindowSet:
    kept, seen = [], 0
    for window in windows:
        if seen >= tokens:
            break
        kept.append(window)
        seen += window.n_scored
    return replace(windows, windows=tuple(kept))


def _last_windows(windows: WindowSet, tokens: int) -> WindowSet:
    kept, seen = [], 0
    for window in reversed(windows.windows):
        if kept and seen + window.n_scored > tokens:
            break
        kept.append(window)
        seen += window.n_scored
    return replace(windows, windows=tuple(reversed(kept)))
