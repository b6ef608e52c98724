"""The shadow: a deterministic definition, close to the gate, bounded in memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.ffn.shadow import ExactGate, Shadow, unit_norms
from sedac_hf.ffn.sites import find_sites
from sedac_hf.ops import low_bit
from sedac_hf.ops.low_bit import LowBitMatrix, int8_rows
from tests.tiny_models import FAMILIES, HIDDEN, tiny_model

matrices = {"rows": st.integers(1, 20), "columns": st.integers(1, 200), "seed": st.integers(0, 9)}


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unpacked(copy: LowBitMatrix) -> list[list[int]]:
    """The codes read one by one from the documented layout."""
    rows = []
    for row in copy.codes.tolist():
        codes = []
        for group in range(copy.scales.shape[1]):
            if copy.bits == 4:
                held = row[group * 32 : (group + 1) * 32]
                codes += [byte % 16 - 8 for byte in held] + [byte // 16 - 8 for byte in held]
            elif copy.bits < 4:
                size = 8 * copy.bits
                held = row[group * size : (group + 1) * size]
                low = [held[i % 16] // 4 ** (i // 16) % 4 for i in range(64)]
                high = [held[16 + i % 8] // 2 ** (i // 8) % 2 if copy.bits == 3 else 0 for i in range(64)]
                codes += [a + 4 * b - 2 ** (copy.bits - 1) for a, b in zip(low, high, strict=True)]
            else:
                codes += row[group * 64 : (group + 1) * 64]
        rows.append(codes[: copy.columns])
    return rows


@settings(max_examples=40, deadline=None)
@given(**matrices, bits=st.integers(2, 8))
def test_codes_and_scales(rows, columns, seed, bits):
    weight = matrix(rows, columns, seed)
    copy = LowBitMatrix.quantize(weight, bits)
    codes = torch.tensor(unpacked(copy))
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    groups = torch.arange(columns) // 64
    assert torch.equal(copy.dequantized(), codes * copy.scales.float()[:, groups])
    assert copy.scales.shape == (rows, math.ceil(columns / 64))
    assert copy.bytes == copy.codes.nbytes + copy.scales.nbytes


@settings(max_examples=40, deadline=None)
@given(**matrices)
def test_clips_never_hurt_and_each_weight_is_at_its_nearest_code(rows, columns, seed):
    weight = matrix(rows, columns, seed)
    copy = LowBitMatrix.quantize(weight)
    got = copy.dequantized()
    for group in range(copy.scales.shape[1]):
        part = slice(group * 64, min(columns, (group + 1) * 64))
        scale = copy.scales[:, group, None].float()
        nearest = (weight[:, part] / scale).round().clamp(-7, 7) * scale
        torch.testing.assert_close(got[:, part], nearest)
        unclipped_scale = (weight[:, part].abs().amax(1, keepdim=True) / 7).bfloat16().float()
        unclipped = (weight[:, part] / unclipped_scale).round().clamp(-7, 7) * unclipped_scale
        error, plain = ((w - weight[:, part]).square().sum(1) for w in (got[:, part], unclipped))
        assert (error <= plain * (1 + 1e-5) + 1e-12).all()


def test_zero_groups_and_exact_values():
    weight = torch.zeros(2, 130)
    weight[0, :7] = torch.arange(-3.0, 4.0) * 0.5
    weight[0, 7] = 3.5  # largest: scale 0.5, everything on the grid
    copy = LowBitMatrix.quantize(weight)
    assert torch.equal(copy.dequantized(), weight)


@settings(max_examples=40, deadline=None)
@given(**matrices, n=st.integers(0, 5))
def test_product_is_the_integer_definition(rows, columns, seed, n):
    copy = LowBitMatrix.quantize(matrix(rows, columns, seed))
    x = matrix(n, columns, seed + 1) if n else torch.empty(0, columns)
    codes = torch.tensor(unpacked(copy), dtype=torch.int64)
    wanted = torch.zeros(n, rows, dtype=torch.float64)
    for token in range(n):
        scale = x[token].abs().max() / 127
        quantised = (x[token] / scale).round().long()
        for group in range(copy.scales.shape[1]):
            part = slice(group * 64, (group + 1) * 64)
            wanted[token] += (codes[:, part] @ quantised[part]) * copy.scales[:, group].double() * scale.double()
    torch.testing.assert_close(copy.product(int8_rows(x)).double(), wanted, rtol=1e-5, atol=1e-6)


def test_int8_rounds_half_to_even_and_keeps_zero_and_nan_rows():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [1.0, float("nan"), 0.0, 0.0]])
    codes, scale = int8_rows(x)
    assert codes[0].tolist() == [127.0, 0.0, 2.0, -2.0]
    assert (codes[1] * scale[1]).tolist() == [0.0] * 4
    assert (codes[2] * scale[2]).isnan().all()


def test_chunks_do_not_change_the_result(monkeypatch):
    weight = matrix(50, 100, 0)
    x = matrix(3, 100, 1)
    whole = LowBitMatrix.quantize(weight)
    expected = whole.product(int8_rows(x))
    monkeypatch.setattr(low_bit, "_CHUNK", 700)  # seven rows at a time
    pieces = LowBitMatrix.quantize(weight)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.scales, whole.scales)
    torch.testing.assert_close(pieces.product(int8_rows(x)), expected)
    torch.testing.assert_close(pieces.product(int8_rows(x), 10, 31), expected[:, 10:31])


def test_bits_out_of_range():
    for bits in (1, 9, 0):
        with pytest.raises(ConfigError, match=f"got {bits}"):
            LowBitMatrix.quantize(torch.ones(2, 2), bits)


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_follows_the_exact_one(family):
    site = find_sites(tiny_model(family)).sites[1]
    weights, x = site.weights(), matrix(40, HIDDEN, 3)
    shadow = Shadow.build(site)
    got = shadow.importance(x)
    rows, bias = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
    z = torch.nn.functional.linear(x, rows, bias)
    norm = weights.down.norm(dim=0) * (1 if weights.gate is None else weights.up.norm(dim=1))
    exact = weights.activation(z).abs() * norm
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.corrcoef(torch.stack([got.flatten(), exact.flatten()]))[0, 1] > 0.98
    best = Shadow.build(site, bits=8).importance(x)
    assert (best - exact).norm() < 0.02 * exact.norm()
    assert (best - exact).norm() < (got - exact).norm()
    torch.testing.assert_close(ExactGate(site).importance(x), exact)
    assert torch.equal(Shadow.build(site).importance(x), got)
    torch.testing.assert_close(shadow.importance(x, range(16, 48)), got[:, 16:48])
    torch.testing.assert_close(shadow.importance(x[:1]), got[:1])


def test_cost_of_a_glu_shadow():
    """8.9% of the bytes of a bfloat16 GLU, plus its norms."""
    site = find_sites(tiny_model("llama", hidden_size=128, intermediate_size=512, dtype=torch.bfloat16)).sites[0]
    shadow = Shadow.build(site)
    ffn_bytes = sum(linear.weight.nbytes for linear in site.linears)
    assert shadow.bytes - 4 * 512 == pytest.approx(0.0885 * ffn_bytes, rel=0.01)
    assert shadow.multiply_adds == 128 * 512


def test_a_zero_token_needs_what_the_bias_says():
    site = find_sites(tiny_model("gpt2")).sites[0]
    weights = site.weights()
    got = Shadow.build(site).importance(torch.zeros(1, HIDDEN))
    torch.testing.assert_close(got[0], weights.activation(weights.up_bias).abs() * unit_norms(weights))
    assert not Shadow.build(find_sites(tiny_model("llama")).sites[0]).importance(torch.zeros(2, HIDDEN)).any()


def test_no_gradient_flows_through_the_decision():
    site = find_sites(tiny_model("llama")).sites[0]
    x = torch.randn(2, HIDDEN, requires_grad=True)
    assert not Shadow.build(site).importance(x).requires_grad
    assert not ExactGate(site).importance(x).requires_grad


class Opaque(nn.Module):
    """A linear whose weights can't be read: as quantised or adapter-wrapped ones."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.inside = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "opt"])
