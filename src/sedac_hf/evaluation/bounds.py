"""How sure a difference of two perplexities is, when documents, not tokens, were drawn at random.

The tokens of one document go up or down together, so intervals over tokens are too narrow. The quantity is a ratio,
``r = sum(delta_i) / sum(tokens_i)`` over documents i: the difference of mean log-perplexities in nats per token, where
delta_i is the sum of the differences of negative log-likelihood over document i.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from sedac_hf.errors import EvaluationError

MIN_DOCUMENTS = 5
_CHUNK_ELEMENTS = 1 << 22


def mean_difference(delta_per_document: ArrayLike, tokens_per_document: ArrayLike) -> float:
    """The ratio r, in nats per token."""
    delta, tokens = _checked(delta_per_document, tokens_per_document, 1)
    return float(delta.sum() / tokens.sum())


def upper_bound(
    delta_per_document: ArrayLike,
    tokens_per_document: ArrayLike,
    confidence: float = 0.95,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """One-sided upper confidence bound on the mean difference of log-perplexity (nats per token).

    The larger of two bounds, because each fails where the other does not:

    - Student's t with the jackknife variance of the ratio over documents (Cochran, Sampling Techniques, 3rd ed. 1977,
      chapter 6; the cluster jackknife is CR3 of Bell and McCaffrey 2002), its degrees of freedom those of documents of
      unequal length, (sum h^2)^2 / sum h^4 with h the share of tokens (Satterthwaite), at most n - 1. Wide where
      documents are few or one is most of the text.
    - the bootstrap-t over documents (Efron 1981; Hall 1988): corrects for skew. Harm is skewed to the right (few
      documents bear much of it), which makes the t bound too low.

    Args:
        delta_per_document: [n] sums over each document's tokens of nll(cut) - nll(dense), in nats.
        tokens_per_document: [n] tokens of each.
        confidence: probability, over draws of documents, that the bound is not below the true mean.

    Raises:
        EvaluationError: fewer than 5 documents with tokens: no bound from those could be trusted. Cut long documents
            by `split_documents` if there are no more.
    """
    delta, tokens = _checked(delta_per_document, tokens_per_document, MIN_DOCUMENTS)
    _check_confidence(confidence)
    n = len(delta)
    ratio = delta.sum() / tokens.sum()
    left_out = (delta.sum() - delta) / (tokens.sum() - tokens)
    jackknife = math.sqrt((n - 1) / n * float(np.square(left_out - ratio).sum()))
    share = tokens / tokens.sum()
    freedom = min(n - 1.0, float(np.square(share).sum() ** 2 / np.power(share, 4).sum()))
    by_t = ratio + t_quantile(confidence, max(freedom, 1.0)) * jackknife

    spread = _linear_error(delta, tokens, np.ones((1, n)))[1][0]
    if spread == 0:
        return float(by_t)
    studentised = []
    for counts in _resampled_counts(n, resamples, seed):
        means, errors = _linear_error(delta, tokens, counts)
        # a draw of one document n times has no spread: it says nothing, count it as the worst
        studentised.append(np.where(errors > 0, (means - ratio) / np.where(errors > 0, errors, 1), -np.inf))
    lower_tail = float(np.quantile(np.concatenate(studentised), 1 - confidence, method="lower"))
    by_bootstrap = ratio - lower_tail * spread
    return float(max(by_t, by_bootstrap) if math.isfinite(by_bootstrap) else by_t)


def paired_interval(
    delta_per_document: ArrayLike,
    tokens_per_document: ArrayLike,
    confidence: float = 0.95,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Two-sided percentile bootstrap interval of the mean difference (nats per token), documents drawn in pairs.

    The percentile interval carries over to any monotone function of the difference, such as the relative perplexity
    increase exp(r) - 1 (Efron and Tibshirani 1993, chapter 13).

    Raises:
        EvaluationError: fewer than 5 documents with tokens.
    """
    delta, tokens = _checked(delta_per_document, tokens_per_document, MIN_DOCUMENTS)
    _check_confidence(confidence)
    means = np.concatenate(
        [(counts @ delta) / (counts @ tokens) for counts in _resampled_counts(len(delta), resamples, seed)]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t, for probability in [0.5, 1) and freedom >= 1 (need not be whole).

    With t = sqrt(freedom) * tan(angle) the distribution function is 1/2 plus the integral of cos(angle)^(freedom - 1)
    over its integral on (-pi/2, pi/2): smooth, so that Gauss-Legendre quadrature and bisection do.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        half = angle / 2
        area = half * float(weights @ np.cos(half * (nodes + 1)) ** (freedom - 1)) / whole
        low, high = (angle, high) if area < probability - 0.5 else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _linear_error(delta: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio and its linearised standard error for each row of counts [b, n] (how often each document was drawn)."""
    n = len(delta)
    total = counts @ tokens
    means = (counts @ delta) / total
    squares = counts @ np.square(delta) - 2 * means * (counts @ (delta * tokens))
    squares = squares + np.square(means) * (counts @ np.square(tokens))
    # the sums cancel to rounding where the drawn documents agree: no spread, not a tiny one
    noise = 1e-12 * (counts @ np.square(delta))
    squares = np.where(squares > noise, squares, 0.0)
    return means, np.sqrt(n / (n - 1) * squares) / total


def _resampled_counts(n: int, resamples: int, seed: int) -> list[np.ndarray]:
    if resamples < 100:
        raise EvaluationError(f"resamples must be at least 100, got {resamples}")
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // n)
    even = np.full(n, 1 / n)
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    return [generator.multinomial(n, even, size=size).astype(np.float64) for size in sizes]


def _checked(delta: ArrayLike, tokens: ArrayLike, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    d, t = np.asarray(delta, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if d.ndim != 1 or d.shape != t.shape:
        raise EvaluationError(f"differences and tokens must be two arrays [n_documents], got {d.shape} and {t.shape}")
    if not np.isfinite(d).all() or not np.isfinite(t).all() or (t < 0).any():
        raise EvaluationError("differences and tokens per document must be finite, and tokens not negative")
    d, t = d[t > 0], t[t > 0]
    if len(d) < at_least:
        raise EvaluationError(
            f"there must be at least {at_least} documents with scored tokens to judge uncertainty, got {len(d)}; "
            "give more documents, or cut long ones by split_documents"
        )
    return d, t


def _check_confidence(confidence: float) -> None:
    if not 0.5 <= confidence < 1:
        raise EvaluationError(f"confidence must be in [0.5, 1), got {confidence}")
