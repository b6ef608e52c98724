"""Ways of running a wrapped decoder that are tried nowhere else; `docs/running.md` lists them all."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import SedacError
from tests.policies import random_policy
from tests.test_invariants import CUTS, wrapped
from tests.tiny_models import token_ids

ROOT = Path(__file__).parents[2]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "consistent": True}


@pytest.fixture(params=CUTS)
def model(request) -> SedacForCausalLM:
    return wrapped("llama", request.param)


def masked(model: SedacForCausalLM, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    model.runtime.engine = "reference"
    try:
        return model.generate(ids, **{**GREEDY, **kwargs})
    finally:
        model.runtime.engine = "auto"


@pytest.mark.parametrize("how", [{"cache_implementation": "static", "disable_compile": True}, {"use_cache": False}])
def test_caches(model, how):
    ids = token_ids(2, 7)
    assert torch.equal(model.generate(ids, **GREEDY, **how), masked(model, ids))
    assert model.stats().needed_bytes_share < 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="an offloaded cache needs a GPU to be offloaded from")
def test_an_offloaded_cache(model):
    ids = token_ids(2, 7)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **GREEDY), masked(model, ids))


def test_everything_that_can_be_returned(model):
    wanted = ("scores", "logits", "hidden_states", "attentions")
    out = model.generate(
        token_ids(2, 7), return_dict_in_generate=True, **{f"output_{name}": True for name in wanted}, **GREEDY
    )
    assert torch.equal(out.sequences, masked(model, token_ids(2, 7)))
    assert all(len(out[name]) == GREEDY["max_new_tokens"] for name in wanted)


def test_a_decoding_loop_of_ones_own(model):
    def longest(model, input_ids, generation_config=None, **kwargs):
        with torch.no_grad():
            for _ in range(3):
                input_ids = torch.cat((input_ids, model(input_ids).logits[:, -1:].argmax(-1)), dim=1)
        return input_ids

    ids = token_ids(2, 7)
    assert model.generate(ids, custom_generate=longest, **GREEDY).shape == (2, 10)
    assert model.stats().checkpoints[-1].exits > 0


def test_continuous_batching_runs_and_cuts(model):
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    rows = [row.tolist() for row in token_ids(2, 7)]
    outputs = model.generate_batch(rows, generation_config=settings)
    assert [len(output.generated_tokens) for output in outputs.values()] == [4, 4]
    assert model.stats().needed_bytes_share < 1


def test_a_pickle_is_a_model_of_its_own(model):
    ids = token_ids(2, 7)
    expected = model.generate(ids, **GREEDY)
    for source in (model, copy.deepcopy(model)):
        again = pickle.loads(pickle.dumps(source))
        assert type(again) is type(model)
        assert torch.equal(again.generate(ids, **GREEDY), expected)
        again.unload()
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_weights_on_disk(tmp_path):
    model = wrapped("llama", "select")
    ids = token_ids(2, 7)
    model.save_pretrained(tmp_path / "saved")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.runtime.decoder_layers))}
    options = {"device_map": places, "offload_folder": str(tmp_path / "offloaded")}
    again = SedacForCausalLM.from_pretrained(tmp_path / "saved", **options)
    got = again.generate(ids, **GREEDY)  # the exact gates decide: other units than a shadow's, the same as by masking
    assert torch.equal(got, masked(again, ids))
    assert again.stats().checkpoints[-1].exits > 0
    truncating = SedacForCausalLM.from_base(again.unload())
    with pytest.raises(SedacError, match="must be in memory"):
        truncating.install(random_policy(truncating.runtime, "truncate"))


def test_the_page_names_tests_that_exist():
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page)
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), f"{file}::{test}"
