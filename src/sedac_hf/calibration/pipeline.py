"""`calibrate`: text and a budget in, a policy installed and a report out."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sedac_hf.calibration.certify import Judged, certify, judge
from sedac_hf.calibration.collect import check_dense, check_tokenizer
from sedac_hf.calibration.fitting import Fitted, fit
from sedac_hf.calibration.report import CalibrationReport, CheckpointReport
from sedac_hf.calibration.text import CalibrationText, make_text
from sedac_hf.configuration import DEFAULT_N_LEVELS, DEFAULT_PROBE_RANK, Objective
from sedac_hf.errors import CalibrationError, EvaluationError
from sedac_hf.evaluation import DocumentScores, score
from sedac_hf.evaluation.scoring import evaluating
from sedac_hf.ffn.policy import Policy
from sedac_hf.runtime import SedacRuntime

FIT_TOKENS = 20480
HELD_OUT_TOKENS = 20480
LEAST_TOKENS = 1024
"""Tokens of either part below which nothing that is fitted or judged could be trusted."""


@dataclass
class _Kept:
    """What a second budget on the same text reuses."""

    key: tuple[Any, ...]
    dense: DocumentScores | None = None
    fitted: dict[str, Fitted] = field(default_factory=dict)


_KEPT: weakref.WeakKeyDictionary[SedacRuntime, _Kept] = weakref.WeakKeyDictionary()


def calibrate(
    runtime: SedacRuntime | nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    max_ppl_increase: float = 0.01,
    share: float | None = None,
    objective: Objective = "latency",
    context: int | None = None,
    confidence: float = 0.95,
    n_levels: int = DEFAULT_N_LEVELS,
    probe_rank: int = DEFAULT_PROBE_RANK,
    checkpoint_layers: Sequence[int] | None = None,
    fit_tokens: int = FIT_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    compensation_memory: float = 0.1,
    moment_bytes: int = 2 << 30,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Fit the policy that needs least while perplexity on held-out calibration text rises by at most the budget.

    The policy is installed in the runtime. What was fitted is kept with the runtime as long as text, seed and sizes
    stay the same, so that a second budget or share only searches the dial.

    Args:
        runtime: a runtime, or a decoder (then a runtime is made and kept as long as the model's hooks).
        texts: anything that `sedac_hf.evaluation.read_documents` takes: strings, documents, a path, a dataset.
        max_ppl_increase: largest relative rise of perplexity, above 0; kept by the upper confidence bound over
            held-out documents at level ``confidence``, not by the point estimate.
        share: instead: the needed share of all FFN bytes, costs counted, in (0, 1).
        objective: "latency" cuts by `select`, "throughput" by `truncate`.
        context: tokens per window; default: what the model can read, at most 2048.
        checkpoint_layers: only where a decoder is given; a runtime has its own.
        compensation_memory: most that compensation may add, as a share of the base's parameters.
        moment_bytes: memory for second moments; where they need more, compensation is a bias alone.

    Raises:
        CalibrationError: arguments out of range, too little text, a tokenizer that does not fit, NaN in the model, no
            policy that keeps the budget. The model is then as it was.
        UnsupportedModelError: the objective's cut cannot be made on these weights.
    """
    started = time.monotonic()
    _check_arguments(max_ppl_increase, share, objective, confidence, n_levels, probe_rank)
    if isinstance(runtime, SedacRuntime):
        if checkpoint_layers is not None and tuple(checkpoint_layers) != runtime.checkpoint_layers:
            raise CalibrationError(
                f"`checkpoint_layers` must be the runtime's, {list(runtime.checkpoint_layers)}, got "
                f"{list(checkpoint_layers)}; make the wrapper with other layers to change them"
            )
    else:
        runtime = SedacRuntime(runtime, checkpoint_layers)
    text = make_text(
        runtime.model, tokenizer, texts, context=context, fit_tokens=fit_tokens, held_out_tokens=held_out_tokens,
        least_tokens=LEAST_TOKENS, seed=seed,
    )  # fmt: skip
    check_tokenizer(runtime, text.fit, text.held_out)
    former = runtime.policy
    runtime.uninstall()
    try:
        with evaluating(runtime.model), torch.no_grad():
            kept = _kept(runtime, (text.fingerprint, n_levels, probe_rank, compensation_memory, moment_bytes))
            if kept.dense is None:
                kept.dense = _score(runtime, text, progress, "dense perplexity")
                check_dense(runtime, _perplexity(kept.dense))
            if objective not in kept.fitted:
                kept.fitted[objective] = fit(
                    runtime, text, objective, n_levels=n_levels, probe_rank=probe_rank, seed=seed, progress=progress,
                    compensation_memory=compensation_memory, moment_bytes=moment_bytes,
                )  # fmt: skip
            fitted = kept.fitted[objective]
            chosen, tried = _choose(
                runtime, fitted, text, kept.dense, max_ppl_increase, share, confidence, seed, progress
            )
            constant = _constant(runtime, fitted, text, kept.dense, chosen.needed_bytes, confidence, seed, progress)
            policy = fitted.dial.policy(chosen.share)
            runtime.install(policy)
            ratios = _mean_ratios(runtime, text, progress)
    except BaseException:
        runtime.uninstall()
        if former is not None:
            runtime.install(former)
        raise
    return _report(
        runtime, policy, fitted, text, kept.dense, chosen, tried, constant, ratios, confidence,
        None if share is not None else max_ppl_increase, share, time.monotonic() - started,
    )  # fmt: skip


