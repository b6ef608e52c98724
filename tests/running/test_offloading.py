"""Weights that accelerate keeps elsewhere: before a decoder is wrapped, and under one that is wrapped already."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from transformers import PreTrainedModel

from sedac_hf import ConfigError, SedacForCausalLM, UnsupportedModelError
from tests.policies import random_policy
from tests.test_invariants import CUTS, TOLERANCE, wrapped
from tests.tiny_models import LAYERS, tiny_model, token_ids

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "consistent": True}
CPU = torch.device("cpu")


def to_the_cpu(model: PreTrainedModel, folder: str) -> None:
    cpu_offload(model, CPU)


def to_the_disk(model: PreTrainedModel, folder: str) -> None:
    disk_offload(model, folder, CPU)


def by_a_map(model: PreTrainedModel, folder: str) -> None:
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(LAYERS)}
    dispatch_model(model, places, main_device="cpu", offload_dir=folder)


@pytest.fixture(params=[to_the_cpu, to_the_disk, by_a_map], ids=lambda offload: offload.__name__)
def offload(request):
    return request.param


@torch.no_grad()
def test_a_base_that_is_offloaded_is_wrapped(offload, tmp_path):
    base, ids = tiny_model("llama"), token_ids(2, 7)
    reference = base(ids).logits
    offload(base, str(tmp_path))
    model = SedacForCausalLM.from_base(base)
    with pytest.raises(UnsupportedModelError, match="must be in memory"):
        model.install(random_policy(model.runtime, "truncate"))
    assert torch.equal(base(ids).logits, reference)
    model.install(random_policy(model.runtime, "select"))
    got = model.generate(ids, **GREEDY)
    assert model.stats().checkpoints[-1].exits > 0
    assert model.stats().saved_bytes_share <= 0
    model.runtime.engine = "reference"
    assert torch.equal(model.generate(ids, **GREEDY), got)
    with model.disable():
        assert torch.equal(model(ids).logits, reference)
    assert torch.equal(model.unload()(ids).logits, reference)


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
def test_a_base_that_is_offloaded_under_a_policy_is_cut_as_before(cut, offload, tmp_path):
    model, ids = wrapped("llama", cut), token_ids(2, 7)
    expected, tokens = model(ids).logits, model.generate(ids, **GREEDY)
    offload(model.model, str(tmp_path))
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    assert torch.equal(model.generate(ids, **GREEDY), tokens)
    if cut == "truncate":  # the order can't be taken back where the weights are not here
        with pytest.raises(UnsupportedModelError, match="must be in memory"):
            model.unload()
        torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
        remove_hook_from_submodules(model.model)
        model.unload()
    else:
        model.unload()
        assert torch.equal(model.model(ids).logits, tiny_model("llama")(ids).logits)
        remove_hook_from_submodules(model.model)
    assert torch.equal(model.model(ids).logits, tiny_model("llama")(ids).logits)


@torch.no_grad()
def test_hooks_of_accelerate_that_go_leave_ours_and_ours_that_go_leave_nothing():
    base, ids = tiny_model("llama"), token_ids(2, 7)
    cpu_offload(base, CPU)
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, "select"))
    expected = model(ids).logits
    remove_hook_from_submodules(base)
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    model.unload()
    assert torch.equal(base(ids).logits, tiny_model("llama")(ids).logits)
    assert all("_old_forward" not in module.__dict__ for module in base.modules())


def test_probes_that_are_offloaded_are_named():
    model, ids = wrapped("llama", "select"), token_ids(2, 7)
    cpu_offload(model, CPU)
    with pytest.raises(ConfigError, match=r"offload `model.model`"):
        model(ids)
