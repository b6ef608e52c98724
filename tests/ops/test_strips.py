"""Strips give the masked result in every mixture of levels, and read nothing beyond the widest token."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.ops import OperatingPoint, cut_ffn
from sedac_hf.ops import strips as engine
from sedac_hf.ops.strips import CostModel, Strip, plan_strips
from tests.cut_cases import (
    N_LEVELS,
    Recorder,
    TableCompensation,
    assert_as_good_as_plain,
    even_points,
    masked,
    random_weights,
    relative_error,
    site_cut,
)

# Strips cost nothing: every width that occurs becomes a cut. And: strips cost so much that there is one.
MANY = CostModel(1e30, 1.0, 0.0, 1e30)
ONE = CostModel(1.0, 1e30, 1e9, 1e30)

levels_lists = st.lists(st.integers(0, N_LEVELS), min_size=0, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    levels=levels_lists,
    f=st.integers(1, 90),
    d=st.integers(1, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    costs=st.sampled_from([MANY, ONE, engine.CPU_COSTS]),
    widths=st.lists(st.integers(0, 90), min_size=N_LEVELS + 1, max_size=N_LEVELS + 1),
)
def test_any_mixture_equals_masking(levels, f, d, gated, bias, dtype, costs, widths):
    weights = random_weights(d, f, gated=gated, bias=bias, dtype=dtype, seed=f)
    x = torch.randn(len(levels), d, generator=torch.Generator().manual_seed(1)).to(dtype)
    points = tuple(OperatingPoint(min(width, f)) for width in sorted(widths))
    cut = site_cut(levels, points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "CPU_COSTS", costs)
        y = cut_ffn(x, weights, cut)
    assert_as_good_as_plain(y, x, weights, cut)


@pytest.mark.parametrize("costs", [MANY, ONE])
@pytest.mark.parametrize("levels", [[5, 2, 0, 3, 5, 1], [4], [3, 3, 3], [0, 0]])
@pytest.mark.parametrize("gated", [True, False])
def test_units_beyond_the_widest_token_are_not_read(monkeypatch, costs, levels, gated):
    monkeypatch.setattr(engine, "CPU_COSTS", costs)
    d, f = 24, 64
    whole = random_weights(d, f, gated=gated)
    cut = site_cut(levels, even_points(f))
    width = f * max(levels) // N_LEVELS
    nan = float("nan")

    def poisoned(tensor, axis):
        if tensor is None:
            return None
        tensor = tensor.clone()
        tensor.narrow(axis, width, f - width).fill_(nan)
        return tensor

    weights = replace(
        whole,
        gate=poisoned(whole.gate, 0),
        up=poisoned(whole.up, 0),
        down=poisoned(whole.down, 1),
        gate_bias=poisoned(whole.gate_bias, 0),
        up_bias=poisoned(whole.up_bias, 0),
    )
    x = torch.randn(len(levels), d, generator=torch.Generator().manual_seed(2))
    assert relative_error(cut_ffn(x, weights, cut), masked(x, whole, cut)) < 1e-5


@pytest.mark.parametrize("costs", [MANY, ONE])
@pytest.mark.parametrize("levels", [[8, 5, 2, 0, 3, 5, 1, 8], [3, 3], [8, 8], [0], [0, 8]])
def test_compensation_by_level(monkeypatch, costs, levels):
    monkeypatch.setattr(engine, "CPU_COSTS", costs)
    d, f, r = 24, 64, 3
    weights = random_weights(d, f)
    g = torch.Generator().manual_seed(3)
    pairs = {
        level: (torch.randn(d, r, generator=g), torch.randn(r, f * level // N_LEVELS, generator=g))
        for level in (1, 3, 5)
    }
    compensation = TableCompensation(torch.randn(N_LEVELS + 1, d, generator=g), pairs)
    cut = site_cut(levels, even_points(f), compensation=compensation)
    x = torch.randn(len(levels), d, generator=g)
    assert relative_error(cut_ffn(x, weights, cut), masked(x, weights, cut)) < 1e-5


def test_a_token_does_not_depend_on_its_neighbours(monkeypatch):
    monkeypatch.setattr(engine, "CPU_COSTS", MANY)
    weights = random_weights(24, 64)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(4))
    levels = [0, 1, 8, 3, 3, 7, 2, 5, 8]
    together = cut_ffn(x, weights, site_cut(levels, even_points(64)))
    for token, level in enumerate(levels):
        alone = cut_ffn(x[token : token + 1], weights, site_cut([level], even_points(64)))
        assert relative_error(alone, together[token : token + 1]) < 1e-5


def test_gradients_equal_those_of_masking(monkeypatch):
    monkeypatch.setattr(engine, "CPU_COSTS", MANY)
    levels = [0, 5, 8, 3, 3, 2]
    weights = random_weights(16, 40, dtype=torch.float64)
    tensors = [weights.gate, weights.up, weights.down, weights.down_bias]
    x = torch.randn(len(levels), 16, dtype=torch.float64, requires_grad=True)
    for tensor in tensors:
        tensor.requires_grad_()
    cut = site_cut(levels, even_points(40))
    got = torch.autograd.grad(cut_ffn(x, weights, cut).square().sum(), [x, *tensors])
    wanted = torch.autograd.grad(masked(x, weights, cut).square().sum(), [x, *tensors])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_recorded(monkeypatch):
    monkeypatch.setattr(engine, "CPU_COSTS", MANY)
    record = Recorder()
    cut_ffn(torch.ones(4, 8), random_weights(8, 64), site_cut([2, 0, 4, 2], even_points(64), record=record))
    assert record.calls == [{"engine": "strips", "tokens": 4, "needed": 64, "read": 32, "computed": 16 * 3 + 16}]


@settings(max_examples=100, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=7),
    flops=st.floats(1e6, 1e10),
)
def test_strips_cover_and_are_cheapest(runs, flops):
    """The dynamic programme against all choices of cuts."""
    costs = CostModel(1e9, flops, 1e-6, 1e10)
    ends, row = [], 0
    for width, tokens in sorted(runs, reverse=True):
        row += tokens
        ends.append((width, row))
    strips = plan_strips(tuple(ends), 16, 4, 3, costs)
    widths = sorted({width for width, _ in ends if width > 0})
    assert [strip.lo for strip in strips] == [0, *(strip.hi for strip in strips)][: len(strips)]
    assert (strips[-1].hi if strips else 0) == max(width for width, _ in ends)

    def rows_above(width):
        return max((end for other, end in ends if other > width), default=0)

    for strip in strips:
        assert strip.tokens == rows_above(strip.lo)
        assert strip.whole == rows_above(strip.hi - 1)

    def price(cuts):
        total = 0.0
        for lo, hi in zip((0, *cuts), cuts, strict=False):
            n = rows_above(lo)
            total += (hi - lo) * max(3 * 16 * 4 / 1e9, 6 * 16 * n / flops) + 4 * 16 * 4 * n / 1e10 + 1e-6
        return total

    if widths:
        cheapest = min(
            price((*inner, widths[-1])) for k in range(len(widths)) for inner in combinations(widths[:-1], k)
        )
        assert price(tuple(strip.hi for strip in strips)) <= cheapest * (1 + 1e-9)


def test_small_mixed_batches_get_one_strip():
    ends = ((4096, 2), (2048, 4), (1024, 6), (512, 8))
    assert plan_strips(ends, 1024, 4, 3, engine.CPU_COSTS) == (Strip(0, 4096, 8, 2),)
    many = tuple((width, 64 * row) for width, row in ends)
    assert len(plan_strips(many, 1024, 4, 3, engine.CPU_COSTS)) > 1
