"""Decoders whose hidden states are not one row per input token as they come: residual streams, other rows."""

from __future__ import annotations

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.runtime import execution
from sedac_hf.runtime.observation import token_rows
from tests.families import build, inputs_for
from tests.policies import random_policy
from tests.test_invariants import CUTS, assert_same, wrapped
from tests.tiny_models import token_ids

STREAMS = ["gemma3n_text", "deepseek_v4", "hy_v4", "qwen4_exp_text"]
OTHER_ROWS = ["musicgen", "cpmant", "prophetnet", "blt"]


def wrapped_type(model_type, cut="truncate"):
    base, _ = build(model_type)
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, cut))
    return model


def test_streams_of_every_layout_are_averaged():
    hidden = torch.randn(3, 5, 4, 8)  # [B, S, m, d]
    expected = hidden.mean(2).reshape(15, 8)
    for layout in (hidden, hidden.movedim(2, 0), hidden.flatten(2), hidden.flatten(0, 1).flatten(1)):
        rows = token_rows((layout, None), 8, (3, 5))
        torch.testing.assert_close(rows, expected)
    one = torch.randn(3, 5, 8)
    for layout in (one, one[None], one[:, :, None], one.flatten(0, 1)):
        assert torch.equal(token_rows(layout, 8, (3, 5)), one.reshape(15, 8))


def test_what_cannot_be_told_is_not_guessed():
    assert token_rows(torch.randn(4, 4, 4, 8), 8, (4, 4)) is None  # which axis holds the streams?
    assert token_rows(torch.randn(2, 3, 4, 8), 8, (3, 5)) is None
    assert token_rows(torch.randn(2, 3, 4, 8), 8, None) is None
    assert token_rows(torch.randn(2, 3, 12), 8, (2, 3)) is None
    assert token_rows("text", 8, (2, 3)) is None


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", [*STREAMS, *OTHER_ROWS])
def test_every_row_is_cut_by_its_own_hidden_state(model_type, cut):
    model = wrapped_type(model_type, cut)
    ids = inputs_for(model.model, rows=4, length=9, seed=3)["input_ids"]
    seen, decided = {}, {}
    keep = {"on_checkpoint": seen.__setitem__, "on_decision": lambda idx, ratio, levels: decided.update({idx: levels})}
    model.reset_stats()
    with model.runtime.observe(**keep):
        got = model(ids).logits
    stats = model.stats()
    assert (stats.fail_safe, stats.engines.get("mismatch", 0), stats.engines.get("whole", 0)) == (0, 0, 0)
    assert sorted(decided) == list(range(len(model.config.cascade)))
    for idx, levels in decided.items():
        assert seen[idx].shape == (len(levels), model.runtime.hidden_size)
    assert stats.tokens == len(decided[0])
    assert [item.tokens for item in stats.checkpoints] == [stats.tokens] * len(decided)
    assert len(set(decided[0].tolist())) > 2
    with model.full_width():
        assert (got - model(ids).logits).abs().mean() > 2e-3 * got.std()
    model.runtime.engine = "reference"
    assert_same(model, ids, model(ids).logits, got)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gemma3n_text", "deepseek_v4", "qwen4_exp_text"])
def test_cached_steps_give_what_one_forward_gives(model_type):
    model = wrapped_type(model_type)
    ids = inputs_for(model.model, length=6)["input_ids"]
    out = model.generate(
        ids, max_new_tokens=5, do_sample=False, consistent=True, prompt="cut", eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    again = model(out.sequences).logits[:, 5:-1]
    assert_same(model, out.sequences, torch.stack(out.logits, dim=1), again)
    assert model.stats().fail_safe == 0


@torch.no_grad()
def test_a_prompt_whose_rows_are_not_known_runs_whole():
    model = wrapped_type("cpmant")
    ids = inputs_for(model.model)["input_ids"]
    options = {"max_new_tokens": 1, "do_sample": False, "consistent": True, "prompt": "full"}
    out = model.generate(ids, **options)
    assert set(model.stats().engines) == {"whole"}
    assert model.runtime.captured.irregular
    with model.full_width():
        assert torch.equal(model.generate(ids, **options), out)


@torch.no_grad()
def test_the_usual_hidden_state_is_read_without_a_detour(monkeypatch):
    model, ids = wrapped("llama", "truncate"), token_ids()
    expected = model(ids).logits
    monkeypatch.setattr(execution, "token_rows", None)
    assert torch.equal(model(ids).logits, expected)
    assert model.runtime.captured.irregular is None
