"""A cut model beside its dense self: the same windows in the same run, and how sure the difference is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.bounds import MIN_DOCUMENTS, mean_difference, paired_interval, upper_bound
from sedac_hf.evaluation.perplexity import PerplexityResult, fitting_context, measure_pair
from sedac_hf.evaluation.processes import gather
from sedac_hf.evaluation.texts import Document, read_documents, split_documents
from sedac_hf.evaluation.windows import BosPolicy, Protocol, WindowSet, make_windows
from sedac_hf.runtime.stats import joined_origins

_FEW_DOCUMENTS = 20  # below this, blocks of text are what uncertainty is counted over
_BLOCK_CHARACTERS = (512, 8192)


@dataclass(frozen=True)
class Comparison:
    """Dense and cut perplexity of one run.

    interval: two-sided bootstrap interval of the relative increase; upper: one-sided upper bound on it; None where the
    text gives fewer than 5 units. unit: what was drawn: "documents", or "blocks" of text where documents are few.
    stats: the cut run's own figures (`SedacStats.to_dict`; shares of several processes weighted by their tokens), or
    None where the model keeps none.
    """

    dense: PerplexityResult
    cut: PerplexityResult
    confidence: float
    interval: tuple[float, float] | None
    upper: float | None
    unit: str
    stats: dict[str, Any] | None

    @property
    def delta(self) -> np.ndarray:
        """float64 [n_documents]: sums of nll(cut) - nll(dense), in nats."""
        difference: np.ndarray = self.cut.document_nll - self.dense.document_nll
        return difference

    @property
    def relative_increase(self) -> float:
        """Perplexity of the cut model over that of the dense one, minus 1."""
        return math.expm1(mean_difference(self.delta, self.dense.document_tokens))

    def to_dict(self, per_document: bool = True) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "dense": self.dense.to_dict(per_document),
            "cut": self.cut.to_dict(per_document),
            "relative_increase": self.relative_increase,
            "confidence": self.confidence,
            "interval": None if self.interval is None else list(self.interval),
            "upper": self.upper,
            "unit": self.unit,
            "stats": self.stats,
        }

    def to_json(self, per_document: bool = True, **kwargs: Any) -> str:
        return json.dumps(self.to_dict(per_document), **kwargs)


def compare(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    dense: Callable[[], AbstractContextManager[Any]] | None = None,
    cut: Callable[[], AbstractContextManager[Any]] | None = None,
    protocol: Protocol = "sliding",
    context: int | None = None,
    stride: int | None = None,
    join: str | None = None,
    bos: BosPolicy = "auto",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Comparison:
    """Measures a model twice on the same windows and compares per document.

    Args:
        dense, cut: give the context in which the model is dense, or cut; by default `model.full_width` and none. Any
            two states of a model can be compared.
        texts and the arguments about windows: see `perplexity`. Of fewer than 20 documents, blocks are made.
        confidence: of the interval (two-sided) and of the upper bound (one-sided).

    Raises:
        EvaluationError: as `perplexity`; a model that offers no dense state where none is given.
    """
    if dense is None:
        dense = getattr(model, "full_width", None)
        if dense is None:
            raise EvaluationError(
                f"compare needs a model that can run at full width, or `dense`; got {type(model).__name__}: wrap it "
                "by SedacForCausalLM.from_base"
            )
    unit = "documents"
    if isinstance(texts, WindowSet):
        windows = texts
    else:
        windows, unit = _windows_of_enough_units(
            read_documents(texts), tokenizer, context=fitting_context(model, context), stride=stride,
            protocol=protocol, join=join, bos=bos, max_tokens=max_tokens,
        )  # fmt: skip
    dense_result, cut_result = measure_pair(
        model, windows, dense=dense, cut=cut, batch_size=batch_size, progress=progress
    )
    delta, tokens = cut_result.document_nll - dense_result.document_nll, dense_result.document_tokens
    interval, upper = None, None
    if len(delta) >= MIN_DOCUMENTS:
        low, high = paired_interval(delta, tokens, confidence, resamples=resamples, seed=seed)
        interval = (math.expm1(low), math.expm1(high))
        upper = math.expm1(upper_bound(delta, tokens, confidence, resamples=resamples, seed=seed))
    return Comparison(dense_result, cut_result, confidence, interval, upper, unit, _stats(model))


def _windows_of_enough_units(documents: Iterable[Document], tokenizer: Any, **kwargs: Any) -> tuple[WindowSet, str]:
    taken: list[Document] = []

    def remembered() -> Iterator[Document]:
        for document in documents:
            taken.append(document)
            yield document

    windows = make_windows(remembered(), tokenizer, **kwargs)
    if len(windows.document_names) >= _FEW_DOCUMENTS:
        return windows, "documents"
    scored = sum(int(window.token_bytes[window.scored_from :].sum()) for window in windows)
    low, high = _BLOCK_CHARACTERS
    size = min(max(scored // (_FEW_DOCUMENTS + 4), low), high)
    return make_windows(split_documents(taken, size), tokenizer, **kwargs), "blocks"


def _stats(model: nn.Module) -> dict[str, Any] | None:
    read = getattr(model, "stats", None)
    if read is None:
        return None
    return merge_stats(gather(read().to_dict()))


def merge_stats(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several processes as one: shares and means weighted by tokens, counts added up."""
    if len(parts) == 1:
        return parts[0]
    tokens = [float(part.get("tokens", 0)) for part in parts]
    weights = [count / sum(tokens) if sum(tokens) else 1 / len(parts) for count in tokens]
    merged: dict[str, Any] = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if isinstance(first, dict):
            names = sorted({name for value in values for name in value})
            found = {name: [value[name] for value in values if name in value] for name in names}
            # Numbers are counts; texts say where the costs of strips came from.
            merged[key] = {
                name: joined_origins(items) if isinstance(items[0], str) else sum(items)
                for name, items in found.items()
            }
        elif isinstance(first, list):
            merged[key] = [merge_stats(list(items)) for items in zip(*values, strict=True)]
        elif key.endswith("share") or key.startswith("mean"):
            merged[key] = sum(weight * value for weight, value in zip(weights, values, strict=True))
        elif isinstance(first, int) and key != "layer_idx":
            merged[key] = sum(values)
        else:
            merged[key] = first
    return merged
