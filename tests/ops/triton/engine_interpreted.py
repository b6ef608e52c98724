"""The Triton kernels as an engine, alone and under a whole model, in Triton's interpreter on a CPU.

Started by test_triton.py like interpreted.py. Under TRITON_INTERPRET=1 `TritonFFN` takes CPU memory; everything
else is what runs on CUDA.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ffn.shadow import Shadow, unit_norms
from sedac_hf.ops import FFNWeights, OperatingPoint, SiteCut, cut_ffn
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.dispatch import choose
from sedac_hf.ops.low_bit import LowBitMatrix
from sedac_hf.ops.triton.engine import TritonFFN
from tests.cut_cases import Recorder, TableCompensation, assert_as_good_as_plain, level_plan, random_weights
from tests.kernel_cases import between, laid_out
from tests.ops.triton.memory import skip_without_interpreter
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

skip_without_interpreter()
D, F = 70, 36


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def shadow_of(weights: FFNWeights, bits: int = 4) -> Shadow:
    rows, bias = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
    bias = None if bias is None else bias.detach().float().clone()
    return Shadow(LowBitMatrix.quantize(rows, bits), bias, unit_norms(weights), weights.activation)


def kernel_of(weights: FFNWeights, shadow: Shadow) -> TritonFFN:
    tables = shadow.tables(interleaved=False)
    assert tables is not None
    return TritonFFN(weights, tables)


def inputs(rows: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    widths=st.lists(st.integers(0, F), min_size=7, max_size=7),
    shares=st.lists(st.sampled_from([0.1, 0.5, 0.9, 1.0]), min_size=7, max_size=7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gated=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(["rows", "columns", "fused"]),
    compensates=st.sampled_from(["", "bias", "low rank"]),
    seed=st.integers(0, 5),
)
def test_the_engine_is_the_reference(levels, widths, shares, dtype, gated, bias, layout, compensates, seed):
    """Any mixture of levels: width 0, part of the units by width or importance or both, and the whole FFN."""
    weights = random_weights(D, F, gated=gated, bias=bias, dtype=dtype, seed=seed)
    weights = laid_out(replace(weights, activation=KNOWN["silu" if gated else "gelu"]), layout)
    shadow, x = shadow_of(weights), inputs(len(levels), dtype, seed + 1)
    worth = shadow.importance(x)
    least = [0.0 if share == 1 else between(worth, share) for share in shares]
    points = (OperatingPoint(0), *map(OperatingPoint, widths, least), OperatingPoint(F))
    compensation = None
    if compensates:
        g = torch.Generator().manual_seed(seed)
        low_rank = (torch.randn(D, 2, generator=g) / 4, torch.randn(2, widths[4], generator=g) / 4)
        compensation = TableCompensation(torch.randn(9, D, generator=g), {5: low_rank} if "low" in compensates else {})
    record, plan = Recorder(), level_plan(levels)
    cut = SiteCut(points, plan, shadow.importance, compensation, "auto", record, kernel_of(weights, shadow))
    y = cut_ffn(x, weights, cut)
    assert_as_good_as_plain(y, x, weights, cut)
    assert torch.equal(cut_ffn(x, weights, cut), y)
    (call, _) = record.calls
    # Where nobody chooses, the strips' engine runs, which zeroes what few tokens do not use and says so.
    assert call["engine"] in (["triton"] if cut.chooses else ["strips", "masked"])
    used = torch.arange(F) < torch.tensor([[point.width] for point in cut.token_points])
    used &= worth >= torch.tensor([[point.importance_min] for point in cut.token_points])
    assert (call["tokens"], call["needed"]) == (len(levels), int(used.sum()))
    if cut.chooses:
        matrices, chosen, widest = 3 if gated else 2, int(used.any(0).sum()), max(p.width for p in cut.token_points)
        down = chosen if layout == "columns" else widest  # a Linear's down is read up to the widest token
        assert call["read"] == -(-((matrices - 1) * chosen + down) // matrices)
        assert call["computed"] == len(levels) * call["read"]


def test_what_it_accepts():
    weights = random_weights(D, F)
    shadow = shadow_of(weights)
    kernel, x = kernel_of(weights, shadow), inputs(4)
    assert kernel.accepts(x)
    for other in (inputs(5), x[:0], x.half(), x[:, 1:], x.to("meta"), x.clone().requires_grad_()):
        assert not kernel.accepts(other)
    with torch.no_grad():
        assert kernel.accepts(x.clone().requires_grad_())
    learning = replace(weights, down=weights.down.clone().requires_grad_())
    learner = kernel_of(learning, shadow)
    assert not learner.accepts(x)
    with torch.no_grad():
        assert learner.accepts(x)


@pytest.mark.parametrize(
    ("engine", "least", "chosen"),
    [
        ("auto", 0.3, "triton"),
        ("triton", 0.3, "triton"),
        ("rust", 0.3, "masked"),
        ("gather", 0.3, "masked"),
        ("reference", 0.3, "reference"),
        ("auto", 0.0, "strips"),
        ("triton", 0.0, "strips"),
    ],
)
def test_when_it_is_chosen(engine, least, chosen):
    weights = random_weights(D, F)
    points = (OperatingPoint(0), *(OperatingPoint(F // 2, least) for _ in range(7)), OperatingPoint(F))
    shadow = shadow_of(weights)
    kernel = kernel_of(weights, shadow)
    cut = SiteCut(points, level_plan([4, 5]), shadow.importance, None, engine, Recorder(), kernel)
    assert choose(inputs(2), cut) == chosen


def test_what_fits(monkeypatch):
    weights = random_weights(D, F)
    tables = shadow_of(weights).tables(interleaved=False)
    assert tables is not None
    assert TritonFFN.fits(weights, tables)
    assert shadow_of(weights, bits=8).tables(interleaved=False) is None
    others = (
        replace(weights, activation=torch.tanh),
        replace(weights, down=weights.down.double()),
        replace(weights, up_bias=weights.up_bias.to("meta")),
        replace(weights, **{name: getattr(weights, name).to("meta") for name in ("gate", "up", "down")}),
        random_weights(D, F + 1),
        random_weights(D + 64, F),
    )
    for other in others:
        assert not TritonFFN.fits(other, tables)
        with pytest.raises(ValueError, match="ask `fits` first"):
            TritonFFN(other, tables)
    assert not TritonFFN.fits(weights, tables._replace(codes=tables.codes.to("meta")))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not TritonFFN.fits(weights, tables), "CPU memory is read by the interpreter alone"


def test_a_broken_token_stays_visible():
    weights = random_weights(D, F)
    shadow, x = shadow_of(weights), inputs(3)
    x[1] = float("nan")
    points = (OperatingPoint(0), *(OperatingPoint(F, 0.3) for _ in range(7)), OperatingPoint(F))
    record = Recorder()
    cut = SiteCut(
        points, level_plan([4, 4, 8]), shadow.importance, None, "triton", record, kernel_of(weights, shadow)
    )  # fmt: skip
    y = cut_ffn(x, weights, cut)
    assert record.calls[0]["engine"] == "triton"
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def model_by(engine: str, family: str = "llama") -> SedacForCausalLM:
    base = tiny_model(family)
    model = SedacForCausalLM.from_base(base, SedacConfig(base.config, engine=engine))
    model.install(random_policy(model.runtime, "select"))
    return model


def logits_and_engines(model: SedacForCausalLM, ids: Tensor) -> tuple[Tensor, set[str]]:
    model.reset_stats()
    logits = model(ids).logits
    return logits, set(model.stats().engines)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_model_runs_by_it(family):
    model, ids = model_by("triton", family), token_ids(1, 3)
    assert not any(shadow.deciding.interleaved for shadow in model.runtime.weights.shadows)
    got, engines = logits_and_engines(model, ids)
    assert "triton" in engines
    assert engines <= {"triton", "strips", "whole"}
    needed = model.stats().needed_bytes_share
    with torch.enable_grad():
        assert "triton" not in logits_and_engines(model, ids)[1], "weights want a gradient"
    assert "triton" not in logits_and_engines(model, token_ids(1, 5))[1], "more rows than it is for"
    model.runtime.engine = "reference"
    torch.testing.assert_close(got, logits_and_engines(model, ids)[0], rtol=1e-4, atol=1e-4)
    assert model.stats().needed_bytes_share == pytest.approx(needed)


@torch.no_grad()
def test_changed_weights_are_noticed_and_copies_make_their_own():
    model, ids = model_by("triton"), token_ids(1, 2)
    before, _ = logits_and_engines(model, ids)
    first = model.runtime.weights.kernel(1)
    assert isinstance(first, TritonFFN)
    assert model.runtime.weights.kernel(1) is first
    twin = copy.deepcopy(model)
    assert torch.equal(logits_and_engines(twin, ids)[0], before)
    assert twin.runtime.weights.kernel(1) is not first
    assert pickle.loads(pickle.dumps(model.runtime.weights))._kernels == [None] * len(model.runtime.sites)
    for linear in model.runtime.sites[1].linears:
        linear.weight = nn.Parameter(linear.weight * 1.5)
    got, engines = logits_and_engines(model, ids)
    assert "triton" in engines
    assert model.runtime.weights.kernel(1) is not first
    model.runtime.engine = "reference"
    torch.testing.assert_close(got, logits_and_engines(model, ids)[0], rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 1e-3


@torch.no_grad()
def test_generating_gives_the_ids_of_masking():
    ids, options = token_ids(2, 4), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "consistent": True}
    model = model_by("triton")
    ids_by_kernels = model.generate(ids, **options)
    assert "triton" in model.stats().engines
    model.runtime.engine = "reference"
    assert torch.equal(ids_by_kernels, model.generate(ids, **options))
    model.runtime.engine = "triton"
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 6)  # a measured choice
    assert any("measured" in choice for choice in model.stats().choices)
