"""Windows -> negative log-likelihood per token, on any causal language model of `transformers`.

Logits stay in the model's dtype; only slices of a bounded size are ever raised to float32 (or float64, for KL).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.processes import gather_in_order, is_main_process, share_of_this_process
from sedac_hf.evaluation.windows import Window, WindowSet

_SLICE_ELEMENTS = 1 << 20  # logits raised to float32 at a time: 4 MiB, within the caches of a CPU
_BATCH_LOGITS = 1 << 26  # logits of a batch by default: 128 MiB in half precision
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Batch:
    """Windows as tensors, padded on the right.

    input_ids int64 [B, S]; attention_mask int64 [B, S] or None where nothing is padded; scored bool [B, S-1]: whether
    the token at position s+1 counts; padding never does.
    """

    windows: tuple[Window, ...]
    input_ids: Tensor
    attention_mask: Tensor | None
    scored: Tensor

    @property
    def targets(self) -> Tensor:
        """int64 [n]: the scored tokens, window after window."""
        return self.input_ids[:, 1:][self.scored]

    @property
    def documents(self) -> np.ndarray:
        """int32 [n]: the document of each scored token."""
        return np.concatenate([window.documents[window.scored_from :] for window in self.windows])

    @property
    def token_bytes(self) -> np.ndarray:
        """int32 [n]: the bytes of each scored token."""
        return np.concatenate([window.token_bytes[window.scored_from :] for window in self.windows])


@dataclass(frozen=True)
class DocumentScores:
    """Sums per document, arrays [n_documents]: nll float64 in nats, tokens int64, n_bytes int64."""

    nll: np.ndarray
    tokens: np.ndarray
    n_bytes: np.ndarray


def make_batch(windows: Sequence[Window], device: torch.device | str = "cpu", pad_token_id: int = 0) -> Batch:
    """Stacks windows; shorter ones are padded on the right, where a causal model's tokens do not see it."""
    lengths = [len(window) for window in windows]
    size = max(lengths)
    ids = np.full((len(windows), size), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(windows), size), dtype=np.int64)
    scored = np.zeros((len(windows), size - 1), dtype=bool)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window.input_ids
        mask[row, : len(window)] = 1
        scored[row, window.scored_from - 1 : len(window) - 1] = True
    padded = min(lengths) < size
    return Batch(
        windows=tuple(windows),
        input_ids=torch.from_numpy(ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device) if padded else None,
        scored=torch.from_numpy(scored).to(device),
    )


def batches(windows: Iterable[Window], batch_size: int) -> Iterator[tuple[Window, ...]]:
    """Groups of at most `batch_size` windows of one length, the longest first.

    Nothing is padded: padding would cost compute, and a SEDAC model's stats would count tokens that are none.
    """
    for _, same in groupby(sorted(windows, key=len, reverse=True), key=len):  # stable
        while group := tuple(islice(same, batch_size)):
            yield group


