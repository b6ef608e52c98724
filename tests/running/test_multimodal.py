"""Multimodal decoders that are given text alone: the FFNs of the text decoder are cut, those of encoders are not."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from sedac_hf import LoadError, SedacConfig, SedacForCausalLM
from sedac_hf.saving.bases import class_of
from tests.families.builder import enlarge_ffns
from tests.families.shrinking import tiny_config
from tests.policies import random_policy
from tests.running.test_decoding import GREEDY, checked
from tests.test_invariants import CUTS
from tests.tiny_models import LAYERS, token_ids

# AutoModelForCausalLM knows the first; AutoModelForMultimodalLM alone knows the others.
TYPES = ["gemma3", "llava", "qwen2_vl", "qwen3_vl", "internvl", "idefics3", "mistral3"]


def tiny_multimodal(model_type: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_config(tiny_config(model_type)).float().eval()
        with torch.no_grad():
            enlarge_ffns(model)
    return model


def wrapped(model_type: str, cut: str) -> SedacForCausalLM:
    base = tiny_multimodal(model_type)
    model = SedacForCausalLM.from_base(base, SedacConfig(base.config, extra_memory=0.5))
    model.install(random_policy(model.runtime, cut))
    return model


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_text_decoder_is_cut(model_type, cut):
    model = wrapped(model_type, cut)
    assert len(model.runtime.sites) == LAYERS
    assert all(site.name.startswith(("model.language_model.", "model.text_model.")) for site in model.runtime.sites)
    checked(model, token_ids(1, 7, seed=1), tiny_multimodal(model_type))


@pytest.mark.parametrize("adapter_only", [False, True])
@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl"])
def test_it_is_saved_and_loaded(model_type, adapter_only, tmp_path):
    model, ids = wrapped(model_type, "truncate"), token_ids(1, 7, seed=1)
    tiny_multimodal(model_type).save_pretrained(tmp_path / "base")
    model.model.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", adapter_only=adapter_only)
    for loader in (SedacForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path / "saved")
        assert type(again.model) is type(model.model)
        assert torch.equal(again.generate(ids, **GREEDY), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "qwen2_vl"])
def test_a_plain_checkpoint_is_loaded(model_type, tmp_path):
    base, ids = tiny_multimodal(model_type), token_ids(1, 7)
    base.save_pretrained(tmp_path)
    model = SedacForCausalLM.from_pretrained(tmp_path)
    assert type(model.model) is type(base)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)


def test_encoders_with_a_decoder_are_no_text_decoders():
    with pytest.raises(LoadError, match=r"Florence2Config must be .* a decoder's"):
        class_of(CONFIG_MAPPING["florence2"]())
