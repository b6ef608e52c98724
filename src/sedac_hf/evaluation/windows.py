"""Documents -> windows of tokens, each token that counts scored exactly once.

A perplexity is comparable only under the same protocol, so the protocols are few and named:

- ``sliding``: the documents joined to one stream; windows start every `stride` tokens and score what the window before
  did not, so that every token but the first of the stream has at least ``context - stride`` tokens before it (Hugging
  Face's "perplexity of fixed-length models").
- ``windows``: the documents joined, cut into windows without overlap, the first token of each not scored and an
  incomplete last window dropped (GPTQ, SparseGPT, Wanda). One short window is kept where the text fills none.
- ``document``: each document alone, after a start token that is not scored; longer ones slide as above (lm-eval's
  rolling loglikelihood).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.encoding import EncodedDocument, Specials, encode_documents
from sedac_hf.evaluation.texts import Document

Protocol = Literal["sliding", "windows", "document"]
BosPolicy = Literal["auto", "window", "stream", "none"]


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads at once; those from position `scored_from` (at least 1) on are scored.

    input_ids int32 [n]; documents int32 [n]: index of the document of each token, -1 for a start token;
    token_bytes int32 [n]: UTF-8 bytes of text that each token stands for, 0 for special tokens.
    """

    index: int
    input_ids: np.ndarray
    documents: np.ndarray
    token_bytes: np.ndarray
    scored_from: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def n_scored(self) -> int:
        """How many of the window's tokens are scored."""
        return len(self.input_ids) - self.scored_from


@dataclass(frozen=True)
class WindowSet:
    """Windows with what they were made under, and the name of every document they touch."""

    windows: tuple[Window, ...]
    document_names: tuple[str, ...]
    protocol: Protocol
    context: int
    stride: int
    bos: str
    separator: str | None
    """Text of the token after each document, or the string that joined them, or None."""

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Window]:
        return iter(self.windows)

    @property
    def n_tokens(self) -> int:
        """Tokens scored."""
        return sum(window.n_scored for window in self.windows)

    @property
    def max_token_id(self) -> int:
        return max(int(window.input_ids.max()) for window in self.windows)


