from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation import (
    kl_to,
    make_batch,
    make_windows,
    nll_of_logits,
    perplexity,
    score,
    scored_logits,
    stdlib_documents,
    token_nll,
)
from tests.evaluation.tokenizers_for_tests import BOS, EOS, word_tokenizer, words
from tests.tiny_models import FAMILIES, tiny_model

PLAIN, WITH_BOS = word_tokenizer(adds_bos=False), word_tokenizer(adds_bos=True)
TEXTS = [words(n, start) for start, n in enumerate([3, 25, 11, 40, 1])]


def ids_of(text: str) -> list[int]:
    ids: list[int] = PLAIN(text, add_special_tokens=False).input_ids
    return ids


@torch.no_grad()
def surprise(model: nn.Module, before: list[int], token: int) -> float:
    """-log p(token | before), by one forward pass for this one token, in float64."""
    logits = model(torch.tensor([before])).logits[0, -1].double()
    return -float(torch.log_softmax(logits, -1)[token])


def naive(model: nn.Module, protocol: str, context: int, stride: int, bos: bool) -> list[float]:
    """Surprise of every token that the protocol scores, token by token, from the protocol's words alone."""
    documents = [ids_of(text) for text in TEXTS]
    if protocol == "document":
        streams = [[BOS if bos else EOS, *ids] for ids in documents]
    else:
        streams = [[token for ids in documents for token in (*ids, EOS)]]
    values = []
    for ids in streams:
        if protocol == "windows":
            ids = [BOS, *ids] if bos else ids
            for begin in range(0, len(ids) - context + 1, context):
                values += [surprise(model, ids[begin:p], ids[p]) for p in range(begin + 1, begin + context)]
            continue
        prefix = [BOS] if bos else []
        ids = ids[1:] if bos and protocol == "document" else ids
        room = context - len(prefix)
        for p in range(0 if bos else 1, len(ids)):
            begin = 0 if p < room else stride * math.ceil((p - room + 1) / stride)
            values.append(surprise(model, prefix + ids[begin:p], ids[p]))
    return values


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("protocol", ["sliding", "windows", "document"])
def test_against_a_naive_loop(protocol: Any, bos: bool) -> None:
    model = tiny_model("llama")
    expected = naive(model, protocol, 16, 6, bos)
    stride = None if protocol == "windows" else 6
    result = perplexity(
        model, WITH_BOS if bos else PLAIN, TEXTS, protocol=protocol, context=16, stride=stride, progress=False
    )
    assert result.tokens == len(expected)
    assert result.mean_nll == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-4)
    assert (result.protocol, result.context, result.stride) == (protocol, 16, stride or 16)
    assert (result.dtype, result.device, result.dense) == ("float32", "cpu", None)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    model = tiny_model(family)
    windows = make_windows(TEXTS, PLAIN, protocol="document", context=32).windows
    padded = make_batch(windows)
    assert padded.attention_mask is not None
    together = token_nll(model, padded)
    for row, window in enumerate(windows):
        alone = make_batch([window])
        assert alone.attention_mask is None
        torch.testing.assert_close(together[row, : len(window) - 1], token_nll(model, alone)[0], rtol=1e-4, atol=1e-5)
        assert together[row, len(window) - 1 :].eq(0).all()


@pytest.mark.parametrize("protocol", ["sliding", "document"])
def test_batch_size_changes_nothing(protocol: Any) -> None:
    model = tiny_model("llama")
    small, large = (
        perplexity(model, PLAIN, TEXTS, protocol=protocol, context=16, batch_size=n, progress=False) for n in (1, 8)
    )
    assert (small.document_tokens == large.document_tokens).all()
    np.testing.assert_allclose(small.document_nll, large.document_nll, rtol=1e-5)


def test_bits_per_byte_and_json() -> None:
    result = perplexity(tiny_model("gpt2"), PLAIN, TEXTS, protocol="document", context=64, progress=False)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert result.document_bytes.sum() == n_bytes
    assert result.bits_per_byte == pytest.approx(result.document_nll.sum() / math.log(2) / n_bytes)
    values = json.loads(result.to_json())
    assert values["perplexity"] == result.perplexity
    assert [d["tokens"] for d in values["documents"]] == [3, 25, 11, 40, 1]
    assert values["documents"][1]["name"] == "text[1]"


@torch.no_grad()
def test_logits_of_one_window_are_not_copied() -> None:
    model = tiny_model("llama")
    windows = make_windows(TEXTS, PLAIN, context=16, protocol="windows").windows
    window = next(window for window in windows if len(window) == 16)
    held: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: held.append(output.logits))
    try:
        alone = scored_logits(model, make_batch([window]))
    finally:
        handle.remove()
    batch = make_batch([window])
    assert alone.untyped_storage().data_ptr() == held[0].untyped_storage().data_ptr()
    assert torch.equal(alone, held[0][:, -batch.scored.sum() - 1 : -1][0])
    torch.testing.assert_close(scored_logits(model, make_batch([window, window])), torch.cat((alone, alone)))


