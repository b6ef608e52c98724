"""FFNs are found by structure, and their formula is believed only when the numbers say so."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.linears import is_plain, linear_shape
from sedac_hf.ffn.sites import find_sites
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, HIDDEN, INTERMEDIATE, LAYERS, tiny_model

KINDS = {
    **dict.fromkeys(("llama", "qwen3", "gemma3_text", "mistral"), "gated"),
    **dict.fromkeys(("phi3", "glm4"), "fused"),
    **dict.fromkeys(("gpt2", "gpt_neox", "opt", "bloom", "falcon", "starcoder2", "gptj"), "plain"),
}


@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES)
def test_families(family):
    model = tiny_model(family)
    found = find_sites(model)
    assert found.hidden_size == HIDDEN
    assert len(found.decoder_layers) == len(found.sites) == LAYERS
    for layer_idx, site in enumerate(found.sites):
        assert site.layer_idx == layer_idx
        assert site.kind == KINDS[family]
        assert model.get_submodule(site.name) is site.owner
        assert model.get_submodule(found.layer_names[layer_idx]) is found.decoder_layers[layer_idx]
        assert any(module is site.owner for module in found.decoder_layers[layer_idx].modules())
        assert site.intermediate_size == (4 * HIDDEN if family == "bloom" else INTERMEDIATE)
        assert site.plain_forward == (family not in ("opt", "bloom"))
        assert site.activation is not None


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "opt"])
def test_weights_are_live_views_that_give_the_forward(family):
    site = find_sites(tiny_model(family)).sites[1]
    weights = site.weights()
    x = torch.randn(5, HIDDEN)
    y = functional.linear(weights.hidden(x), weights.down, weights.down_bias)
    torch.testing.assert_close(y, site.owner(x))
    with torch.no_grad():
        site.up.weight.zero_()
    assert not site.weights().up.any()
    assert not weights.up.any()


def test_the_training_mode_and_the_random_state_are_left_alone():
    model = tiny_model("gpt2").train()
    state = torch.random.get_rng_state()
    assert find_sites(model).sites[0].plain_forward  # its dropout was off while it was looked at
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sizes_come_from_the_weights():
    model = tiny_model("llama")
    model.config.intermediate_size = 999
    mlp = model.model.layers[2].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(64, 40), nn.Linear(64, 40), nn.Linear(40, 64)
    assert [site.intermediate_size for site in find_sites(model).sites] == [176, 176, 40, 176]


def test_a_shared_ffn_is_one_site():
    model = tiny_model("llama")
    model.model.layers[3].mlp = model.model.layers[1].mlp
    assert [site.layer_idx for site in find_sites(model).sites] == [0, 1, 2]
    tied, first = model.model.layers[2].mlp, model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        tied.get_submodule(name).weight = first.get_submodule(name).weight
    sites = find_sites(model).sites  # modules of their own with tied weights: each is cut by itself
    assert [site.layer_idx for site in sites] == [0, 1, 2]
    assert [site.origin for site in sites] == [None, None, sites[0]]
    tied.down_proj.weight = nn.Parameter(first.down_proj.weight.clone())
    first.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    assert [site.layer_idx for site in find_sites(model).sites] == [0, 2]  # down alone is tied: no order would do


def test_low_precision_weights_are_verified_too():
    assert all(site.plain_forward for site in find_sites(tiny_model("phi3", dtype=torch.bfloat16)).sites)


class Block(nn.Module):
    """A foreign FFN with names of its own."""

    def __init__(self, act=None, swap=False, extra=None, multiplier=1.0):
        super().__init__()
        self.alpha, self.beta, self.omega = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)
        self.swap, self.multiplier = swap, multiplier
        if extra is not None:
            self.extra = extra
        if act is not None:
            self.act = act

    def forward(self, x):
        a, b = (self.beta(x), self.alpha(x)) if self.swap else (self.alpha(x), self.beta(x))
        return self.omega(functional.silu(a) * b) * self.multiplier


class Foreign(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stack = nn.ModuleList(blocks)


@pytest.mark.parametrize("swap", [False, True])
def test_gate_and_up_are_told_apart_by_numbers(swap):
    """Neither the names nor an activation attribute says which is which."""
    block = Block(swap=swap)
    (site,) = find_sites(Foreign(block)).sites
    assert site.plain_forward
    assert site.gate is (block.beta if swap else block.alpha)
    assert site.activation is functional.silu


@pytest.mark.parametrize("swap", [False, True])
def test_halves_of_a_fused_linear_are_told_apart_by_numbers(swap):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.out = nn.Linear(16, 80), nn.Linear(40, 16)

        def forward(self, x):
            first, second = self.both(x).chunk(2, dim=-1)
            return self.out(first * functional.silu(second) if swap else functional.silu(first) * second)

    block = Fused()
    (site,) = find_sites(Foreign(block)).sites
    assert site.plain_forward
    torch.testing.assert_close(site.weights().gate, block.both.weight[40:] if swap else block.both.weight[:40])


def test_a_formula_that_differs_is_not_believed():
    (site,) = find_sites(Foreign(Block(multiplier=0.5))).sites
    assert not site.plain_forward


def test_matrices_over_the_units_make_it_no_ffn():

    def layer(extra):
        return nn.ModuleDict({"temporal": nn.LayerNorm(16), "channel": Block(extra=extra)})

    for extra in (nn.Conv1d(40, 40, 3), nn.Linear(40, 40)):
        with pytest.raises(UnsupportedModelError):
            find_sites(Foreign(layer(extra)))
    (site,) = find_sites(Foreign(layer(nn.LayerNorm(40)))).sites  # a norm over the units: an FFN, but not a plain one
    assert [parameter.path for parameter in site.beside] == ["extra.weight", "extra.bias"]
    assert not site.plain_forward
    assert find_sites(Foreign(layer(nn.PReLU(1)))).sites  # one number is an activation's affair


def test_a_low_rank_branch_is_no_ffn():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16))
            self.inner = Block()

    (site,) = find_sites(Foreign(Layer())).sites
    assert site.name == "stack.0.inner"


@pytest.mark.parametrize("obstacle", ["meta", "hook", "offload", "parametrized", "float8"])
def test_weights_that_cannot_be_read_directly_are_left_to_the_linears(obstacle):
    model = tiny_model("llama")
    linear = model.model.layers[0].mlp.up_proj
    if obstacle == "meta":
        linear.weight = nn.Parameter(linear.weight.to("meta"))
    elif obstacle == "hook":
        linear.register_forward_hook(lambda *_: None)
    elif obstacle == "offload":
        accelerate = pytest.importorskip("accelerate")
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif obstacle == "parametrized":
        nn.utils.parametrizations.weight_norm(linear)
    else:
        linear.weight = nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    site = find_sites(model).sites[0]
    assert not site.plain_forward
    assert (site.hidden_size, site.intermediate_size) == (HIDDEN, INTERMEDIATE)
    assert site.activation is not None


def test_linears():
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(Conv1D(5, 3)) == (3, 5)
    assert linear_shape(nn.Embedding(3, 5)) is None
    assert linear_shape(nn.LayerNorm(5)) is None
    packed = nn.Linear(6, 4)  # as 4-bit layers keep their weights: the shape says nothing
    packed.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert linear_shape(packed) == (6, 4)
    assert not is_plain(packed)
    assert is_plain(nn.Linear(3, 5))

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Same(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    assert not is_plain(Doubled(3, 5))
    assert is_plain(Same(3, 5))


def test_models_without_an_ffn_are_refused_with_what_was_seen():
    config = CONFIG_MAPPING["mamba"](hidden_size=32, num_hidden_layers=2, vocab_size=50, state_size=4)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM.*2 layers \(MambaBlock with parts.*mixer.*up"):
        find_sites(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UnsupportedModelError, match="ModuleList"):
        find_sites(nn.Sequential(nn.Linear(3, 5)))


def test_a_deep_copy_of_a_site_belongs_to_the_copied_model():
    model = tiny_model("llama")
    site = find_sites(model).sites[0]
    twin, twin_site = copy.deepcopy((model, site))
    assert twin_site.owner is twin.model.layers[0].mlp
    assert twin_site.owner is not site.owner


@pytest.mark.parametrize("dims", [2, 3])
def test_owners_that_take_one_shape_only_are_still_read(dims):
    class Strict(Block):
        def forward(self, x):
            if x.dim() != dims:
                raise ValueError("not my shape")
            return super().forward(x)

    assert find_sites(Foreign(Strict())).sites[0].plain_forward


class Stack(nn.Module):
    """Decoder layers in a module of their own, of which a decoder may hold several."""

    def __init__(self, f=40, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(Layer(f) for _ in range(depth))


class Layer(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.mlp = Block()
        self.mlp.alpha, self.mlp.beta, self.mlp.omega = nn.Linear(16, f), nn.Linear(16, f), nn.Linear(f, 16)


@pytest.mark.parametrize(
    ("stacks", "found"),
    [
        ({"low": Stack(), "high": Stack()}, ["low.layers.0", "low.layers.1", "high.layers.0", "high.layers.1"]),
        ({"low": Stack(48), "high": Stack()}, ["low.layers.0", "low.layers.1"]),
        ({"text": Stack(), "image": Stack()}, ["text.layers.0", "text.layers.1"]),
    ],
    ids=["alike", "of other sizes", "another tower"],
)
def test_stacks_that_are_alike_are_one_decoder(stacks, found):
    model = nn.ModuleDict(stacks)
    assert list(find_sites(model).layer_names) == found
    assert [site.layer_idx for site in find_sites(model).sites] == list(range(len(found)))
