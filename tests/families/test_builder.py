"""The builder: a decoder of every model type, small, whole and with FFNs that count."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from tests.families import MODEL_TYPES, NOT_BUILT, build, exceptions, tiny_config, vocabulary
from tests.families.builder import is_ffn_weight
from tests.families.shrinking import HIDDEN, KEY_VALUE_HEADS, VOCAB

WITHOUT_FFN = {"falcon_mamba", "mamba", "mamba2"}
BUILT = [name for name in MODEL_TYPES if name not in NOT_BUILT]


@pytest.mark.parametrize("model_type", BUILT)
@torch.no_grad()
def test_a_decoder_of_every_type(model_type: str) -> None:
    state = torch.random.get_rng_state()
    model, inputs = build(model_type)
    assert torch.equal(torch.random.get_rng_state(), state), "building must not touch the global generator"
    assert not model.training
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 6e6
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert logits.shape == (*inputs["input_ids"].shape, vocabulary(model.config))
    ffns = [parameter for name, parameter in model.named_parameters() if is_ffn_weight(name, parameter)]
    assert (model_type in WITHOUT_FFN) == (not ffns)
    for parameter in ffns:
        parameter.zero_()
    if ffns:
        effect = (model(**inputs).logits - logits).std() / logits.std()
        assert effect > 0.05, f"without FFN weights the logits change by {effect:.3f} of their spread"


def test_building_twice_gives_the_same() -> None:
    (first, inputs), (second, again) = build("llama"), build("llama")
    assert torch.equal(first(**inputs).logits, second(**again).logits)
    assert not torch.equal(first(**inputs).logits, build("llama", seed=1)[0](**inputs).logits)


@pytest.mark.skipif("dbrx" in NOT_BUILT, reason=NOT_BUILT.get("dbrx", ""))
def test_rules_and_exceptions_meet_in_inner_configurations() -> None:
    config = tiny_config("dbrx", vocab_size=96)
    assert config.vocab_size == 96
    assert config.d_model == HIDDEN
    assert config.attn_config.kv_n_heads == KEY_VALUE_HEADS
    assert tiny_config("gemma3").text_config.vocab_size == VOCAB


def test_what_this_version_does_not_know_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"model_of_tomorrow": {"num_hidden_layers": 3}, "llama": {"field_of_tomorrow": 3}}
    monkeypatch.setattr(exceptions, "EXCEPTIONS", known)
    monkeypatch.setattr("tests.families.shrinking.EXCEPTIONS", known)
    model, inputs = build("llama")
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(KeyError):
        tiny_config("model_of_tomorrow")


@pytest.mark.parametrize("model_type", sorted(set(NOT_BUILT) & set(CONFIG_MAPPING)))
def test_a_type_that_is_not_built_says_why(model_type: str) -> None:
    with pytest.raises(NotImplementedError, match=NOT_BUILT[model_type][:20]):
        build(model_type)
