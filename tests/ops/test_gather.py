"""One row: only the chosen units count, in both layouts of down."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.ops import OperatingPoint, cut_ffn
from tests.cut_cases import (
    Recorder,
    TableCompensation,
    assert_as_good_as_plain,
    even_points,
    masked,
    random_weights,
    relative_error,
    site_cut,
)


def transposed(weights):
    return replace(weights, down=weights.down.T.contiguous().T)


@settings(max_examples=60, deadline=None)
@given(
    f=st.integers(1, 90),
    d=st.integers(1, 40),
    gated=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    contiguous=st.booleans(),
    width=st.integers(0, 90),
    least=st.floats(0.01, 1.2),
)
def test_one_row_equals_masking(f, d, gated, bias, dtype, contiguous, width, least):
    weights = random_weights(d, f, gated=gated, bias=bias, dtype=dtype, seed=f)
    weights = transposed(weights) if contiguous else weights
    importance = torch.rand(1, f, generator=torch.Generator().manual_seed(width))
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1)).to(dtype)
    points = (OperatingPoint(0), OperatingPoint(min(width, f), least), OperatingPoint(f))
    record = Recorder()
    cut = site_cut([1], points, importance=lambda _: importance, record=record)
    assert_as_good_as_plain(cut_ffn(x, weights, cut), x, weights, cut)
    used = int((importance[0, : min(width, f)] >= torch.tensor(least)).sum())
    (call,) = record.calls
    assert (call["engine"], call["needed"]) == ("gather", used)
    assert used <= call["read"] <= f


@pytest.mark.parametrize("gated", [True, False])
def test_units_not_chosen_are_not_read(gated):
    f, d = 40, 16
    whole = transposed(random_weights(d, f, gated=gated))
    importance = torch.rand(1, f, generator=torch.Generator().manual_seed(0))
    cut = site_cut([4], even_points(f, 1.0), importance=lambda _: importance)
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1))
    unused = importance[0] < torch.tensor(0.5)
    assert 5 < int(unused.sum()) < 35

    def poisoned(tensor):
        return None if tensor is None else torch.where(unused.view(-1, *[1] * (tensor.dim() - 1)), torch.nan, tensor)

    weights = replace(
        whole,
        gate=poisoned(whole.gate),
        up=poisoned(whole.up),
        down=poisoned(whole.down.T.contiguous()).T,
        gate_bias=poisoned(whole.gate_bias),
        up_bias=poisoned(whole.up_bias),
    )
    assert relative_error(cut_ffn(x, weights, cut), masked(x, whole, cut)) < 1e-5


@pytest.mark.parametrize("contiguous", [True, False])
def test_compensation_and_no_unit_at_all(contiguous):
    f, d = 40, 16
    weights = random_weights(d, f)
    weights = transposed(weights) if contiguous else weights
    g = torch.Generator().manual_seed(3)
    table = torch.randn(9, d, generator=g)
    pair = (torch.randn(d, 2, generator=g), torch.randn(2, f, generator=g))
    compensation = TableCompensation(table, {4: pair})
    importance = torch.rand(1, f, generator=g)
    x = torch.randn(1, d, generator=g)
    for least in (0.5, 1e9):
        points = tuple(OperatingPoint(f, 0.0 if level == 8 else least) for level in range(9))
        cut = site_cut([4], points, importance=lambda _: importance, compensation=compensation)
        assert relative_error(cut_ffn(x, weights, cut), masked(x, weights, cut)) < 1e-5


def test_gradients_equal_those_of_masking():
    f, d = 40, 16
    for weights in (random_weights(d, f, dtype=torch.float64), transposed(random_weights(d, f, dtype=torch.float64))):
        importance = torch.rand(1, f, generator=torch.Generator().manual_seed(0))
        x = torch.randn(1, d, dtype=torch.float64, requires_grad=True)
        cut = site_cut([4], even_points(f, 1.0), importance=lambda _, imp=importance: imp)
        (got,) = torch.autograd.grad(cut_ffn(x, weights, cut).square().sum(), [x])
        (wanted,) = torch.autograd.grad(masked(x, weights, cut).square().sum(), [x])
        torch.testing.assert_close(got, wanted)
