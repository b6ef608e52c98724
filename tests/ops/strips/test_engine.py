"""Strips give the masked result in every mixture of levels, and read nothing beyond the widest token."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import _rust
from sedac_hf.ops import OperatingPoint, cut_ffn, onednn
from sedac_hf.ops.strips import costs as cost_module
from sedac_hf.ops.strips.costs import CPU_COSTS, CostModel
from sedac_hf.ops.strips.engine import _pave
from sedac_hf.ops.strips.plan import PythonStripPlanner
from sedac_hf.runtime import SedacRuntime
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
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

# Strips cost nothing: every width that occurs becomes a cut. And: strips cost so much that there is one.
MANY = CostModel(1e30, 1.0, 0.0, 1e30)
ONE = CostModel(1.0, 1e30, 1e9, 1e30)


@contextmanager
def rates(costs: CostModel) -> Iterator[None]:
    """Cuts by these rates alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEDAC_MEASURE_COSTS", "0")
        patch.setattr(cost_module, "CPU_COSTS", costs)
        cost_module.forget_tables()
        yield
    cost_module.forget_tables()


@pytest.fixture
def costs(request: pytest.FixtureRequest) -> Iterator[None]:
    with rates(request.param):
        yield


in_many_strips = pytest.mark.parametrize("costs", [MANY], indirect=True, ids=["many"])
in_many_strips_or_one = pytest.mark.parametrize("costs", [MANY, ONE], indirect=True, ids=["many", "one"])