def _check_arguments(
    budget: float, share: float | None, objective: str, confidence: float, n_levels: int, probe_rank: int
) -> None:
    if share is None and not (math.isfinite(budget) and budget > 0):
        raise CalibrationError(f"`max_ppl_increase` must be a finite number above 0, e.g. 0.01, got {budget!r}")
    if share is not None and not 0 < share < 1:
        raise CalibrationError(f"`share` must be between 0 and 1 (needed share of FFN bytes), got {share!r}")
    if objective not in ("latency", "throughput"):
        raise CalibrationError(f"`objective` must be 'latency' or 'throughput', got {objective!r}")
    if not 0.5 <= confidence < 1:
        raise CalibrationError(f"`confidence` must be in [0.5, 1), got {confidence!r}")
    if not 2 <= n_levels <= 255:
        raise CalibrationError(f"`n_levels` must be in 2..255, got {n_levels!r}")
    if probe_rank < 1:
        raise CalibrationError(f"`probe_rank` must be 1 or more, got {probe_rank!r}")


def _kept(runtime: SedacRuntime, key: tuple[Any, ...]) -> _Kept:
    kept = _KEPT.get(runtime)
    weights = tuple(site.down.weight._version for site in runtime.sites if hasattr(site.down, "weight"))
    del weights
    if kept is None or kept.key != key:
        kept = _KEPT[runtime] = _Kept(key)
    return kept


def _score(runtime: SedacRuntime, text: CalibrationText, progress: bool, description: str) -> DocumentScores:
    try:
        return score(runtime.model, text.held_out, progress=progress, description=description)
    except EvaluationError as error:
        raise CalibrationError(f"the held-out part cannot be scored: {error}") from error


def _perplexity(scores: DocumentScores) -> float:
    return math.exp(min(float(scores.nll.sum() / scores.tokens.sum()), 700.0))


def _choose(
    runtime: SedacRuntime,
    fitted: Fitted,
    text: CalibrationText,
    dense: DocumentScores,
    budget: float,
    share: float | None,
    confidence: float,
    seed: int,
    progress: bool,
) -> tuple[Judged, list[Judged]]:
    dial = fitted.dial

    def run(asked: float) -> Judged:
        runtime.install(dial.policy(asked))
        runtime.tally.reset()
        cut = _score(runtime, text, progress, f"needed share {asked:.2f}")
        stats = runtime.stats()
        runtime.uninstall()
        rise, bound = judge(dense, cut, confidence, seed)
        return Judged(asked, stats.needed_bytes_share, stats.needed_multiply_adds_share, rise, bound, cut)

    if share is not None:
        if share < dial.least_share:
            raise CalibrationError(
                f"`share` must be at least {dial.least_share:.3f} for this decoder (level 1 of {dial.n_levels} with "
                f"its costs), got {share}"
            )
        judged = run(share)
        return judged, [judged]
    # Where KL stands for the rise of log-perplexity, and its bound lies some way above it.
    start = fitted.middle + (fitted.log_kl - math.log(0.75 * math.log1p(budget))) / fitted.rate
    return certify(run, budget, start, fitted.rate, dial.least_share)


