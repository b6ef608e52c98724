"""What a calibration ends with: the dial position chosen on held-out text, the constant beside it, the report."""

from __future__ import annotations

import math

import numpy as np

from sedac_hf.calibration.allocation import threshold_for
from sedac_hf.calibration.certify import Judged, certify, judge
from sedac_hf.calibration.dial import Dial, prepared
from sedac_hf.calibration.fitting import Fitted
from sedac_hf.calibration.report import CalibrationReport, CheckpointReport
from sedac_hf.calibration.spread import HarmCurve, Settled
from sedac_hf.calibration.text import CalibrationText
from sedac_hf.errors import CalibrationError, EvaluationError
from sedac_hf.evaluation import DocumentScores, score
from sedac_hf.evaluation.bounds import paired_interval
from sedac_hf.ffn.policy import Policy
from sedac_hf.runtime import SedacRuntime

_SHARE_MISS = 0.005
_CONSTANT_MISS = 0.001


def score_held_out(runtime: SedacRuntime, text: CalibrationText, progress: bool, description: str) -> DocumentScores:
    """Score the held-out part with the model as it is.

    Raises:
        CalibrationError: the logits are not finite, or the text does not fit.
    """
    try:
        return score(runtime.model, text.held_out, progress=progress, description=description)
    except EvaluationError as error:
        raise CalibrationError(f"the held-out part cannot be scored: {error}") from error


def perplexity_of(scores: DocumentScores) -> float:
    """Perplexity over all documents; capped where it overflows."""
    return math.exp(min(float(scores.nll.sum() / scores.tokens.sum()), 700.0))


def likely_share(curve: HarmCurve, budget: float) -> float:
    """Where the dial will about end: KL stands for the rise of log-perplexity, whose bound lies some way above it."""
    return curve.share_for(0.75 * math.log1p(budget))


def choose(
    runtime: SedacRuntime,
    dial: Dial,
    curve: HarmCurve,
    text: CalibrationText,
    dense: DocumentScores,
    budget: float,
    share: float | None,
    confidence: float,
    seed: int,
    progress: bool,
) -> tuple[Judged, list[Judged]]:
    """The dial position that keeps the budget (or has the share asked for), and all that were run to find it.

    Raises:
        CalibrationError: the budget cannot be kept, or the share not reached.
    """

    def run(asked: float) -> Judged:
        runtime.install(dial.policy(asked))
        runtime.tally.reset()
        cut = score_held_out(runtime, text, progress, f"needed share {asked:.2f}")
        stats = runtime.stats()
        runtime.uninstall()
        rise, bound = judge(dense, cut, confidence, seed)
        ratios = tuple(item.mean_ratio for item in stats.checkpoints)
        return Judged(asked, stats.needed_bytes_share, stats.needed_multiply_adds_share, rise, bound, cut, ratios)

    if share is not None:
        if share < dial.least_share:
            raise CalibrationError(
                f"`share` must be at least {dial.least_share:.3f} for this decoder (level 1 of {dial.n_levels} with "
                f"its costs), got {share}"
            )
        tried = [run(share)]
        miss = share - tried[0].needed_bytes
        if abs(miss) > _SHARE_MISS:  # other text than the dial was set on: its tokens are given more, or less
            tried.append(run(max(share + miss, dial.least_share)))
        return min(tried, key=lambda item: abs(item.needed_bytes - share)), tried
    return certify(run, budget, likely_share(curve, budget), curve.rate, dial.least_share)


def constant_beside(
    runtime: SedacRuntime,
    dial: Dial,
    text: CalibrationText,
    dense: DocumentScores,
    share: float,
    confidence: float,
    seed: int,
    progress: bool,
) -> Judged:
    """The best constant level at the same needed share, without probes, on the same text."""
    asked = share
    with prepared(runtime, dial):
        for _ in range(2):  # once to see what the tokens of this text really use, once with that put right
            with runtime.forced(*dial.constant(asked)):
                runtime.tally.reset()
                cut = score_held_out(runtime, text, progress, "constant level")
                stats = runtime.stats()
            asked += share - stats.needed_bytes_share
            if abs(share - stats.needed_bytes_share) < _CONSTANT_MISS:
                break
    rise, bound = judge(dense, cut, confidence, seed)
    return Judged(share, stats.needed_bytes_share, stats.needed_multiply_adds_share, rise, bound, cut)


def report_of(
    runtime: SedacRuntime,
    policy: Policy,
    fitted: Fitted,
    settled: Settled,
    text: CalibrationText,
    dense: DocumentScores,
    chosen: Judged,
    tried: list[Judged],
    constant: Judged,
    confidence: float,
    budget: float | None,
    share: float | None,
    seconds: float,
) -> CalibrationReport:
    """Put the figures of one calibration together."""
    dial = settled.dial
    notes = []
    single = [i for i, site in enumerate(runtime.sites) if site.experts is None]
    if dial.cut == "truncate" and any(fitted.statistics.moment[i] is None for i in single):
        notes.append("second moments need more than `moment_bytes`: compensation is a bias alone")
    if share is not None:
        notes.append("a share was asked for: the bound says what it costs, no budget was kept")
    refitted = sorted(level for level, sites in dial.refitted.items() if sites)
    if refitted and settled.spread != 0:
        notes.append(f"compensation refitted against the dense stream at levels {', '.join(map(str, refitted))}")
    keeps = dial.allocation.shares(threshold_for(dial.allocation, chosen.share - dial.deciding_share))
    dtype = next(p.dtype for p in runtime.model.parameters() if p.is_floating_point())
    return CalibrationReport(
        objective=dial.objective,
        cut=dial.cut,
        max_ppl_increase=budget,
        requested_share=share,
        needed_bytes=chosen.needed_bytes,
        needed_multiply_adds=chosen.needed_multiply_adds,
        dense_perplexity=perplexity_of(dense),
        perplexity=perplexity_of(chosen.cut_scores),
        ppl_increase=chosen.ppl_increase,
        ppl_increase_bound=chosen.ppl_increase_bound,
        confidence=confidence,
        constant_share=constant.needed_bytes,
        constant_ppl_increase=constant.ppl_increase,
        law_over_constant=_law_over_constant(chosen, constant),
        fit_kl=settled.kl[settled.spread],
        fit_constant_kl=settled.kl[0.0],
        spread=settled.spread,
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
                policy.layer_configs, fitted.quality, dial.risk_scale, chosen.mean_ratios, strict=True
            )
        ),
        layer_keep=tuple(float(keep) for keep in keeps),
        tried=tuple((item.share, item.ppl_increase, item.ppl_increase_bound) for item in tried),
        notes=tuple(notes),
    )


def _law_over_constant(law: Judged, constant: Judged) -> tuple[float, float]:
    known = law.cut_scores.tokens > 0
    delta = (law.cut_scores.nll - constant.cut_scores.nll)[known]
    low, high = paired_interval(delta, law.cut_scores.tokens[known])
    return math.expm1(low), math.expm1(high)
