"""Quality against compute: perplexity of several states of one model on the same windows, beside what each needs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sedac_hf.evaluation.bounds import mean_difference, paired_interval
from sedac_hf.evaluation.scoring import DocumentScores, score
from sedac_hf.evaluation.texts import Document
from sedac_hf.evaluation.windows import WindowSet, make_windows


@dataclass(frozen=True)
class QualityRow:
    """One state of a model.

    increase: of perplexity over dense; low, high: its 95% bootstrap interval over documents; the shares are of all
    FFNs and all tokens, with shadow, probes and compensation counted as cost, bytes those of a bf16 base.
    """

    name: str
    kind: str
    perplexity: float
    increase: float
    low: float
    high: float
    bytes_not_needed: float
    multiply_adds_not_needed: float


def spread_windows(documents: Iterable[Document], tokenizer: Any, *, context: int, tokens: int) -> WindowSet:
    """About ``tokens`` scored tokens in non-overlapping windows, taken evenly from all documents."""
    everything = make_windows(documents, tokenizer, context=context, protocol="windows")
    wanted = max(-(-tokens // (context - 1)), 1)
    step = max(len(everything) // wanted, 1)
    return replace(everything, windows=everything.windows[::step][:wanted])


def dense_row(dense: DocumentScores) -> QualityRow:
    """The row that all others are compared with."""
    perplexity = float(np.exp(dense.nll.sum() / dense.tokens.sum()))
    return QualityRow("dense", "dense", perplexity, 0.0, 0.0, 0.0, 0.0, 0.0)


def measure(
    model: Any,
    windows: WindowSet,
    dense: DocumentScores,
    name: str,
    kind: str,
    state: AbstractContextManager[Any] | None = None,
) -> QualityRow:
    """Score a wrapped model as it is, or in a state of it; its totals are started anew."""
    model.reset_stats()
    with state or nullcontext():
        scores = score(model, windows, progress=False)
    stats = model.stats()
    delta = scores.nll - dense.nll
    known = dense.tokens > 0
    low, high = paired_interval(delta[known], dense.tokens[known])
    return QualityRow(
        name=name,
        kind=kind,
        perplexity=float(np.exp(scores.nll.sum() / scores.tokens.sum())),
        increase=float(np.expm1(mean_difference(delta, dense.tokens))),
        low=float(np.expm1(low)),
        high=float(np.expm1(high)),
        bytes_not_needed=1 - stats.needed_bytes_share,
        multiply_adds_not_needed=1 - stats.needed_multiply_adds_share,
    )
