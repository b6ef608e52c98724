"""Documents -> token ids, with the document and the bytes of text that each token stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.texts import Document

# Chat models name their end-of-turn token as eos; what separated documents in pretraining is one of these.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Specials:
    """The special tokens that matter here, as ids."""

    bos: int | None
    adds_bos: bool
    separator: int | None
    separator_text: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> Specials:
        """Reads them off a tokenizer; `adds_bos` is what the tokenizer does, not what its settings say."""
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token
        with_special = list(tokenizer("a").input_ids)
        without = list(tokenizer("a", add_special_tokens=False).input_ids)
        adds_bos = bos is not None and with_special != without and with_special[:1] == [bos]
        added = tokenizer.get_added_vocab()
        text = eos if eos in _END_OF_TEXT else next((name for name in _END_OF_TEXT if name in added), eos)
        separator = tokenizer.convert_tokens_to_ids(text) if text is not None else None
        return cls(bos, adds_bos, separator, text)

    def start_token(self, bos: str) -> int | None:
        """What a lone document starts after, where not every window has the bos token: bos, else end-of-text."""
        if bos == "window":
            return None
        return self.bos if bos == "stream" else self.separator


@dataclass(frozen=True)
class EncodedDocument:
    """rows int32 [3, n]: token ids, document index, UTF-8 bytes."""

    rows: np.ndarray
    continues: bool


def encode_documents(
    documents: Iterable[Document | str],
    tokenizer: Any,
    specials: Specials,
    *,
    join: str | None,
    separate: bool,
    names: list[str],
) -> Iterator[EncodedDocument]:
    """Encodes one document after the other, and appends their names to `names` as it goes.

    separate: an end-of-text token after each document (not between the blocks of one). join: see `make_windows`.
    """
    if join is not None:
        yield _encode_joined(documents, tokenizer, join, names)
        return
    waiting: np.ndarray | None = None  # the document whose successor is not known yet
    waiting_continues = False
    for index, item in enumerate(documents):
        document = item if isinstance(item, Document) else Document(item, f"text[{index}]")
        _check_text(document)
        names.append(document.name)
        ids, token_bytes, _ = _encode(document.text, tokenizer)
        rows = np.stack([ids, np.full_like(ids, index), token_bytes])
        if waiting is not None:
            closes = separate and not document.continues
            yield EncodedDocument(_close(waiting, specials) if closes else waiting, waiting_continues)
        waiting, waiting_continues = rows, document.continues
    if waiting is not None:
        yield EncodedDocument(_close(waiting, specials) if separate else waiting, waiting_continues)


def _close(rows: np.ndarray, specials: Specials) -> np.ndarray:
    if specials.separator is None or rows.shape[1] == 0:
        return rows
    return np.concatenate([rows, np.array([[specials.separator], [rows[1, -1]], [0]], dtype=np.int32)], axis=1)


def _check_text(document: Document) -> None:
    if not isinstance(document.text, str):
        raise EvaluationError(
            f"a document must hold a string, got {type(document.text).__name__} in {document.name!r}"
        )


def _encode(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """int32 ids [n], int32 bytes [n] that sum to the text's UTF-8 length, int64 ends [n] in characters or None."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    # verbose: no warning that the text is longer than the model's context; that is what windows are for
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=fast)
    ids = np.asarray(encoded["input_ids"], dtype=np.int32)
    n = len(ids)
    total = len(text.encode("utf-8", "surrogatepass"))
    if n == 0:
        return ids, ids.copy(), np.zeros(0, dtype=np.int64)
    if not fast:  # spread evenly: right for the whole document, near enough for a part of it
        edges = np.linspace(0, total, n + 1).astype(np.int64)
        return ids, np.diff(edges).astype(np.int32), None
    ends = np.maximum.accumulate(np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1])
    ends[-1] = len(text)
    before = ends if text.isascii() else _byte_positions(text)[ends]
    return ids, np.diff(before, prepend=0).astype(np.int32), ends


def _byte_positions(text: str) -> np.ndarray:
    """int64 [len(text) + 1]: UTF-8 bytes before each character."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def _encode_joined(
    documents: Iterable[Document | str], tokenizer: Any, join: str, names: list[str]
) -> EncodedDocument:
    pieces: list[str] = []
    for index, item in enumerate(documents):
        document = item if isinstance(item, Document) else Document(item, f"text[{index}]")
        _check_text(document)
        names.append(document.name)
        if pieces and not document.continues:
            pieces[-1] += join  # the joining string belongs to the document before it
        pieces.append(document.text)
    ids, token_bytes, ends = _encode("".join(pieces), tokenizer)
    if ends is None:
        raise EvaluationError(
            f"join needs a fast tokenizer, to know which document a token belongs to; got {type(tokenizer).__name__}: "
            "leave join out"
        )
    owners = np.searchsorted(np.cumsum([len(piece) for piece in pieces]), ends, side="left")
    return EncodedDocument(np.stack([ids, owners.astype(np.int32), token_bytes]), continues=False)
