from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation import Document, make_windows, split_documents
from sedac_hf.evaluation.encoding import Specials
from tests.evaluation.tokenizers_for_tests import BOS, EOS, ByteTokenizer, word_tokenizer, words

PLAIN = word_tokenizer(adds_bos=False)
WITH_BOS = word_tokenizer(adds_bos=True)


def stream(lengths: list[int]) -> list[int]:
    """The joined stream, put together by hand: words, end-of-text after each document."""
    ids: list[int] = []
    for start, n in enumerate(lengths):
        ids += [*PLAIN(words(n, start), add_special_tokens=False).input_ids, EOS]
    return ids


def texts(lengths: list[int]) -> list[str]:
    return [words(n, start) for start, n in enumerate(lengths)]


def strided(n: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, scored) of the sliding windows of a stream of n tokens: the loop of transformers' documentation."""
    found, previous = [], 1
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        found.append((begin, end, end - previous))
        previous = end
        if end == n:
            break
    return [item for item in found if item[2] > 0]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 20), st.data())
def test_sliding_windows_are_those_of_the_transformers_documentation(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context - 1))
    ids = stream(lengths)
    windows = make_windows(texts(lengths), PLAIN, context=context, stride=stride)
    expected = strided(len(ids), context, stride)
    assert [(list(w.input_ids), w.n_scored) for w in windows] == [(ids[b:e], n) for b, e, n in expected]
    assert windows.n_tokens == len(ids) - 1  # each but the very first, once


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 20))
def test_windows_protocol_is_gptqs(lengths: list[int], context: int) -> None:
    ids = stream(lengths)
    windows = make_windows(texts(lengths), PLAIN, context=context, protocol="windows")
    whole = len(ids) // context
    expected = [ids[i * context : (i + 1) * context] for i in range(whole)] or [ids]
    assert [list(w.input_ids) for w in windows] == expected
    assert all(w.scored_from == 1 for w in windows)


def test_document_protocol_keeps_documents_apart() -> None:
    windows = make_windows(texts([5, 30, 1]), PLAIN, context=12, stride=4, protocol="document")
    for window in windows:
        assert len(set(window.documents[window.documents >= 0])) == 1
    starts = [w for w in windows if w.documents[0] == -1]
    assert [list(w.input_ids[:1]) for w in starts] == [[EOS]] * 3
    scored = [sum(w.n_scored for w in windows if w.documents[-1] == i) for i in range(3)]
    assert scored == [5, 30, 1]  # every token of a document, since it starts after an end-of-text token


def test_scored_tokens_have_the_context_that_the_stride_allows() -> None:
    windows = make_windows(texts([200]), PLAIN, context=32, stride=8)
    assert all(w.scored_from >= 32 - 8 for w in windows.windows[1:])


@pytest.mark.parametrize(
    ("protocol", "bos", "first", "second"),
    [
        ("sliding", "auto", BOS, BOS),
        ("windows", "auto", BOS, None),
        ("sliding", "stream", BOS, None),
        ("sliding", "none", None, None),
    ],
)
def test_start_token_goes_where_it_is_said(protocol: Any, bos: Any, first: int | None, second: int | None) -> None:
    windows = make_windows(texts([50]), WITH_BOS, context=16, protocol=protocol, bos=bos)
    for window, token in zip(windows.windows[:2], (first, second), strict=True):
        assert (window.input_ids[0] == BOS) == (token == BOS)
        assert len(window) == 16
        assert window.documents[0] == (-1 if token == BOS else 0)
    scored = [int(t) for w in windows for t in w.input_ids[w.scored_from :]]
    assert BOS not in scored
    if protocol == "sliding":
        body = stream([50])
        assert scored == (body[1:] if bos == "none" else body)


def test_auto_adds_no_start_token_that_the_tokenizer_does_not() -> None:
    assert make_windows(texts([50]), PLAIN, context=16).bos == "none"
    assert make_windows(texts([50]), PLAIN, context=16, bos="window").windows[1].input_ids[0] == BOS


@pytest.mark.parametrize("protocol", ["sliding", "windows", "document"])
@pytest.mark.parametrize("limit", [1, 7, 50])
def test_max_tokens_is_exact(protocol: Any, limit: int) -> None:
    whole = make_windows(texts([40, 40, 40]), PLAIN, context=16, protocol=protocol)
    part = make_windows(texts([40, 40, 40]), PLAIN, context=16, protocol=protocol, max_tokens=limit)
    assert part.n_tokens == limit

    def scored(ws: Any) -> list[int]:
        return [int(t) for w in ws for t in w.input_ids[w.scored_from :]]

    assert scored(part) == scored(whole)[:limit]


