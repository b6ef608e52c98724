"""Which calls and weights the compiled kernels take, and what happens with the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from sedac_hf.errors import ConfigError
from sedac_hf.ops import OperatingPoint, cut_ffn, rust_product
from sedac_hf.ops.compiled import MAX_ROWS, MOST_IN_TURNS, available
from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.rust_linear import CpuLinear
from sedac_hf.ops.rust_product import accepts, most_rows, product
from tests.cut_cases import Recorder, assert_as_good_as_plain, masked, random_weights, relative_error, site_cut
from tests.kernel_cases import DTYPES, case, threads

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")

if available():
    from sedac_hf import _rust


class Subclass(torch.Tensor):
    """Stands for quantised, distributed and other tensors that are more than memory."""


def changed(weights: FFNWeights, name: str, change) -> FFNWeights:
    return replace(weights, **{name: change(getattr(weights, name))})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gate", lambda w: w.double()),
        ("up", lambda w: w.bfloat16()),
        ("up", lambda w: w.T.contiguous().T),  # a row is spread over memory
        ("gate", lambda w: w.T.contiguous().T),
        ("up", lambda w: w[:1].expand_as(w)),  # rows overlap
        ("down", lambda w: torch.cat((w, w), dim=1)[:, ::2]),
        ("down", lambda w: w.to("meta")),
        ("gate_bias", lambda b: torch.cat((b, b))[::2]),
        ("down_bias", lambda b: b.bfloat16()),
        ("gate", lambda w: w.as_subclass(Subclass)),
        ("activation", lambda _: functional.mish),
        ("activation", lambda _: functional.hardtanh),
        ("activation", lambda _: lambda z: functional.relu(z).clamp(max=20)),  # as relu where numbers are small
        ("activation", lambda _: lambda z: functional.silu(z).clamp(-50, 50)),
    ],
)
def test_what_the_kernels_cannot_run_does_not_fit(name, change):
    weights = random_weights(16, 40)
    assert CpuFFN.fits(weights)
    other = changed(weights, name, change)
    assert not CpuFFN.fits(other)
    with pytest.raises(ValueError, match="ask `fits` first"):
        CpuFFN(other)


def test_strided_rows_and_both_layouts_of_down_fit():
    weights = random_weights(16, 40)
    assert CpuFFN.fits(changed(weights, "down", lambda w: w.T.contiguous().T))
    assert CpuFFN.fits(changed(weights, "up", lambda w: torch.cat((w, w), dim=1)[:, :16]))
    assert CpuFFN.fits(changed(weights, "down", lambda w: torch.cat((w, w), dim=1)[:, :40]))


@pytest.mark.parametrize("rows", [0, 1, 4, 5, MAX_ROWS, MAX_ROWS + 1, MOST_IN_TURNS, MOST_IN_TURNS + 1])
@pytest.mark.parametrize("selects", [True, False])
def test_rows_that_a_kernel_takes(rows, selects):
    c = case(16, 40, max(rows, 1), selects=selects)
    record = Recorder()
    x = c.x[:rows]
    assert c.kernel.accepts(x) == (1 <= rows <= MAX_ROWS)
    assert c.kernel.accepts(x, in_turns=True) == (1 <= rows <= MOST_IN_TURNS)
    y = cut_ffn(x, c.weights, c.cut([3] * rows, record))
    assert relative_error(y, masked(x, c.weights, c.cut([3] * rows))) < 1e-5 or rows == 0
    (call,) = record.calls
    most, otherwise = (MAX_ROWS, "masked") if selects else (MOST_IN_TURNS, "strips")
    assert call["engine"] == ("none" if rows == 0 else "rust" if rows <= most else otherwise)


def test_inputs_that_a_kernel_does_not_take():
    c = case(16, 40, 2)
    assert c.kernel.accepts(c.x)
    assert not c.kernel.accepts(c.x.bfloat16())
    assert not c.kernel.accepts(c.x.to("meta"))
    assert not c.kernel.accepts(c.x[:, :15]), "it would read memory that is not x's"
    assert not c.kernel.accepts(torch.randn(2, 17))


def test_a_kernel_without_a_shadow_does_not_choose():
    c = case(16, 40, 2)
    record = Recorder()
    cut = replace(c.cut([3, 4], record), kernel=CpuFFN(c.weights))
    assert_as_good_as_plain(cut_ffn(c.x, c.weights, cut), c.x, c.weights, cut)
    assert record.calls[0]["engine"] == "masked"


@pytest.mark.parametrize("engine", ["strips", "gather", "masked", "reference"])
def test_a_kernel_runs_only_where_it_may(engine):
    c = case(16, 40, 1)
    record = Recorder()
    cut_ffn(c.x, c.weights, replace(c.cut([3], record), engine=engine))
    assert record.calls[0]["engine"] != "rust"


@pytest.mark.parametrize("of", ["x", "weights"])
def test_a_call_with_a_gradient_runs_in_torch(of):
    c = case(16, 40, 2)
    tensors = [c.x] if of == "x" else [c.weights.gate, c.weights.up, c.weights.down]
    for tensor in tensors:
        tensor.requires_grad_()
    record = Recorder()
    got = torch.autograd.grad(cut_ffn(c.x, c.weights, c.cut([3, 6], record)).square().sum(), tensors)
    wanted = torch.autograd.grad(masked(c.x, c.weights, c.cut([3, 6])).square().sum(), tensors)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        cut_ffn(c.x, c.weights, c.cut([3, 6], record))
    assert [call["engine"] for call in record.calls] == ["masked", "rust"]


def test_bad_calls_are_refused_by_the_kernel_itself():
    c = case(16, 40, 1)
    with pytest.raises(ConfigError, match=r"1 to 16 rows.*\[17, 16\]"):
        c.kernel.run(torch.randn(17, 16), [OperatingPoint(40)] * 17)
    with pytest.raises(ValueError, match="needs a shadow"):
        CpuFFN(c.weights).run(c.x, [OperatingPoint(40, 0.5)])
    with pytest.raises(ValueError, match=r'this machine.*"sse9"'):
        CpuFFN(c.weights, isa="sse9")
    assert c.kernel.run(c.x, [OperatingPoint(10**6)])[1:] == (40, 40)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, MAX_ROWS),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 150),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    isa=st.sampled_from(_rust.instruction_sets() if available() else [""]),
)
def test_a_linear_map_is_as_good_as_torchs(rows, inputs, outputs, bias, dtype, strided, isa):
    generator = torch.Generator().manual_seed(inputs)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    weight = torch.randn(outputs, inputs * 2 if strided else inputs, generator=generator).to(dtype)[:, :inputs]
    linear.weight.data = weight
    if bias:
        linear.bias.data = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    assert CpuLinear.fits(linear.weight, linear.bias)
    kernel = CpuLinear(linear.weight, linear.bias, isa=isa)
    y = kernel.run(x)
    exact = functional.linear(x.double(), weight.double(), linear.bias.double() if bias else None)
    orders = [torch.randperm(inputs, generator=generator) for _ in range(8)]
    plain = max(
        relative_error(functional.linear(x[:, order], weight[:, order], linear.bias), exact) for order in orders
    )
    assert relative_error(y, exact) <= 2 * plain + 2 * torch.finfo(dtype).eps
    for row in range(rows):
        assert torch.equal(kernel.run(x[row]), y[row])
    with threads(1):
        assert torch.equal(kernel.run(x.view(rows, 1, inputs)), y[:, None])


def test_linear_maps_that_do_not_fit():
    weight = torch.randn(6, 4)
    assert CpuLinear.fits(weight, None)
    assert not CpuLinear.fits(weight.T, None)
    assert not CpuLinear.fits(weight.double(), None)
    assert not CpuLinear.fits(weight, torch.ones(6, dtype=torch.bfloat16))
    assert not CpuLinear.fits(weight, torch.ones(12)[::2])
    assert not CpuLinear.fits(weight.as_subclass(Subclass), None)
    with pytest.raises(ValueError, match="1 to 16 rows"):
        CpuLinear(weight, None).run(torch.ones(17, 4))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 40), st.booleans())
def test_the_product_by_units(inputs, outputs, rows, bias):
    generator = torch.Generator().manual_seed(inputs)
    weight = torch.randn(inputs, outputs, generator=generator).bfloat16().T
    b = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    y = product(x, weight, b)
    exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
    plain = relative_error(functional.linear(x, weight.contiguous(), b), exact)
    assert relative_error(y, exact) <= 2 * plain + 2 * torch.finfo(torch.bfloat16).eps
    with threads(1):
        assert torch.equal(product(x.view(1, rows, inputs), weight, b), y[None])
    assert torch.equal(product(x[:1], weight, b), y[:1])


@pytest.mark.parametrize(("has_amx", "most"), [(True, 4), (False, 128)])
def test_torchs_own_products_use_amx(has_amx, most, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx, raising=False)
    most_rows.cache_clear()
    assert most_rows() == most
    most_rows.cache_clear()


@pytest.mark.skipif(not rust_product.available(), reason="no bf16 products")
def test_which_products_by_units_are_accepted():
    weight, x = torch.randn(4, 6).bfloat16().T, torch.randn(2, 4).bfloat16()
    bias = torch.ones(6).bfloat16()
    assert accepts(x, weight, None)
    assert accepts(x, weight, bias)
    assert accepts(x.expand(2, 2, 4).contiguous(), weight, bias)
    assert not accepts(x, weight.contiguous(), None)  # the usual layout
    assert not accepts(x, weight, bias.float())
    assert not accepts(x, weight, torch.ones(12).bfloat16()[::2])
    assert not accepts(x.float(), weight, None)
    assert not accepts(x.float(), weight.float(), None)
    assert not accepts(x.to("meta"), weight, None)
    assert not accepts(torch.randn(4, 2).bfloat16().T, weight, None)
    assert not accepts(torch.randn(2, 3).bfloat16(), weight, None)
    assert not accepts(x[:1], weight, None)
    assert not accepts(x[:1].expand(most_rows() + 1, 4).contiguous(), weight, None)
    assert not accepts(x, weight.as_subclass(Subclass), None)
    wanted = weight.detach().requires_grad_()
    assert not accepts(x, wanted, None)
    assert not accepts(x, weight, bias.clone().requires_grad_())
    with torch.no_grad():
        assert accepts(x, wanted, bias.clone().requires_grad_())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not accepts(x, wanted, None)


def test_engines_of_a_mixed_batch_agree_in_what_they_record():
    c = case(24, 64, 3)
    calls = []
    for engine in ("rust", "masked"):
        record = Recorder()
        cut_ffn(c.x, c.weights, replace(c.cut([2, 8, 0], record), engine=engine))
        calls.append(record.calls[0])
    assert calls[0]["needed"] == calls[1]["needed"]
    assert site_cut([3], c.points).kernel is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x[:, :-1], r"\[2, 63\]"),
        (lambda x: x.double(), "float64"),
        (lambda x: x[:0], r"\[0, 64\]"),
        (lambda x: x.new_zeros(MAX_ROWS + 1, 64), r"\[17, 64\]"),
        (lambda x: x.to("meta"), "meta"),
    ],
    ids=["hidden size", "dtype", "no rows", "too many rows", "device"],
)
def test_a_direct_call_never_leaves_the_memory_that_it_was_given(change, named) -> None:
    weights = random_weights(64, 96)
    x = change(torch.randn(2, 64))
    with pytest.raises(ConfigError, match=named):
        CpuFFN(weights).run(x, [OperatingPoint(96)] * x.shape[0])
    with pytest.raises(ConfigError, match=named):
        CpuLinear(weights.up, None).run(x)


def test_a_direct_call_needs_a_point_per_row_and_room_for_hidden_values() -> None:
    kernel, x = CpuFFN(random_weights(64, 96)), torch.randn(2, 64)
    for points in (1, 3):
        with pytest.raises(ConfigError, match=f"got {points}"):
            kernel.run(x, [OperatingPoint(96)] * points)
    for hidden in (torch.empty(1, 96), torch.empty(2, 96).double(), torch.empty(96, 2).T):
        with pytest.raises(ConfigError, match="hidden"):
            kernel.run(x, [OperatingPoint(96)] * 2, hidden)