levels_lists = st.lists(st.integers(0, N_LEVELS), min_size=0, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    levels=levels_lists,
    f=st.integers(1, 90),
    d=st.integers(1, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    costs=st.sampled_from([MANY, ONE, CPU_COSTS]),
    planner=st.sampled_from([PythonStripPlanner, _rust.StripPlanner]),
    widths=st.lists(st.integers(0, 90), min_size=N_LEVELS + 1, max_size=N_LEVELS + 1),
    has_products=st.booleans(),
)
def test_any_mixture_equals_masking(levels, f, d, gated, bias, dtype, costs, planner, widths, has_products):
    weights = random_weights(d, f, gated=gated, bias=bias, dtype=dtype, seed=f)
    x = torch.randn(len(levels), d, generator=torch.Generator().manual_seed(1)).to(dtype)
    points = tuple(OperatingPoint(min(width, f)) for width in sorted(widths))
    cut = replace(site_cut(levels, points), strip_planner=planner)
    with rates(costs), pytest.MonkeyPatch.context() as patch:
        # Machines with and without products of a low precision take another order.
        patch.setattr(onednn, "has_products", lambda dtype: has_products)
        y = cut_ffn(x, weights, cut)
    assert_as_good_as_plain(y, x, weights, cut)


@in_many_strips_or_one
@pytest.mark.parametrize("levels", [[5, 2, 0, 3, 5, 1], [4], [3, 3, 3], [0, 0]])
@pytest.mark.parametrize("gated", [True, False])
def test_units_beyond_the_widest_token_are_not_read(costs, levels, gated):
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


@in_many_strips_or_one
@pytest.mark.parametrize("levels", [[8, 5, 2, 0, 3, 5, 1, 8], [3, 3], [8, 8], [0], [0, 8]])
def test_compensation_by_level(costs, levels):
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


@in_many_strips
def test_a_token_does_not_depend_on_its_neighbours(costs):
    weights = random_weights(24, 64)
    x = torch.randn(9, 24, generator=torch.Generator().manual_seed(4))
    levels = [0, 1, 8, 3, 3, 7, 2, 5, 8]
    together = cut_ffn(x, weights, site_cut(levels, even_points(64)))
    for token, level in enumerate(levels):
        alone = cut_ffn(x[token : token + 1], weights, site_cut([level], even_points(64)))
        assert relative_error(alone, together[token : token + 1]) < 1e-5


@in_many_strips
def test_gradients_equal_those_of_masking(costs):
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


@in_many_strips
def test_what_is_recorded(costs):
    record = Recorder()
    cut_ffn(torch.ones(4, 8), random_weights(8, 64), site_cut([2, 0, 4, 2], even_points(64), record=record))
    assert record.calls == [{"engine": "strips", "tokens": 4, "needed": 64, "read": 32, "computed": 16 * 3 + 16}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_serves_a_stretch(dtype):
    """FFNs of equal widths share one paving, others get their own; all under one plan."""
    planners = []

    class Counting(PythonStripPlanner):
        def strips(self, ends):
            planners.append(ends)
            return super().strips(ends)

    levels = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    first, x = site_cut(levels, even_points(64)), torch.randn(50, 24).to(dtype)
    narrow = tuple(OperatingPoint(point.width // 2) for point in even_points(64))
    with rates(MANY):
        for seed, points in enumerate((even_points(64), even_points(64), narrow, even_points(64), narrow)):
            weights = random_weights(24, 64, dtype=dtype, seed=seed)
            cut = replace(first, points=points, strip_planner=Counting)
            assert_as_good_as_plain(cut_ffn(x, weights, cut), x, weights, cut)
    assert len(planners) == 2


def test_a_plan_that_was_used_can_be_copied_and_pickled():
    weights, x = random_weights(24, 64), torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    cut = replace(site_cut([3, 8, 5, 0, 5] * 10, even_points(64)), strip_planner=_rust.StripPlanner)
    wanted = cut_ffn(x, weights, cut)
    for plan in (copy.deepcopy(cut.plan), pickle.loads(pickle.dumps(cut.plan))):
        torch.testing.assert_close(cut_ffn(x, weights, replace(cut, plan=plan)), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("levels", [[], [5], [0], [0, 0, 3], [8, 8, 0], [3, 3, 5]])
@pytest.mark.parametrize("gated", [True, False])
def test_no_token_one_token_few_tokens(dtype, levels, gated):
    weights = random_weights(24, 64, gated=gated, dtype=dtype)
    x = torch.randn(len(levels), 24, generator=torch.Generator().manual_seed(4)).to(dtype)
    for costs in (MANY, ONE):
        cut = site_cut(levels, even_points(64))
        with rates(costs):
            assert_as_good_as_plain(cut_ffn(x, weights, cut), x, weights, cut)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [12, 300])  # few tokens: zeroed in place; many: sorted
def test_a_large_call_is_as_good_as_plain_and_repeats_to_the_bit(dtype, n):
    weights = random_weights(48, 320, dtype=dtype)
    g = torch.Generator().manual_seed(6)
    x = torch.randn(n, 48, generator=g).to(dtype)
    levels = torch.randint(0, 9, (n,), generator=g).tolist()
    results = []
    for planner in (None, _rust.StripPlanner, _rust.StripPlanner):
        cut = replace(site_cut(levels, even_points(320)), strip_planner=planner)
        results.append(cut_ffn(x, weights, cut))
        assert_as_good_as_plain(results[-1], x, weights, cut)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@in_many_strips_or_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_that_a_token_does_not_use_may_be_infinite(costs, dtype):
    """A product with 0 would let an inf or NaN of an unused unit through."""
    weights = random_weights(24, 64, dtype=dtype)
    clean = replace(weights, up=weights.up.clone())
    weights.up[40:] = float("inf")
    levels = [8, 5, 2, 5, 1, 0, 4, 5] * 10
    x = torch.randn(80, 24, generator=torch.Generator().manual_seed(7)).to(dtype)
    for few in (80, 8):
        cut, untouched = site_cut(levels[:few], even_points(64)), [i for i in range(few) if levels[i] < 8]
        got, wanted = (cut_ffn(x[:few], w, cut)[untouched] for w in (weights, clean))
        assert relative_error(got, wanted) < 1e-6


def test_the_runtime_hands_the_compiled_planner_on():
    runtime = SedacRuntime(tiny_model("llama"))
    runtime.install(random_policy(runtime, "truncate"))
    seen = set()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sedac_hf.ops.strips.engine._pave", lambda *a, **k: seen.add(a[1].strip_planner) or _pave(*a, **k)
        )
        runtime.model(token_ids(2, 40))
    assert seen == {_rust.StripPlanner}
    assert runtime.stats().engines["strips"] > 0
    assert SedacRuntime(tiny_model("llama"), controller="python").strip_planner is None
