"""Ways of running a wrapped decoder that are tried nowhere else; `docs/running.md` lists them all."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import SedacError
from tests.policies import random_policy
from tests.test_invariants import CUTS, TOLERANCE, wrapped
from tests.tiny_models import tiny_model, token_ids

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


def test_everything_that_can_be_returned(model):
    wanted = ("scores", "logits", "hidden_states", "attentions")
    how = {"return_dict_in_generate": True, **{f"output_{name}": True for name in wanted}}
    out = model.generate(token_ids(2, 7), **how, **GREEDY)
    assert model.stats().needed_bytes_share < 1
    by_masking = masked(model, token_ids(2, 7), **how)
    assert torch.equal(out.sequences, by_masking.sequences)
    for name in wanted:
        assert len(out[name]) == GREEDY["max_new_tokens"]
        torch.testing.assert_close(out[name], by_masking[name], **TOLERANCE)


def test_a_decoding_loop_of_ones_own(model):
    def longest(model, input_ids, generation_config=None, **kwargs):
        with torch.no_grad():
            for _ in range(3):
                input_ids = torch.cat((input_ids, model(input_ids).logits[:, -1:].argmax(-1)), dim=1)
        return input_ids

    ids = token_ids(2, 7)
    got = model.generate(ids, custom_generate=longest, **GREEDY)
    assert got.shape == (2, 10)
    assert model.stats().checkpoints[-1].exits > 0
    assert torch.equal(got, masked(model, ids, custom_generate=longest))


def test_a_pickle_is_a_model_of_its_own(model):
    ids = token_ids(2, 7)
    expected = model.generate(ids, **GREEDY)
    for source in (model, copy.deepcopy(model)):
        again = pickle.loads(pickle.dumps(source))
        assert type(again) is type(model)
        assert torch.equal(again.generate(ids, **GREEDY), expected)
        again.unload()
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def ids_and_share(model: SedacForCausalLM, ids: torch.Tensor) -> tuple[list[list[int]], float]:
    model.reset_stats()
    return model.generate(ids, **GREEDY).tolist(), model.stats().needed_bytes_share


def test_a_spawned_process_gets_a_model_of_its_own():
    ids = token_ids(2, 7)
    models = [wrapped("llama", cut) for cut in CUTS]
    expected = [ids_and_share(model, ids) for model in models]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap(ids_and_share, [(model, ids) for model in models]) == expected
    assert all(share < 1 for _, share in expected)
    assert [ids_and_share(model, ids) for model in models] == expected


def test_threads_that_generate_share_one_model(model):
    prompts = [token_ids(1, 5 + i, seed=i) for i in range(3)]
    alone = [model.generate(ids, **GREEDY).tolist() for ids in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda ids: model.generate(ids, **GREEDY).tolist(), prompts * 8))
    assert together == alone * 8
    assert model.stats().needed_bytes_share < 1
    assert [masked(model, ids).tolist() for ids in prompts] == alone


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
def test_a_compiled_model(cut):
    torch._dynamo.reset()
    model, base = wrapped("llama", cut, num_hidden_layers=3), tiny_model("llama", num_hidden_layers=3)
    prompts = token_ids(2, 7), token_ids(2, 7, seed=3)
    expected = [model(ids).logits for ids in prompts]
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        model.reset_stats()
        for ids, logits in zip(prompts, expected, strict=True):
            torch.testing.assert_close(compiled(ids).logits, logits, **TOLERANCE)
        assert model.stats().needed_bytes_share < 1
        with model.disable():
            assert torch.equal(compiled(prompts[0]).logits, base(prompts[0]).logits)
    torch._dynamo.reset()


def test_device_map_auto_without_a_gpu(model, tmp_path):
    ids = token_ids(2, 7)
    model.save_pretrained(tmp_path)
    again = SedacForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert torch.equal(again.generate(ids, **GREEDY).cpu(), model.generate(ids, **GREEDY))
    assert again.stats().needed_bytes_share < 1


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
