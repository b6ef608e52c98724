"""Splitting of the calibration text."""

from __future__ import annotations

import pytest

from sedac_hf.calibration.text import make_text
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import Document
from tests.evaluation.tokenizers_for_tests import WORDS, word_tokenizer
from tests.tiny_models import tiny_model

SETTINGS = {"context": 32, "fit_tokens": 600, "held_out_tokens": 600, "least_tokens": 200, "seed": 0}


def _documents(n: int, length: int = 200) -> list[Document]:
    return [Document(" ".join(WORDS[(i * 7 + j * j) % 40] for j in range(length)), f"doc{i}") for i in range(n)]


def test_parts_share_no_document_and_come_again_with_the_seed() -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer(adds_bos=False)
    text = make_text(model, tokenizer, _documents(40), **SETTINGS)
    fit, held_out = (
        {part.document_names[i] for window in part for i in window.documents if i >= 0}
        for part in (text.fit, text.held_out)
    )
    assert fit
    assert held_out
    assert not fit & held_out
    assert text.fit.n_tokens <= 600
    assert len(held_out) >= 15  # a slice of each document, not all of a few
    again = make_text(model, tokenizer, _documents(40), **SETTINGS)
    other = make_text(model, tokenizer, _documents(40), **{**SETTINGS, "seed": 1})
    assert text.fingerprint == again.fingerprint != other.fingerprint


def test_few_long_documents_are_cut_into_blocks() -> None:
    text = make_text(tiny_model("llama"), word_tokenizer(adds_bos=False), _documents(2, 1500), **SETTINGS)
    assert len(text.held_out.document_names) >= 5


@pytest.mark.parametrize("documents", [[], _documents(2, 20), [Document("", "empty")]])
def test_too_little_text_is_an_error(documents: list[Document]) -> None:
    with pytest.raises(CalibrationError, match=r"give more text|must"):
        make_text(tiny_model("llama"), word_tokenizer(adds_bos=False), documents, **SETTINGS)


def test_a_context_that_the_model_cannot_read_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="at most 256"):
        make_text(tiny_model("llama"), word_tokenizer(adds_bos=False), _documents(40), **{**SETTINGS, "context": 4096})