def test_reads_no_further_than_max_tokens_needs() -> None:
    def endless() -> Any:
        while True:
            yield words(20)

    assert make_windows(endless(), PLAIN, context=16, max_tokens=500).n_tokens == 500


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=4), st.integers(4, 40))
def test_bytes_of_the_scored_tokens_are_those_of_the_text(demo: Any, pieces: list[str], context: int) -> None:
    _, tokenizer = demo
    windows = make_windows(pieces, tokenizer, context=context, stride=1, protocol="document")
    found = [
        sum(int(w.token_bytes[w.documents == i].sum()) for w in windows if w.n_scored) for i in range(len(pieces))
    ]
    scored = sum(int(w.token_bytes[w.scored_from :].sum()) for w in windows)
    assert scored == sum(len(piece.encode()) for piece in pieces)
    assert all(found)


def test_slow_tokenizer_spreads_bytes() -> None:
    windows = make_windows(["äöü" * 10], ByteTokenizer(), context=16)
    assert windows.separator is None
    assert sum(int(w.token_bytes[w.scored_from :].sum()) for w in windows) == 60 - 1  # all but the first byte


def test_join_tokenises_once_and_still_knows_documents(demo: Any) -> None:
    _, tokenizer = demo
    pieces = ["def f(x):\n    return x", "import os", "x = 1\n\ny = 2"]
    windows = make_windows(pieces, tokenizer, context=512, join="\n\n")
    (window,) = windows.windows
    assert list(window.input_ids) == tokenizer("\n\n".join(pieces)).input_ids
    assert sorted(set(window.documents)) == [0, 1, 2]
    assert (np.diff(window.documents) >= 0).all()
    assert int(window.token_bytes.sum()) == len("\n\n".join(pieces))
    assert windows.separator == "\n\n"
    with pytest.raises(EvaluationError, match="fast tokenizer"):
        make_windows(pieces, ByteTokenizer(), context=16, join=" ")


def test_blocks_of_one_document_run_on() -> None:
    text = "\n".join(words(10, i) for i in range(20))
    blocks = split_documents([Document(text, "a"), Document(words(3), "b")], characters=120)
    assert "".join(b.text for b in blocks) == text + words(3)
    assert [b.continues for b in blocks] == [False, *[True] * (len(blocks) - 2), False]
    assert blocks[1].name == "a#1"
    assert blocks[-1].name == "b"
    for protocol in ("sliding", "windows", "document"):
        cut = make_windows(blocks, PLAIN, context=16, protocol=protocol)
        uncut = make_windows([text, words(3)], PLAIN, context=16, protocol=protocol)
        assert [list(w.input_ids) for w in cut] == [list(w.input_ids) for w in uncut]
        assert len(cut.document_names) == len(blocks)


def test_chat_tokenizers_end_of_turn_is_not_what_separates_documents() -> None:
    tokenizer = word_tokenizer(adds_bos=False)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|endoftext|>"]})
    assert Specials.of(tokenizer).separator_text in ("<|endoftext|>", "</s>")
    assert replace(Specials.of(tokenizer), separator=None).start_token("none") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 1}, "context must be at least 2"),
        ({"context": 16, "stride": 16}, "stride must be between 1 and 15"),
        ({"context": 16, "stride": 0}, "stride must be between"),
        ({"context": 16, "stride": 4, "protocol": "windows"}, "does not overlap"),
        ({"context": 16, "protocol": "gptq"}, "protocol must be one of"),
        ({"context": 16, "bos": "yes"}, "bos must be one of"),
        ({"context": 16, "max_tokens": 0}, "max_tokens must be at least 1"),
        ({"context": 16, "protocol": "document", "join": " "}, "join has no meaning"),
    ],
)
def test_bad_values_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        make_windows(texts([40]), PLAIN, **arguments)


@pytest.mark.parametrize("empty", [[], [""], ["", ""]])
def test_no_text_is_an_error(empty: list[str]) -> None:
    with pytest.raises(EvaluationError, match="at least one token"):
        make_windows(empty, PLAIN, context=16)


def test_text_must_be_strings() -> None:
    with pytest.raises(EvaluationError, match="must hold a string, got int"):
        make_windows([3], PLAIN, context=16)  # type: ignore[list-item]
