"""Calibration text: documents -> one part to fit on, one part, never fitted on, to judge the budget by."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from sedac_hf.errors import CalibrationError, EvaluationError
from sedac_hf.evaluation import Document, WindowSet, fitting_context, make_windows, read_documents, split_documents

_MOST_DOCUMENTS = 4096
_FEWEST_DOCUMENTS = 16  # fewer are cut into blocks, so that both parts have documents to count uncertainty over
_SAMPLE_CHARACTERS = 20_000
_LEAST_SLICE = 256  # tokens taken of a document at least, where it has them


@dataclass(frozen=True)
class CalibrationText:
    """Windows to fit on and windows to judge by, from different documents.

    fingerprint: of everything that statistics depend on in the text, for reuse.
    """

    fit: WindowSet
    held_out: WindowSet
    fingerprint: str


def make_text(
    model: nn.Module,
    tokenizer: Any,
    texts: Any,
    *,
    context: int | None,
    fit_tokens: int,
    held_out_tokens: int,
    least_tokens: int,
    seed: int,
) -> CalibrationText:
    """Read, shuffle, split by document and cut into windows without overlap.

    Of each document one slice is taken, as long as the tokens wanted need: many documents give tighter bounds than
    many tokens of few documents.

    Raises:
        CalibrationError: too little text, or the tokenizer gives ids that the model does not have.
    """
    try:
        documents = list(itertools.islice(read_documents(texts), _MOST_DOCUMENTS))
        context = fitting_context(model, context)
    except EvaluationError as error:
        raise CalibrationError(str(error)) from error
    total = sum(len(document.text) for document in documents)
    if len(documents) < _FEWEST_DOCUMENTS and total:
        documents = split_documents(documents, max(total // (2 * _FEWEST_DOCUMENTS), 400))
    order = np.random.default_rng(seed).permutation(len(documents))
    shuffled = [documents[i] for i in order]
    parts = []
    for part, wanted in ((shuffled[0::2], fit_tokens), (shuffled[1::2], held_out_tokens)):
        parts.append(_windows(part, tokenizer, context, wanted, least_tokens, seed))
    digest = hashlib.sha256(repr((context, seed)).encode())
    for window in itertools.chain(*parts):
        digest.update(window.input_ids.tobytes())
    return CalibrationText(parts[0], parts[1], digest.hexdigest())


def _windows(
    documents: Sequence[Document], tokenizer: Any, context: int, wanted: int, least: int, seed: int
) -> WindowSet:
    too_little = (
        "calibration needs {least} tokens to fit on and as many to judge by, from different documents; got {got} in "
        "one of the parts: give more text"
    )
    if not documents:
        raise CalibrationError(too_little.format(least=least, got=0))
    try:
        sample = "".join(document.text for document in documents[:8])[:_SAMPLE_CHARACTERS]
        per_token = max(
            len(sample) / max(len(tokenizer(sample, add_special_tokens=False, verbose=False).input_ids), 1), 0.25
        )
        length = int(per_token * max(1.1 * wanted / len(documents), min(context, _LEAST_SLICE)))
        generator = np.random.default_rng(seed + 1)
        slices = [_slice(document, length, generator) for document in documents]
        windows = make_windows(slices, tokenizer, context=context, protocol="windows", max_tokens=wanted)
    except EvaluationError as error:
        raise CalibrationError(f"the text cannot be calibrated on: {error}") from error
    if windows.n_tokens < least:
        raise CalibrationError(too_little.format(least=least, got=windows.n_tokens))
    return windows


def _slice(document: Document, length: int, generator: np.random.Generator) -> Document:
    """About ``length`` characters of a document from a random line on."""
    text = document.text
    if len(text) > length:
        start = int(generator.integers(0, len(text) - length + 1))
        line = text.find("\n", start, start + 200) + 1 if start else 0
        text = text[line or start :][:length]
    return Document(text, document.name)