def make_windows(
    documents: Iterable[Document | str],
    tokenizer: Any,
    *,
    context: int,
    stride: int | None = None,
    protocol: Protocol = "sliding",
    join: str | None = None,
    bos: BosPolicy = "auto",
    max_tokens: int | None = None,
) -> WindowSet:
    """Tokenises documents and cuts them into windows; reads no further than `max_tokens` scored tokens need.

    Args:
        context: tokens per window, start token included.
        stride: for sliding and document; default half the context. At most one less than the room for text, so that
            every scored token has something before it.
        join: join the texts by this string and tokenise them once, instead of an end-of-text token after each (GPTQ's
            wikitext figures use two line ends). Needs the whole text in memory and a fast tokenizer.
        bos: where the tokenizer's beginning-of-text token goes: at every window's start, once at the stream's start,
            or nowhere. ``auto``: nowhere if the tokenizer does not add one by itself; once under ``windows`` (as GPTQ
            does); otherwise at every window, since some models (Gemma) break down without it.
        max_tokens: stop after so many scored tokens.

    Raises:
        EvaluationError: a value out of its range, or no text.
    """
    if protocol not in get_args(Protocol):
        raise EvaluationError(f"protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")
    if bos not in get_args(BosPolicy):
        raise EvaluationError(f"bos must be one of {', '.join(get_args(BosPolicy))}, got {bos!r}")
    if max_tokens is not None and max_tokens < 1:
        raise EvaluationError(f"max_tokens must be at least 1, got {max_tokens}")
    if join is not None and protocol == "document":
        raise EvaluationError("join has no meaning under protocol='document', where each document stands alone")
    specials = Specials.of(tokenizer)
    if bos == "auto":
        bos = "none" if not specials.adds_bos else "stream" if protocol == "windows" else "window"
    elif bos != "none" and specials.bos is None:
        raise EvaluationError(f"bos={bos!r} needs a tokenizer with a bos_token, got {type(tokenizer).__name__}")
    prefix = [specials.bos] if bos == "window" and specials.bos is not None else []
    room = context - len(prefix)
    if context < 2 or room < 1:
        raise EvaluationError(f"context must be at least {2 + len(prefix)} tokens, got {context}")
    if protocol == "windows":
        if stride not in (None, room):
            raise EvaluationError(f"protocol='windows' does not overlap: leave stride out, got stride={stride}")
        stride = room
    else:
        most = room if prefix else room - 1
        stride = min(max(context // 2, 1), most) if stride is None else stride
        if not 1 <= stride <= most:
            raise EvaluationError(f"stride must be between 1 and {most} for context={context}, got {stride}")

    names: list[str] = []
    encoded = encode_documents(documents, tokenizer, specials, join=join, separate=protocol != "document", names=names)
    cutter = _Cutter(prefix, room, stride, overlapping=protocol != "windows", max_tokens=max_tokens)
    start = specials.start_token(bos)
    if protocol != "document":
        streams: Iterable[Iterator[EncodedDocument]] = [encoded]
        start = specials.bos if bos == "stream" else None
    else:
        streams = _by_document(encoded)
    for stream in streams:
        cutter.cut(stream, start)
        if cutter.full:
            break
    if not cutter.windows:
        raise EvaluationError("the text must give at least one token that can be scored, got none: it is empty")
    return WindowSet(
        windows=tuple(cutter.windows),
        document_names=tuple(names),
        protocol=protocol,
        context=context,
        stride=stride,
        bos=bos,
        separator=join if join is not None else specials.separator_text if protocol != "document" else None,
    )


class _Cutter:
    """Cuts one token stream after the other into windows, holding no more than one window and one document."""

    def __init__(
        self, prefix: list[int], room: int, stride: int, *, overlapping: bool, max_tokens: int | None
    ) -> None:
        self._prefix, self._room, self._stride, self._overlapping = prefix, room, stride, overlapping
        self._left = max_tokens
        self.windows: list[Window] = []

    @property
    def full(self) -> bool:
        return self._left == 0

    def cut(self, stream: Iterator[EncodedDocument], start: int | None) -> None:
        """Windows of one stream; `start` is a token before it that is read and not scored."""
        # rows: token ids, documents, bytes
        held = np.array([[start], [-1], [0]] if start is not None else np.zeros((3, 0)), dtype=np.int32)
        done = 1 if start is not None else 0  # position in `held` of the first token not yet scored
        before = len(self.windows)
        for document in stream:
            held = np.concatenate([held, document.rows], axis=1)
            begin = 0
            while held.shape[1] - begin >= self._room:
                done = self._emit(held[:, begin : begin + self._room], done)
                if self.full:
                    return
                begin += self._stride
                done -= self._stride
            held = held[:, begin:]
        if held.shape[1] > done and (self._overlapping or len(self.windows) == before):
            self._emit(held, done)

    def _emit(self, rows: np.ndarray, done: int) -> int:
        prefix = np.array([self._prefix, [-1] * len(self._prefix), [0] * len(self._prefix)], dtype=np.int32)
        scored_from = max((done if self._overlapping else 0) + len(self._prefix), 1)
        length = len(self._prefix) + rows.shape[1]
        if self._left is not None:
            length = min(length, scored_from + self._left)
        if length > scored_from:
            ids, documents, token_bytes = np.concatenate([prefix, rows], axis=1)[:, :length]
            window = Window(len(self.windows), ids, documents, token_bytes, scored_from)
            self.windows.append(window)
            if self._left is not None:
                self._left -= window.n_scored
        return int(rows.shape[1])


def _by_document(encoded: Iterator[EncodedDocument]) -> Iterator[Iterator[EncodedDocument]]:
    """One stream per document; the blocks of a document that was split stay together."""
    together: list[EncodedDocument] = []
    for document in encoded:
        if together and not document.continues:
            yield iter(together)
            together = []
        together.append(document)
    if together:
        yield iter(together)
