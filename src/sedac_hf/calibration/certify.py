"""Find the least share whose rise of perplexity stays within the budget, judged on text that nothing was fitted on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import DocumentScores
from sedac_hf.evaluation.bounds import mean_difference, upper_bound

_TRIES = 5  # in all, or more where it took long to find one that keeps the budget
_REFINED = 2  # tries after the first that keeps the budget
_STRIDE = 0.25  # of the share, the longest step
_CLOSE = 0.005  # a step of the dial that is not worth another run


@dataclass(frozen=True)
class Judged:
    """One dial position on the held-out part.

    share: asked for; needed_bytes, needed_multiply_adds: measured there; rise, bound: of mean log-perplexity, nats;
    mean_ratios: share skipped behind each checkpoint.
    """

    share: float
    needed_bytes: float
    needed_multiply_adds: float
    rise: float
    bound: float
    cut_scores: DocumentScores
    mean_ratios: tuple[float, ...] = ()

    @property
    def ppl_increase(self) -> float:
        """Relative rise of perplexity, point estimate."""
        return math.expm1(self.rise)

    @property
    def ppl_increase_bound(self) -> float:
        """Its upper confidence bound over documents."""
        return math.expm1(self.bound)


def judge(dense: DocumentScores, cut: DocumentScores, confidence: float, seed: int) -> tuple[float, float]:
    """(rise, upper confidence bound) of mean log-perplexity, nats per token, paired over documents."""
    used = np.flatnonzero(dense.tokens)
    delta, tokens = (cut.nll - dense.nll)[used], dense.tokens[used]
    return mean_difference(delta, tokens), upper_bound(delta, tokens, confidence, seed=seed)


def certify(
    run: Callable[[float], Judged], budget: float, start: float, rate: float, least: float
) -> tuple[Judged, list[Judged]]:
    """Search the dial for the least share whose bound keeps the budget.

    Harm is taken to fall with the share as ``exp(-rate * share)``, which only steers the search: what is returned was
    run and judged itself. Several positions are judged on one text without a correction for that: their errors go the
    same way.

    Args:
        run: judges one share.
        budget: largest relative rise of perplexity.
        start: first share tried; rate: per unit of share; least: the smallest share that exists.

    Raises:
        CalibrationError: not even the largest share keeps the budget.
    """
    limit = math.log1p(budget)
    tried: list[Judged] = []
    share = start
    most = 0.98
    while True:
        share = min(max(share, least), most)
        tried.append(run(share))
        kept = [item for item in tried if item.bound <= limit]
        failed = [item for item in tried if item.bound > limit]
        floor = max((item.share for item in failed), default=least)
        ceiling = min((item.share for item in kept), default=most)
        first_kept = next((i for i, item in enumerate(tried) if item.bound <= limit), len(tried))
        refined = len(tried) - 1 - first_kept
        if ceiling - floor < _CLOSE or floor >= most or (len(tried) >= _TRIES and refined >= _REFINED):
            break
        nearest = tried[-1]
        step = math.log(max(nearest.bound, 0.05 * limit) / (0.97 * limit)) / _fall(tried, rate)
        proposed = nearest.share + float(np.clip(step, -_STRIDE, _STRIDE))
        if not kept and (proposed >= most or len(tried) >= _TRIES):
            proposed = most  # the mildest there is: if that fails, none will do
        elif not floor < proposed < ceiling:
            proposed = (floor + ceiling) / 2
        if kept and abs(proposed - ceiling) < _CLOSE:
            break
        share = proposed
    kept = [item for item in tried if item.bound <= limit]
    if not kept:
        seen = ", ".join(
            f"{item.share:.0%}: {item.ppl_increase:+.2%} (bound {item.ppl_increase_bound:+.2%})" for item in tried
        )
        raise CalibrationError(
            f"no policy keeps the budget of +{budget:.2%} perplexity; tried needed shares {seen}. Give a larger "
            "budget, or more documents if the bounds are far above the estimates"
        )
    return min(kept, key=lambda item: item.needed_bytes), tried


def _fall(tried: list[Judged], rate: float) -> float:
    """How fast the bound falls with the share, from the last two tries: more slowly than harm where text is little."""
    if len(tried) < 2:
        return rate
    before, last = tried[-2:]
    if min(before.bound, last.bound) <= 0 or before.share == last.share:
        return rate
    return float(np.clip(math.log(before.bound / last.bound) / (last.share - before.share), rate / 8, 2 * rate))