def default_batch_size(model: nn.Module, context: int) -> int:
    """Windows per batch such that the logits stay near 128 MiB and a CPU's working set stays small."""
    vocabulary = vocabulary_size(model) or 1 << 17
    return max(1, min(_BATCH_TOKENS, _BATCH_LOGITS // vocabulary) // context)


def vocabulary_size(model: nn.Module) -> int | None:
    """Rows of the input embedding, None where they cannot be read."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) else None


def scored_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [n, V], in the model's dtype, that predict the batch's n scored tokens, in the order of `batch.targets`.

    One plain forward call without a KV cache. Where the model can (`logits_to_keep`), the head is not run for
    positions before the first scored one.
    """
    keep = batch.input_ids.shape[1] - (min(window.scored_from for window in batch.windows) - 1)
    kwargs: dict[str, Any] = {"use_cache": False}
    if batch.attention_mask is not None:
        kwargs["attention_mask"] = batch.attention_mask
    if _takes_logits_to_keep(model):
        kwargs["logits_to_keep"] = keep
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch.input_ids, **kwargs).logits
        scored = batch.scored[:, batch.scored.shape[1] - (logits.shape[1] - 1) :]
        if len(batch.windows) == 1 and bool(scored.all()):
            return logits[0, :-1]  # a view: logits are what most of the memory goes to, so no second copy of them
        return logits[:, :-1][scored.to(logits.device)]


def _takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _slices(n_rows: int, n_columns: int) -> Iterator[slice]:
    step = max(1, _SLICE_ELEMENTS // max(1, n_columns))
    for start in range(0, n_rows, step):
        yield slice(start, start + step)


def nll_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 [n]: -log p(target) in nats, from logits [n, V] of any floating dtype and targets int64 [n]."""
    targets = targets.to(logits.device)
    out = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    for part in _slices(*logits.shape):
        rows = logits[part].float()
        out[part] = torch.logsumexp(rows, dim=-1) - rows.gather(1, targets[part, None]).squeeze(1)
    return out


def kl_to(reference: Tensor, logits: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """KL(reference || logits) per row, in nats, in `dtype` [n], never negative; from two arrays of logits [n, V].

    float64 by default: a mild cut moves a distribution by 1e-4 nats or less, which float32 sums blur.
    """
    if reference.shape != logits.shape:
        raise EvaluationError(
            f"both logits must have one shape, got {tuple(reference.shape)} and {tuple(logits.shape)}"
        )
    if logits.device.type == "mps":  # has no float64
        dtype = torch.float32
    out = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    for part in _slices(*logits.shape):
        log_p = torch.log_softmax(reference[part].to(logits.device, dtype), dim=-1)
        log_q = torch.log_softmax(logits[part].to(dtype), dim=-1)
        terms = log_q.neg_().add_(log_p)  # in place: a slice is several MiB, and every step of it another
        p = log_p.exp_()
        terms.mul_(p)
        # a vocabulary entry masked to -inf has p = 0 and adds nothing, where p * (log p - log q) would be NaN
        out[part] = terms.masked_fill_(~(p > 0), 0.0).sum(-1)
    return out.clamp_(min=0)


def token_nll(model: nn.Module, batch: Batch) -> Tensor:
    """float32 [B, S-1]: -log p of the token at position s+1 in nats; 0 where `batch.scored` is False.

    Raises:
        EvaluationError: NaN or infinity, naming the window.
    """
    nll = checked_nll(model, batch)
    out = torch.zeros(batch.scored.shape, dtype=torch.float32, device=nll.device)
    out[batch.scored.to(nll.device)] = nll
    return out


def checked_nll(model: nn.Module, batch: Batch) -> Tensor:
    """float32 [n]: as `token_nll`, the scored tokens only, in the order of `batch.targets`."""
    nll = nll_of_logits(scored_logits(model, batch), batch.targets)
    check_finite(nll, batch)
    return nll


def check_finite(values: Tensor, batch: Batch) -> None:
    """Raises an EvaluationError that names the window if one of values [n] (one per scored token) is not finite."""
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    row, column = (int(v) for v in batch.scored.nonzero()[int((~finite).nonzero()[0])])
    window, bad = batch.windows[row], int((~finite).sum())
    raise EvaluationError(
        f"the logits must be finite, got a log-likelihood of {float(values[~finite][0])} in window {window.index} "
        f"(document {int(window.documents[column + 1])}) at position {column + 1}; {bad} tokens of the "
        "batch are hit: check the weights, or evaluate in a wider dtype (float32, bfloat16)"
    )


def score(
    model: nn.Module,
    windows: WindowSet,
    *,
    batch_size: int | None = None,
    on_batch: Callable[[Batch, Tensor], None] | None = None,
    progress: bool = True,
    description: str = "perplexity",
) -> DocumentScores:
    """Scores all windows and sums per document, in float64.

    Under `accelerate launch` each process takes every n-th batch and all get the sums of all; batches and the order of
    summation are those of one process, so that the figure is the same.

    Args:
        on_batch: called with each batch of this process and its nll float32 [n] (order of `batch.targets`); the
            longest windows come first.

    Raises:
        EvaluationError: logits that are not finite (in any process), a tokenizer that does not fit the model.
    """
    vocabulary = vocabulary_size(model)
    if vocabulary is not None and windows.max_token_id >= vocabulary:
        raise EvaluationError(
            f"the tokenizer must fit the model, got the token id {windows.max_token_id} for an embedding of "
            f"{vocabulary} rows; load the tokenizer that belongs to the model"
        )
    if batch_size is not None and batch_size < 1:
        raise EvaluationError(f"batch_size must be at least 1, got {batch_size}")
    groups = list(batches(windows, batch_size or default_batch_size(model, windows.context)))
    mine = share_of_this_process(len(groups))
    device = input_device(model)

    def of_one_batch(number: int) -> tuple[np.ndarray, ...]:
        batch = make_batch(groups[number], device)
        nll = checked_nll(model, batch)
        if on_batch is not None:
            on_batch(batch, nll)
        documents, place = np.unique(batch.documents, return_inverse=True)
        values = nll.double().cpu().numpy()
        return (
            documents,
            np.bincount(place, weights=values),
            np.bincount(place),
            np.bincount(place, weights=batch.token_bytes).astype(np.int64),
        )

    bar = tqdm(mine, desc=description, unit="batch", disable=not progress or not is_main_process())
    with evaluating(model):
        parts = gather_in_order(of_one_batch, bar)
    n = len(windows.document_names)
    scores = DocumentScores(np.zeros(n), np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
    for documents, nll, tokens, n_bytes in parts:
        scores.nll[documents] += nll
        scores.tokens[documents] += tokens
        scores.n_bytes[documents] += n_bytes
    return scores


def input_device(model: nn.Module) -> torch.device:
    """Where the model expects its token ids."""
    device = getattr(model, "device", None)
    return device if isinstance(device, torch.device) else next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