def test_opaque_linears_are_decided_by_the_exact_gate(family):
    plain, model = tiny_model(family), tiny_model(family)
    site, other = find_sites(plain).sites[0], find_sites(model).sites[0]
    for name, child in list(other.owner.named_children()):
        if isinstance(child, nn.Linear):
            setattr(other.owner, name, Opaque(child))
    opaque = find_sites(model).sites[0]
    assert isinstance(opaque.up, Opaque)
    with pytest.raises(UnsupportedModelError, match="Opaque"):
        Shadow.build(opaque)
    x = matrix(4, HIDDEN, 0)
    torch.testing.assert_close(ExactGate(opaque).importance(x), ExactGate(site).importance(x))
    assert ExactGate(opaque).bytes > 0


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 200), seed=st.integers(0, 9))
def test_row_by_row_takes_interleaving_back(rows, columns, seed):
    plain = LowBitMatrix.quantize(matrix(rows, columns, seed))
    back = plain.interleave().row_by_row()
    assert not back.interleaved
    assert torch.equal(back.codes, plain.codes)
    assert torch.equal(back.scales, plain.scales)
    assert back.codes.is_contiguous()
    assert back.scales.is_contiguous()
    assert plain.row_by_row() is plain


@pytest.mark.parametrize("bits", [4, 3])
def test_a_shadow_lies_as_the_device_that_it_comes_to_reads_it(bits):
    site = find_sites(tiny_model("gpt2")).sites[0]
    shadow, plain = Shadow.build(site, bits), Shadow.build(site, bits)
    assert (shadow.tables() is None, shadow.tables(interleaved=False) is None) == (True, bits != 4)
    shadow.interleave()
    assert shadow.deciding.interleaved is (bits == 4)
    assert (shadow.tables() is None, shadow.tables(interleaved=False) is None) == (bits != 4, True)
    shadow.move(torch.device("cpu"))
    assert shadow.deciding.interleaved is (bits == 4)
    shadow.move(torch.device("meta"))  # stands for any device but a CPU
    assert not shadow.deciding.interleaved
    assert shadow.deciding.codes.shape == plain.deciding.codes.shape
    tensors = (shadow.deciding.codes, shadow.deciding.scales, shadow.bias, shadow.unit_norm)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_shadow_that_is_not_for_cpu_kernels_stays_row_by_row():
    shadow = Shadow.build(find_sites(tiny_model("llama")).sites[0])
    shadow.move(torch.device("cpu"))
    assert not shadow.deciding.interleaved
    elsewhere = Shadow.build(find_sites(tiny_model("llama")).sites[0])
    elsewhere.move(torch.device("meta"))
    elsewhere.interleave()  # built elsewhere, wanted for CPU kernels: laid out once it comes to a CPU
    assert not elsewhere.deciding.interleaved
