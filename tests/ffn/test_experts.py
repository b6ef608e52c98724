"""Experts as sites: found by numbers, put in order, laid out, and cut as masking in float64 says."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, undo_order
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.finding_experts import as_experts
from sedac_hf.ffn.layout import lay_out_as_usual, lay_out_by_units
from sedac_hf.ffn.sites import FFNSite, find_sites
from sedac_hf.ops.contract import OperatingPoint, SiteCut
from sedac_hf.ops.experts import cut_experts, grouped
from sedac_hf.ops.level_plan import LevelPlan
from tests.families import MODEL_TYPES, NOT_BUILT, build

# With a forward of their own: one expert below the other; weighted before the call; with the router inside.
OWN_FORWARD = [name for name in ("dbrx", "llama4_text", "jetmoe") if name not in NOT_BUILT]
# Halves side by side; interleaved, transposed, biased and clamped; without a gate; transposed.
TYPES = ["mixtral", "gpt_oss", "nemotron_h", "aria_text", *OWN_FORWARD]
# All used by every token.
SHARED = [name for name in ("inkling_text",) if name in MODEL_TYPES]


def expert_site(model_type: str) -> tuple[PreTrainedModel, FFNSite, Experts]:
    model, _ = build(model_type)
    site = next((site for site in find_sites(model).sites if site.experts is not None), None)
    if site is None:
        pytest.skip(f"{model_type} has experts of another kind in this version of transformers")
    assert site.experts is not None
    return model, site, site.experts


def routing(experts: Experts, n: int = 9, k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, experts.hidden_size, generator=generator)
    index = torch.stack([torch.randperm(experts.count, generator=generator)[:k] for _ in range(n)])
    return x, index, torch.rand(n, k, generator=generator)


def recorded(cut_points: list[OperatingPoint], levels: list[int], importance=None, engine: str = "auto"):
    seen: list[dict] = []
    cut = SiteCut(
        points=tuple(cut_points),
        plan=LevelPlan.of(np.asarray(levels, np.uint8), len(cut_points) - 1),
        importance=importance,
        compensation=None,
        engine=engine,
        record=lambda **values: seen.append(values),
    )
    return cut, seen


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_whole_experts_are_what_the_module_gives(model_type):
    model, site, experts = expert_site(model_type)
    x, index, weights = routing(experts)
    given = experts.reading.arguments(experts.count, x, index, weights)
    torch.testing.assert_close(experts.output(given, None), site.owner(*given))
    assert (experts.activation is None) == (model_type == "gpt_oss"), "its gate is clamped, its up shifted"
    assert experts.top_k == 2
    assert model.config.num_hidden_layers >= 2


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_cut_equals_masking_in_float64(model_type, engine):
    _, site, experts = expert_site(model_type)
    x, index, weights = routing(experts)
    f = experts.intermediate_size
    points = [OperatingPoint(0), OperatingPoint(8), OperatingPoint(f // 2, 0.3), OperatingPoint(f)]
    levels = [0, 1, 2, 3, 1, 2, 3, 2, 1]

    def importance(x: Tensor, expert: int, h: Tensor) -> Tensor:
        return experts.hidden(expert, x).abs()

    cut, seen = recorded(points, levels, importance, engine)
    got = cut_experts(x, index, weights, experts, cut)
    wide = site.owner.double()
    expected, used_units = torch.zeros(x.shape, dtype=torch.float64), 0
    for token, level in enumerate(levels):
        for expert, weight in zip(index[token].tolist(), weights[token].double(), strict=True):
            h = experts.hidden(expert, x[token : token + 1].double())[0]
            used = torch.arange(f) < points[level].width
            if points[level].importance_min:
                used &= h.abs() * weight >= points[level].importance_min
            used_units += int(used.sum())
            expected[token] += weight * experts.project(expert, torch.where(used, h, 0.0)[None])[0]
    assert isinstance(wide, nn.Module)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert int(seen[0]["needed"]) == used_units
    assert seen[0]["whole_read"] == f * len(index.unique())


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_an_order_keeps_the_function_and_is_undone_bit_for_bit(model_type):
    _, site, experts = expert_site(model_type)
    before = {name: p.clone() for name, p in site.owner.named_parameters()}
    x, index, weights = routing(experts)
    given = experts.reading.arguments(experts.count, x, index, weights)
    expected = site.owner(*given)
    order = torch.stack([torch.randperm(experts.intermediate_size) for _ in range(experts.count)])
    hidden = [experts.hidden(e, x) for e in range(experts.count)]
    apply_order(site, order)
    assert not torch.equal(experts.down, before[experts.down_name])
    for e in range(experts.count):
        torch.testing.assert_close(experts.hidden(e, x), hidden[e][:, order[e]])
    torch.testing.assert_close(site.owner(*given), expected)
    undo_order(site, order)
    assert all(torch.equal(p, before[name]) for name, p in site.owner.named_parameters())


def test_an_order_must_be_one_permutation_for_each_expert():
    _, site, experts = expert_site("mixtral")
    with pytest.raises(ConfigError, match="must be a permutation"):
        apply_order(site, torch.arange(experts.intermediate_size))
    with pytest.raises(ConfigError, match="must be a permutation"):
        apply_order(site, torch.zeros(experts.count, experts.intermediate_size, dtype=torch.int64))


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_units_become_runs_of_memory_and_come_back(model_type):
    _, site, experts = expert_site(model_type)
    before = {name: (p.clone(), p.stride(), p.data_ptr()) for name, p in site.owner.named_parameters()}
    changed = lay_out_by_units(site)
    assert set(changed) == {holder for holder, _ in experts.spread_out}
    assert bool(changed) == (model_type != "dbrx"), "one below the other they lie so already"
    assert experts.down_of(0).stride(0) == 1, "a column of down is one run"
    for name in experts.first_names:
        assert experts.first_of(0, name, slice(None))[0].stride(1) == 1, "a row of gate and up is one run"
    assert all(torch.equal(p, before[name][0]) for name, p in site.owner.named_parameters())
    lay_out_as_usual(changed)
    for name, p in site.owner.named_parameters():
        value, stride, address = before[name]
        assert torch.equal(p, value)
        assert p.stride() == stride
        assert p.data_ptr() == address, "no second copy is made"


@pytest.mark.parametrize("model_type", [*TYPES, *SHARED])
@torch.no_grad()
def test_a_cut_call_is_the_modules_own_forward_with_the_units_zeroed(model_type):
    """Row by row: the levels reach the tokens that they are for, however the module is called."""
    model, _ = build(model_type, **({"n_shared_experts": 2} if model_type in SHARED else {}))
    experts = next((site.experts for site in reversed(find_sites(model).sites) if site.experts), None)
    if experts is None:
        pytest.skip(f"{model_type} has experts of another kind in this version of transformers")
    n, d, f = 9, experts.hidden_size, experts.intermediate_size
    for name, parameter in experts.module.named_parameters(recurse=False):
        if name == "bias":
            parameter.normal_()
    given = experts.reading.arguments(experts.count, *routing(experts, n))
    points = [OperatingPoint(0), OperatingPoint(8), OperatingPoint(f // 2), OperatingPoint(f)]
    levels = [0, 1, 2, 3, 1, 2, 3, 2, 1]
    bias = torch.randn(4, d)
    bias[3] = 0
    cut, seen = recorded(points, levels)
    cut = replace(cut, compensation=LevelCompensation(bias, {}, 3))
    got = experts.output(given, cut)
    assert got is not None
    assert got.shape == given[0].shape
    by_level = []
    for point in points:
        narrow = copy.deepcopy(experts)
        for expert in range(experts.count):
            narrow.down_of(expert)[:, point.width :] = 0
        by_level.append(narrow.module(*given).reshape(-1, n, d).sum(0))
    expected = torch.stack([by_level[level][token] + bias[level] for token, level in enumerate(levels)])
    torch.testing.assert_close(got.reshape(-1, n, d).sum(0), expected, rtol=1e-4, atol=1e-4)
    used = experts.count if model_type in SHARED else 2
    assert experts.top_k == used
    assert int(seen[0]["needed"]) == used * sum(points[level].width for level in levels)
    assert seen[0]["tokens"] == n


@torch.no_grad()
def test_what_hides_itself_at_first_is_no_site():
    """A router's scale of ones, or a bias that is left out, would pass for none by the present numbers."""
    model, _ = build("jetmoe")
    mixture = model.model.layers[0].mlp
    assert as_experts(mixture, None) is not None
    usual = type(mixture).forward

    class Scaled(type(mixture)):
        def forward(self, layer_input):
            return usual(self, layer_input) * self.scale

    mixture.scale = nn.Parameter(torch.ones(mixture.input_size))
    mixture.__class__ = Scaled
    assert as_experts(mixture, None) is None