def test_reduced_precision_is_summed_in_full() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).bfloat16() * 8
    targets = torch.arange(50)
    expected = -torch.log_softmax(logits.double(), -1)[torch.arange(50), targets]
    found = nll_of_logits(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_slices_are_bounded_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets = torch.randn(37, 11), torch.randint(11, (37,))
    whole, whole_kl = nll_of_logits(logits, targets), kl_to(logits, logits.flip(0))
    monkeypatch.setattr("sedac_hf.evaluation.scoring._SLICE_ELEMENTS", 50)  # four rows at a time
    raised: list[int] = []
    real = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: raised.append(x.shape[0]) or real(x))
    torch.testing.assert_close(nll_of_logits(logits, targets), whole)
    torch.testing.assert_close(kl_to(logits, logits.flip(0)), whole_kl)
    assert max(raised) == 4


def test_kl() -> None:
    p, q = torch.randn(2, 20, 60, generator=torch.Generator().manual_seed(1)).double()
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    expected = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_to(p, q), expected)
    assert kl_to(p, p).eq(0).all()
    close = kl_to(p.float(), (p + 1e-6 * q).float())
    assert ((close >= 0) & (close < 1e-9)).all()
    p[:, 3] = q[:, 3] = -math.inf  # a vocabulary entry that is masked in both
    assert torch.isfinite(kl_to(p, q)).all()
    with pytest.raises(EvaluationError, match="one shape"):
        kl_to(p, q[:, 1:])


def test_token_nll_is_zero_where_nothing_is_scored() -> None:
    model = tiny_model("llama")
    windows = make_windows(TEXTS, PLAIN, context=16, stride=6, protocol="document").windows
    batch = make_batch(windows)
    nll = token_nll(model, batch)
    assert nll.shape == (len(windows), 15)
    assert nll.dtype == torch.float32
    assert nll[~batch.scored].eq(0).all()
    assert nll[batch.scored].gt(0).all()
    assert int(batch.scored.sum()) == sum(w.n_scored for w in windows)
    assert len(batch.targets) == len(batch.documents) == len(batch.token_bytes) == int(batch.scored.sum())
    assert scored_logits(model, batch).shape == (len(batch.targets), model.config.vocab_size)


def test_on_batch_sees_every_scored_token() -> None:
    model, seen = tiny_model("llama"), []
    windows = make_windows(TEXTS, PLAIN, context=16)
    scores = score(model, windows, batch_size=3, progress=False, on_batch=lambda b, nll: seen.append((b, nll)))
    assert max(len(batch.windows) for batch, _ in seen) == 3
    assert all(batch.attention_mask is None for batch, _ in seen)
    assert sum(float(nll.double().sum()) for _, nll in seen) == pytest.approx(scores.nll.sum())
    assert sum(len(batch.targets) for batch, _ in seen) == windows.n_tokens == scores.tokens.sum()


def test_broken_logits_name_the_window() -> None:
    class Broken(nn.Module):
        """Gives NaN for one input token."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model("llama")
            self.config, self.dtype, self.device = self.inner.config, torch.float32, torch.device("cpu")

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            out = self.inner(input_ids, **kwargs)
            out.logits[input_ids == EOS] = math.nan
            return out

    with pytest.raises(EvaluationError, match=r"window 2 \(document 1\) at position 7; 1 tokens"):
        perplexity(Broken(), PLAIN, [words(40), words(10)], context=18, stride=17, progress=False)
    broken = tiny_model("gpt2")
    broken.transformer.ln_f.weight.data.fill_(math.inf)
    with pytest.raises(EvaluationError, match="the logits must be finite"):
        perplexity(broken, PLAIN, TEXTS, context=16, progress=False)


def test_evaluation_mode_inside_and_the_old_mode_after() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5)
    expected = perplexity(model, PLAIN, TEXTS, context=16, progress=False).mean_nll
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    assert perplexity(model, PLAIN, TEXTS, context=16, progress=False).mean_nll == expected
    assert [module.training for module in model.modules()] == before


def test_errors() -> None:
    model = tiny_model("llama", vocab_size=20)
    with pytest.raises(EvaluationError, match="tokenizer must fit the model, got the token id"):
        perplexity(model, PLAIN, TEXTS, context=16, progress=False)
    model = tiny_model("gpt2")
    with pytest.raises(EvaluationError, match="context must be at most"):
        perplexity(model, PLAIN, TEXTS, context=100_000)
    with pytest.raises(EvaluationError, match="compare_dense needs"):
        perplexity(model, PLAIN, TEXTS, context=16, compare_dense=True)
    with pytest.raises(EvaluationError, match="batch_size must be"):
        perplexity(model, PLAIN, TEXTS, context=16, batch_size=0)


def test_context_is_the_models_by_default() -> None:
    result = perplexity(tiny_model("opt"), PLAIN, TEXTS, progress=False)
    assert (result.context, result.stride) == (256, 128)


def test_embedded_decoder_is_as_good_as_its_card_says(demo: Any) -> None:
    model, tokenizer = demo
    windows = make_windows(stdlib_documents("heldout"), tokenizer, context=256, protocol="windows")
    # the card's figure is that of the first 400 windows in sorted order; every fourth of those is enough here
    sample = replace(windows, windows=windows.windows[:400:4])
    result = perplexity(model, tokenizer, sample, progress=False)
    assert result.tokens > 25_000
    # another Python's library differs a little, an untrained decoder gives 8.3
    assert result.mean_nll == pytest.approx(2.225, abs=0.25)
