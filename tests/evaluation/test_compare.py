from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation import compare, make_windows, perplexity
from sedac_hf.evaluation.bounds import paired_interval, upper_bound
from sedac_hf.evaluation.compare import merge_stats
from tests.evaluation.tokenizers_for_tests import word_tokenizer, words
from tests.policies import random_policy
from tests.tiny_models import tiny_model

PLAIN = word_tokenizer(adds_bos=False)
TEXTS = [words(12 + 5 * (start % 4), start) for start in range(24)]


def cut_model() -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "truncate"))
    return model


def test_dense_and_cut_of_one_run() -> None:
    model = cut_model()
    result = compare(model, PLAIN, TEXTS, context=32, progress=False)
    plain = perplexity(tiny_model("llama"), PLAIN, TEXTS, context=32, progress=False)
    assert result.dense.mean_nll == pytest.approx(plain.mean_nll, rel=1e-5)
    assert abs(result.relative_increase) > 1e-4  # random cuts do something
    assert result.relative_increase == pytest.approx(result.cut.perplexity / result.dense.perplexity - 1)
    tokens = result.dense.document_tokens
    low, high = paired_interval(result.delta, tokens)
    assert result.interval == (math.expm1(low), math.expm1(high))
    assert result.upper == math.expm1(upper_bound(result.delta, tokens))
    assert result.unit == "documents"
    assert result.stats is not None
    windows = make_windows(TEXTS, PLAIN, context=32)
    assert result.stats["tokens"] == sum(len(window) for window in windows)  # of the cut run alone
    assert 0 < result.stats["needed_bytes_share"] < 1
    values = json.loads(result.to_json())
    assert values["relative_increase"] == result.relative_increase
    assert len(values["dense"]["documents"]) == 24


def test_perplexity_of_a_cut_model_brings_the_dense_one() -> None:
    model = cut_model()
    both = perplexity(model, PLAIN, TEXTS, context=32, progress=False)
    result = compare(model, PLAIN, TEXTS, context=32, progress=False)
    assert both.dense is not None
    assert (both.perplexity, both.dense.perplexity) == (result.cut.perplexity, result.dense.perplexity)
    alone = perplexity(model, PLAIN, TEXTS, context=32, progress=False, compare_dense=False)
    assert alone.dense is None
    assert alone.perplexity == both.perplexity


def test_any_two_states_of_a_plain_model() -> None:
    model = tiny_model("gpt2")

    @contextmanager
    def louder() -> Iterator[None]:
        with torch.no_grad():
            model.transformer.ln_f.weight.mul_(2)
            yield
            model.transformer.ln_f.weight.mul_(0.5)

    result = compare(model, PLAIN, TEXTS, context=32, dense=nullcontext, cut=louder, progress=False)
    assert result.dense.mean_nll == perplexity(model, PLAIN, TEXTS, context=32, progress=False).mean_nll
    assert result.cut.mean_nll != result.dense.mean_nll
    assert result.stats is None
    with pytest.raises(EvaluationError, match="compare needs a model that can run at full width"):
        compare(model, PLAIN, TEXTS, context=32)


def test_few_documents_are_cut_into_blocks() -> None:
    model = cut_model()
    text = "\n".join(words(20, i) for i in range(200))
    one = compare(model, PLAIN, [text], context=32, progress=False)
    assert one.unit == "blocks"
    assert len(one.delta) >= 15
    assert one.interval is not None
    whole = perplexity(model, PLAIN, [text], context=32, progress=False)
    assert (one.cut.tokens, one.cut.mean_nll) == (whole.tokens, pytest.approx(whole.mean_nll, rel=1e-9))


def test_too_little_text_gives_no_interval() -> None:
    result = compare(cut_model(), PLAIN, [words(20)], context=32, progress=False)
    assert (result.interval, result.upper) == (None, None)
    assert math.isfinite(result.relative_increase)
    assert json.loads(result.to_json())["interval"] is None


def test_stats_of_processes_are_merged() -> None:
    part: dict[str, Any] = {
        "tokens": 30, "needed_bytes_share": 0.5, "engines": {"mask": 2}, "strip_costs": {"a": "stated"},
        "checkpoints": [{"layer_idx": 3, "tokens": 30, "exits": 10, "mean_ratio": 0.2}],
    }  # fmt: skip
    other: dict[str, Any] = {
        "tokens": 10, "needed_bytes_share": 0.9, "engines": {"mask": 1, "strips": 1},
        "strip_costs": {"a": "measured", "b": "stated"},
        "checkpoints": [{"layer_idx": 3, "tokens": 10, "exits": 0, "mean_ratio": 0.6}],
    }  # fmt: skip
    merged = merge_stats([part, other])
    assert merged["needed_bytes_share"] == pytest.approx(0.6)
    assert (merged["tokens"], merged["engines"]) == (40, {"mask": 3, "strips": 1})
    assert merged["strip_costs"] == {"a": "measured and stated", "b": "stated"}
    assert merged["checkpoints"] == [
        {"layer_idx": 3, "tokens": 40, "exits": 10, "mean_ratio": pytest.approx(0.3)}
    ]  # fmt: skip
    assert np.isclose(merged["needed_bytes_share"] * 40, 0.5 * 30 + 0.9 * 10)
