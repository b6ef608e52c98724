"""Weights laid out by units: the same model in another order of memory, and back again bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sedac_hf import SedacForCausalLM
from sedac_hf.ffn.layout import lay_out_as_usual, lay_out_by_units
from sedac_hf.ffn.linears import rows
from sedac_hf.ffn.sites import find_sites
from sedac_hf.ops.compiled import available
from tests.policies import random_policy
from tests.tiny_models import FAMILIES, tiny_model, token_ids

needs_kernels = pytest.mark.skipif(not available(), reason="the compiled module is not installed")


def laid_out(model: nn.Module) -> tuple[nn.Module, ...]:
    return sum((lay_out_by_units(site) for site in find_sites(model).sites), ())


def placement(model: nn.Module) -> dict[str, tuple]:
    return {name: (p.shape, p.stride(), p.dtype, p.untyped_storage().nbytes()) for name, p in model.named_parameters()}


def selecting(family: str = "llama", **kwargs) -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model(family, **kwargs))
    model.install(random_policy(model.runtime, "select"))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "gptj"])
def test_units_become_runs_of_memory_and_values_stay(family, dtype):
    model, fresh = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype)
    changed = laid_out(model)
    assert changed
    for site in find_sites(model).sites:
        assert rows(site.down).stride(0) == 1, "a column of down is one run"
        assert all(rows(linear).stride(1) == 1 for linear in site.linears[:-1]), "a row of gate and up is one run"
    state, expected = model.state_dict(), fresh.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    sizes = {name: values[-1] for name, values in placement(model).items()}
    assert sizes == {name: values[-1] for name, values in placement(fresh).items()}, "no second copy is kept"
    lay_out_as_usual(changed)
    assert placement(model) == placement(fresh)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_only_devices_whose_kernels_read_single_units_are_laid_out():
    model = tiny_model("llama")
    before = placement(model)
    assert not any(lay_out_by_units(site, ["cuda"]) for site in find_sites(model).sites)
    assert placement(model) == before
    assert all(lay_out_by_units(site, ["cuda", "cpu"]) for site in find_sites(model).sites)


def test_laying_out_twice_changes_nothing_more():
    model = tiny_model("llama")
    changed = laid_out(model)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert laid_out(model) == ()
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert len(changed) == len(find_sites(model).sites)


def test_a_weight_that_two_ffns_share_is_laid_out_once():
    model = tiny_model("llama")
    first, second = (layer.mlp for layer in model.model.layers[:2])
    second.down_proj.weight = first.down_proj.weight
    changed = laid_out(model)
    assert first.down_proj.weight is second.down_proj.weight
    assert first.down_proj.weight.stride(0) == 1
    lay_out_as_usual(changed)
    assert all(p.is_contiguous() for p in model.parameters())


def test_weights_that_cannot_be_read_are_left():
    model = tiny_model("llama").to("meta")
    assert laid_out(model) == ()
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    changed = laid_out(model)
    assert model.model.layers[0].mlp.down_proj not in changed
    assert model.model.layers[1].mlp.down_proj in changed


def test_replaced_weights_are_given_back_as_they_came():
    """A weight that was exchanged while laid out by units must not be turned round."""
    model = tiny_model("llama")
    changed = laid_out(model)
    for layer in model.model.layers[:2]:
        layer.mlp.down_proj.weight = nn.Parameter(torch.randn(64, 176))
    lay_out_as_usual(changed)
    assert all(p.is_contiguous() for p in model.parameters())


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_a_policy_that_selects_lays_out_and_unload_gives_back(family):
    fresh = tiny_model(family)
    model = selecting(family)
    sites = model.runtime.sites
    assert all(rows(site.down).stride(0) == 1 for site in sites)
    with model.disable():
        assert placement(model.model) == placement(fresh)
    assert all(rows(site.down).stride(0) == 1 for site in sites), "laid out again afterwards"
    expected = fresh.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items())
    assert placement(model.unload()) == placement(fresh)
    model = SedacForCausalLM.from_base(fresh)
    model.install(random_policy(model.runtime, "truncate"))
    assert all(p.is_contiguous() for p in fresh.parameters()), "a cut by width reads rows"


@needs_kernels
def test_saved_files_hold_the_usual_layout(tmp_path):
    """Of the wrapper, and of the base saved while a policy is installed."""
    model, fresh = selecting(), tiny_model("llama")
    fresh.save_pretrained(tmp_path / "fresh")
    model.model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "wrapped")
    wanted = load_file(tmp_path / "fresh" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(base[name], wanted[name]) for name in wanted)
    loaded = SedacForCausalLM.from_pretrained(tmp_path / "wrapped")
    ids = token_ids(1, 3)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_base_with_the_layout(duplicate):
    model = tiny_model("llama")
    laid_out(model)
    other = duplicate(model)
    ids = token_ids(1, 3)
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}


@needs_kernels
@torch.no_grad()
def test_a_copy_of_a_wrapper_that_has_decoded_stands_alone():
    model = selecting()
    ids = token_ids(1, 3)
    expected = model(ids).logits  # its kernels hold addresses now
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(other(ids).logits, expected)
    assert placement(other.unload()) == placement(tiny_model("llama"))
