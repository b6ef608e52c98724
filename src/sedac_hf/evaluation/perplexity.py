"""Perplexity of any causal language model, quoted with everything that it depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.scoring import DocumentScores, input_device, score
from sedac_hf.evaluation.texts import read_documents
from sedac_hf.evaluation.windows import BosPolicy, Protocol, WindowSet, make_windows

_USUAL_CONTEXT = 2048  # what published figures are quoted at, where the model can read more


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured under.

    Arrays have one entry per document, in the order of `document_names`: document_nll float64 (sum over its scored
    tokens, nats), document_tokens int64, document_bytes int64 (UTF-8 bytes that those tokens stand for).
    """

    protocol: str
    context: int
    stride: int
    bos: str
    separator: str | None
    dtype: str
    device: str
    document_names: tuple[str, ...]
    document_nll: np.ndarray
    document_tokens: np.ndarray
    document_bytes: np.ndarray
    dense: PerplexityResult | None = None
    """For a SEDAC model: the same model at full width, in the same run on the same windows."""

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self.document_tokens.sum())

    @property
    def mean_nll(self) -> float:
        """Nats per token."""
        return float(self.document_nll.sum() / self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean_nll) if self.mean_nll < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the scored text: comparable between tokenizers."""
        n_bytes = int(self.document_bytes.sum())
        return float(self.document_nll.sum() / math.log(2) / n_bytes) if n_bytes else math.nan

    def to_dict(self, per_document: bool = True) -> dict[str, Any]:
        """Plain types, for JSON."""
        values: dict[str, Any] = {
            "protocol": self.protocol,
            "context": self.context,
            "stride": self.stride,
            "bos": self.bos,
            "separator": self.separator,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "device": self.device,
            "mean_nll": self.mean_nll,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "dense": None if self.dense is None else self.dense.to_dict(per_document=False),
        }
        if per_document:
            values["documents"] = [
                {"name": name, "nll": float(nll), "tokens": int(tokens), "bytes": int(n_bytes)}
                for name, nll, tokens, n_bytes in zip(
                    self.document_names, self.document_nll, self.document_tokens, self.document_bytes, strict=True
                )
            ]
        return values

    def to_json(self, **kwargs: Any) -> str:
        return json.dumps(self.to_dict(), **kwargs)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    protocol: Protocol = "sliding",
    context: int | None = None,
    stride: int | None = None,
    join: str | None = None,
    bos: BosPolicy = "auto",
    max_tokens: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    compare_dense: bool | None = None,
) -> PerplexityResult:
    """Perplexity of a model on texts. A SEDAC model is cut as calibrated: a plain forward call always is.

    Args:
        texts: anything that `read_documents` takes, or a `WindowSet` that is ready (the arguments about windows are
            then left out). A string is a path or the name of a dataset; text itself goes in a list.
        context: tokens per window; by default what the model was made for, at most 2048.
        protocol, stride, join, bos, max_tokens: see `make_windows`.
        batch_size: windows per forward call; by default what keeps the logits near 128 MiB.
        compare_dense: also measure the model at full width, as `result.dense`; by default where it offers that.

    Raises:
        EvaluationError: no text, values out of range, a tokenizer that does not fit, logits that are not finite.
    """
    windows = as_windows(
        model, tokenizer, texts, protocol=protocol, context=context, stride=stride, join=join, bos=bos,
        max_tokens=max_tokens,
    )  # fmt: skip
    full_width = getattr(model, "full_width", None)
    if compare_dense and full_width is None:
        raise EvaluationError(
            f"compare_dense needs a model that can run at full width (SedacForCausalLM), got {type(model).__name__}"
        )
    if full_width is None or compare_dense is False:
        return result_of(model, windows, score(model, windows, batch_size=batch_size, progress=progress))
    dense, cut = measure_pair(model, windows, dense=full_width, batch_size=batch_size, progress=progress)
    return replace(cut, dense=dense)


def measure_pair(
    model: nn.Module,
    windows: WindowSet,
    *,
    dense: Callable[[], AbstractContextManager[Any]],
    cut: Callable[[], AbstractContextManager[Any]] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> tuple[PerplexityResult, PerplexityResult]:
    """Scores the windows inside `dense()`, then inside `cut()`; the model's stats then tell of the latter alone."""
    with dense():
        scores = score(model, windows, batch_size=batch_size, progress=progress, description="dense perplexity")
    dense_result = result_of(model, windows, scores)
    reset = getattr(model, "reset_stats", None)
    if reset is not None:
        reset()
    with cut() if cut is not None else nullcontext():
        scores = score(model, windows, batch_size=batch_size, progress=progress)
    return dense_result, result_of(model, windows, scores)


def as_windows(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    context: int | None = None,
    protocol: Protocol = "sliding",
    stride: int | None = None,
    join: str | None = None,
    bos: BosPolicy = "auto",
    max_tokens: int | None = None,
) -> WindowSet:
    """Texts -> windows that fit the model; a `WindowSet` is given back as it is."""
    if isinstance(texts, WindowSet):
        return texts
    return make_windows(
        read_documents(texts), tokenizer, context=fitting_context(model, context), stride=stride, protocol=protocol,
        join=join, bos=bos, max_tokens=max_tokens,
    )  # fmt: skip


def fitting_context(model: nn.Module, context: int | None = None) -> int:
    """The context asked for, checked against what the model can read; by default that, at most 2048."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    config = getattr(config, "text_config", config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
    found = (getattr(config, name, None) for name in names)
    limit = next((value for value in found if isinstance(value, int) and value > 0), None)
    if context is None:
        return min(limit or _USUAL_CONTEXT, _USUAL_CONTEXT)
    if limit is not None and context > limit:
        raise EvaluationError(f"context must be at most {limit}, which is what the model can read, got {context}")
    return context


def result_of(model: nn.Module, windows: WindowSet, scores: DocumentScores) -> PerplexityResult:
    """A result from the sums of `score`; documents of which no token was scored are left out."""
    used = np.flatnonzero(scores.tokens)
    dtype = getattr(model, "dtype", None) or next(p.dtype for p in model.parameters() if p.is_floating_point())
    return PerplexityResult(
        protocol=windows.protocol,
        context=windows.context,
        stride=windows.stride,
        bos=windows.bos,
        separator=windows.separator,
        dtype=str(dtype).removeprefix("torch."),
        device=_device_name(input_device(model)),
        document_names=tuple(windows.document_names[i] for i in used),
        document_nll=scores.nll[used],
        document_tokens=scores.tokens[used],
        document_bytes=scores.n_bytes[used],
    )


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
