"""`calibrate`: text and a budget in, a policy installed and a report out."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sedac_hf.calibration.collect import check_dense, check_tokenizer, check_weights
from sedac_hf.calibration.dial import Dial
from sedac_hf.calibration.fitting import Fitted, fit
from sedac_hf.calibration.outcome import (
    choose,
    constant_beside,
    likely_share,
    perplexity_of,
    report_of,
    score_held_out,
)
from sedac_hf.calibration.refit import refit_levels
from sedac_hf.calibration.report import CalibrationReport
from sedac_hf.calibration.spread import settle
from sedac_hf.calibration.text import make_text
from sedac_hf.configuration import Objective, default_probe_rank
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import DocumentScores
from sedac_hf.evaluation.scoring import evaluating
from sedac_hf.layer_config import DEFAULT_N_LEVELS
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.forward_pass import closing_passes
from sedac_hf.runtime.observation import counting_layers

FIT_TOKENS = 40960
HELD_OUT_TOKENS = 20480
LEAST_TOKENS = 1024
"""Tokens of either part below which nothing that is fitted or judged could be trusted."""


@dataclass
class _Kept:
    """What a second budget on the same text reuses."""

    key: tuple[Any, ...]
    dense: DocumentScores | None = None
    runs: list[int] = field(default_factory=list)  # of each decoder layer while the dense scores were made
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
    probe_rank: int | None = None,
    checkpoint_layers: Sequence[int] | None = None,
    fit_tokens: int = FIT_TOKENS,
    held_out_tokens: int = HELD_OUT_TOKENS,
    moment_bytes: int = 2 << 30,
    refit_compensation: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> CalibrationReport:
    """Fit the policy that needs least while perplexity on held-out calibration text rises by at most the budget.

    The policy is installed in the runtime; what it holds in memory is within the runtime's ``extra_memory``. What was
    fitted is kept with the runtime as long as text, seed and sizes stay the same, so that a second budget or share
    only searches the dial.

    Held beside the base at the peak: the logits of one batch, dense and cut, where several windows are a batch the cut
    ones twice (or, while spreads are compared, up to 1 GiB of dense logits and one batch's cut ones); hidden states of
    ``fit_tokens`` tokens per checkpoint in bfloat16 until the probes are fitted; for "throughput" the second moments
    and, while compensation is refitted, the hidden states of up to 20,480 tokens for each level in use and for the
    dense stream. Statistics, so second moments too, stay until the runtime is gone or calibrated on something else.

    Args:
        runtime: a runtime, or a decoder (then a runtime is made and kept as long as the model's hooks).
        texts: anything that `sedac_hf.evaluation.read_documents` takes: strings, documents, a path, a dataset.
        max_ppl_increase: largest relative rise of perplexity, above 0; kept by the upper confidence bound over
            held-out documents at level ``confidence``, not by the point estimate.
        share: instead: the needed share of all FFN bytes, costs counted, in (0, 1).
        objective: "latency" cuts by `select`, "throughput" by `truncate`.
        context: tokens per window; default: what the model can read, at most 2048.
        probe_rank: default: `sedac_hf.configuration.default_probe_rank`.
        checkpoint_layers: only where a decoder is given; a runtime has its own.
        refit_compensation: also refit compensation against the dense stream, and keep it where that wins (only for
            "throughput"; a third more time).
        moment_bytes: memory for second moments; where they need more, compensation is a bias alone.

    Checkpoints at default places are moved where decoder layers do not run (cross attention without its other input).

    Raises:
        CalibrationError: arguments out of range, too little text, a tokenizer that does not fit, NaN in the model, no
            policy that keeps the budget. The model is then as it was.
        UnsupportedModelError: the objective's cut cannot be made on these weights.
        ConfigError: a checkpoint was chosen after a layer that does not run.
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
    if runtime.sharded:
        raise CalibrationError(
            "a tensor-parallel base cannot be calibrated: a rank sees its own units alone. Calibrate in one process, "
            "save with `adapter_only=True`, and load the adapter with `tp_plan`"
        )
    probe_rank = default_probe_rank(runtime.hidden_size) if probe_rank is None else probe_rank
    text = make_text(
        runtime.model, tokenizer, texts, context=context, fit_tokens=fit_tokens, held_out_tokens=held_out_tokens,
        least_tokens=LEAST_TOKENS, seed=seed,
    )  # fmt: skip
    check_weights(runtime)
    check_tokenizer(runtime, text.fit, text.held_out)
    former, former_layers = runtime.policy, runtime.checkpoint_layers
    runtime.uninstall()
    try:
        with closing_passes(), evaluating(runtime.model), torch.no_grad():
            settings = (text.fingerprint, n_levels, probe_rank, runtime.extra_memory, moment_bytes, refit_compensation)
            kept = _kept(runtime, (*_fingerprint(runtime), *settings))
            if kept.dense is None:
                with counting_layers(runtime) as runs:
                    kept.dense = score_held_out(runtime, text, progress, "dense perplexity")
                kept.runs = runs
                check_dense(runtime, perplexity_of(kept.dense))
            runtime.avoid_idle_layers(kept.runs)
            if objective not in kept.fitted:
                kept.fitted[objective] = fit(
                    runtime, text, objective, n_levels=n_levels, probe_rank=probe_rank, seed=seed, progress=progress,
                    moment_bytes=moment_bytes,
                )  # fmt: skip
            fitted = kept.fitted[objective]
            curve = fitted.curve
            asked = likely_share(curve, max_ppl_increase) if share is None else share
            settled = settle(runtime, fitted.dial, curve.rate, fitted.check, asked)
            if refit_compensation and objective == "throughput" and settled.spread != 0:
                refit_levels(runtime, settled.dial, fitted.sample, fitted.check, asked)
            chosen, tried = choose(
                runtime, settled.dial, curve, text, kept.dense, max_ppl_increase, share, confidence, seed, progress
            )
            constant = chosen
            if settled.spread != 0:
                constant = constant_beside(
                    runtime, settled.dial, text, kept.dense, chosen.needed_bytes, confidence, seed, progress
                )
            policy = settled.dial.policy(chosen.share)
            runtime.install(policy)
    except BaseException:
        runtime.uninstall()
        if runtime.checkpoint_layers != former_layers:
            runtime.place_checkpoints(former_layers)
        if former is not None:
            runtime.install(former)
        raise
    return report_of(
        runtime, policy, fitted, settled, text, kept.dense, chosen, tried, constant, confidence,
        None if share is not None else max_ppl_increase, share, time.monotonic() - started,
    )  # fmt: skip


def fitted_dial(runtime: SedacRuntime, objective: Objective) -> Dial:
    """The dial that the runtime's last calibration for an objective found, to try other positions of it.

    Raises:
        CalibrationError: there was none.
    """
    kept = _KEPT.get(runtime)
    if kept is None or objective not in kept.fitted:
        raise CalibrationError(f"calibrate for {objective!r} first: nothing is kept with this runtime")
    return kept.fitted[objective].dial


def _check_arguments(
    budget: float, share: float | None, objective: str, confidence: float, n_levels: int, probe_rank: int | None
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
    if probe_rank is not None and probe_rank < 1:
        raise CalibrationError(f"`probe_rank` must be 1 or more, got {probe_rank!r}")


def _kept(runtime: SedacRuntime, key: tuple[Any, ...]) -> _Kept:
    kept = _KEPT.get(runtime)
    if kept is None or kept.key != key:
        kept = _KEPT[runtime] = _Kept(key)
    return kept


def _fingerprint(runtime: SedacRuntime) -> tuple[float, ...]:
    """Tells one set of base weights from another (trained further, say); taken in natural order."""
    ends = [p for site in (runtime.sites[0], runtime.sites[-1]) for p in site.down.parameters()]
    return tuple(float(p.detach().float().sum()) for p in ends if p.is_floating_point() and not p.is_meta)
