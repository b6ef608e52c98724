"""Saving and loading bases whose own configuration leads AutoModelForCausalLM nowhere."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

from sedac_hf import LoadError, SedacConfig, SedacForCausalLM
from sedac_hf.saving.bases import class_of
from tests.families import NOT_BUILT, build
from tests.policies import random_policy

PARTS = sorted({"emu3", "musicgen", "musicgen_melody"} - set(NOT_BUILT))  # decoders that are part of a composite model


@torch.no_grad()
@pytest.mark.parametrize("model_type", PARTS)
def test_part_of_a_composite_model_is_loaded_by_the_class_it_names(model_type, tmp_path):
    base, inputs = build(model_type)
    base.save_pretrained(tmp_path / "base")
    model = SedacForCausalLM.from_pretrained(tmp_path / "base")
    assert type(model.model) is type(base)
    model.install(random_policy(model.runtime, "truncate"))
    expected = model(**inputs).logits
    for adapter_only in (False, True):
        folder = tmp_path / f"saved-{adapter_only}"
        model.save_pretrained(folder, adapter_only=adapter_only)
        loaded = SedacForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", PARTS)
def test_part_of_a_composite_model_is_made_from_its_configuration(model_type):
    base, _ = build(model_type)
    base.config.architectures = [type(base).__name__]
    assert type(SedacForCausalLM(SedacConfig(base.config)).model) is type(base)


def test_what_names_no_causal_language_model_is_refused():
    for architectures in (None, ["T5ForConditionalGeneration"], ["NoSuchModel"]):
        with pytest.raises(LoadError, match="T5Config must be a configuration that AutoModelForCausalLM knows"):
            class_of(T5Config(architectures=architectures))