def _constant(
    runtime: SedacRuntime,
    fitted: Fitted,
    text: CalibrationText,
    dense: DocumentScores,
    share: float,
    confidence: float,
    seed: int,
    progress: bool,
) -> Judged:
    """The best constant operating points at the same needed share, without probes, on the same text."""
    dial = fitted.dial
    runtime.weights.reorder(dial.channel_order)
    try:
        if dial.cut == "select":
            runtime.build_shadows()
        points, compensation, _ = dial.constant(share)
        with runtime.forced(points, compensation):
            runtime.tally.reset()
            cut = _score(runtime, text, progress, "constant level")
            stats = runtime.stats()
    finally:
        runtime.uninstall()
    rise, bound = judge(dense, cut, confidence, seed)
    return Judged(share, stats.needed_bytes_share, stats.needed_multiply_adds_share, rise, bound, cut)


def _mean_ratios(runtime: SedacRuntime, text: CalibrationText, progress: bool) -> list[float]:
    return [item.mean_ratio for item in runtime.stats().checkpoints]


def _report(
    runtime: SedacRuntime,
    policy: Policy,
    fitted: Fitted,
    text: CalibrationText,
    dense: DocumentScores,
    chosen: Judged,
    tried: list[Judged],
    constant: Judged,
    ratios: list[float],
    confidence: float,
    budget: float | None,
    share: float | None,
    seconds: float,
) -> CalibrationReport:
    dial = fitted.dial
    middle = dial.allocation.points(0.0)
    del middle
    notes = []
    if dial.cut == "truncate" and any(second is None for second in fitted.statistics.moment):
        notes.append("second moments need more than `moment_bytes`: compensation is a bias alone")
    if share is not None:
        notes.append("a share was asked for: the bound says what it costs, no budget was kept")
    from sedac_hf.calibration.allocation import threshold_for

    keeps = dial.allocation.shares(threshold_for(dial.allocation, chosen.share - dial.probe_share))
    dtype = next(p.dtype for p in runtime.model.parameters() if p.is_floating_point())
    return CalibrationReport(
        objective=dial.objective,
        cut=dial.cut,
        max_ppl_increase=budget,
        requested_share=share,
        needed_bytes=chosen.needed_bytes,
        needed_multiply_adds=chosen.needed_multiply_adds,
        dense_perplexity=_perplexity(dense),
        perplexity=_perplexity(chosen.cut_scores),
        ppl_increase=chosen.ppl_increase,
        ppl_increase_bound=chosen.ppl_increase_bound,
        confidence=confidence,
        constant_share=constant.needed_bytes,
        constant_ppl_increase=constant.ppl_increase,
        fit_kl=fitted.fit_kl[fitted.spread],
        fit_constant_kl=fitted.fit_kl[0.0],
        spread=fitted.spread,
        protocol=text.held_out.protocol,
        context=text.held_out.context,
        fit_tokens=text.fit.n_tokens,
        held_out_tokens=text.held_out.n_tokens,
        held_out_documents=int(np.count_nonzero(dense.tokens)),
        n_levels=dial.n_levels,
        confidence_decay=policy.confidence_decay,
        dtype=str(dtype).removeprefix("torch."),
        seconds=seconds,
        checkpoints=tuple(
            CheckpointReport(
                layer_idx=item.layer_idx,
                target=item.target_exit_rate,
                threshold=item.initial_threshold,
                weight=item.confidence_weight,
                rank_correlation=quality,
                risk_scale=scale,
                mean_ratio=ratio,
            )
            for item, quality, scale, ratio in zip(
                policy.layer_configs, fitted.quality, dial.risk_scale, ratios, strict=True
            )
        ),
        layer_keep=tuple(float(keep) for keep in keeps),
        tried=tuple((item.share, item.ppl_increase, item.ppl_increase_bound) for item in tried),
        notes=tuple(notes),
    )