def test_rows_of_no_expert_add_nothing():
    _, _, experts = expert_site("mixtral")
    x, index, weights = routing(experts)
    with torch.no_grad():
        alone = cut_experts(x, index[:, :1], weights[:, :1], experts, None)
        index[:, 1] = experts.count
        torch.testing.assert_close(cut_experts(x, index, weights, experts, None), alone)
        empty = cut_experts(x[:0], index[:0], weights[:0], experts, None)
    assert empty.shape == (0, experts.hidden_size)
    order, groups = grouped(index, experts.count)
    assert sum(len(group.pairs) for group in groups) == len(x)
    assert sorted(order.tolist()) == list(range(index.numel()))


def test_gradients_reach_weights_routing_and_input():
    _, _, experts = expert_site("mixtral")
    x, index, weights = routing(experts)
    x.requires_grad_()
    weights.requires_grad_()
    f = experts.intermediate_size
    cut, _ = recorded([OperatingPoint(0), OperatingPoint(f // 2), OperatingPoint(f)], [1, 2] * 4 + [0])
    cut_experts(x, index, weights, experts, cut).sum().backward()
    grads = [x.grad, weights.grad, *(p.grad for p in experts.parameters)]
    assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in grads)


@pytest.mark.parametrize("model_type", [*OWN_FORWARD, *SHARED])
def test_gradients_are_those_of_the_modules_own_forward(model_type):
    _, site, experts = expert_site(model_type)
    given = experts.reading.arguments(experts.count, *routing(experts))
    parameters = list(site.owner.parameters())
    expected = torch.autograd.grad(site.owner(*given).square().sum(), parameters)
    got = experts.output(given, None)
    assert got is not None
    for gradient, wanted in zip(torch.autograd.grad(got.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_a_module_that_only_counts_experts_is_no_site():
    for count in (0, 1, 3):
        module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
        module.num_experts = count
        assert as_experts(module, None) is None


def test_a_forward_that_is_not_what_the_flags_say_is_no_site():
    model, _ = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    usual = type(experts).forward

    class Doubled(type(experts)):
        def forward(self, *args, **kwargs):
            return 2 * usual(self, *args, **kwargs)

    assert as_experts(experts, None) is not None
    experts.__class__ = Doubled
    assert as_experts(experts, None) is None
    for layer in model.model.layers:
        layer.mlp.experts.__class__ = Doubled
    with pytest.raises(UnsupportedModelError, match="experts have a forward of their own"):
        find_sites(model)
