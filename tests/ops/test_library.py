"""The operators of cut FFNs: what they compute, and that `torch.compile` takes them whole."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from torch.library import opcheck

from sedac_hf.errors import ConfigError
from sedac_hf.ops import FFNWeights, OperatingPoint, library
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.library import Handle, linear, selected_ffn, truncated_ffn
from sedac_hf.ops.low_bit import LowBitMatrix, importance
from tests.cut_cases import assert_as_good_as_plain, random_weights, site_cut

D, F = 24, 40


def ffn(weights: FFNWeights, activation: str = "silu") -> tuple[object, ...]:
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return (weights.gate, weights.up, weights.down, *biases, activation, 0)


def shadow(weights: FFNWeights) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    rows, bias = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
    matrix = LowBitMatrix.quantize(rows)
    norm = torch.rand(rows.shape[0], generator=torch.Generator().manual_seed(3)) + 0.5
    return matrix.codes, matrix.scales, None if bias is None else bias.float(), norm


def inputs(n: int, dtype: torch.dtype = torch.float32, d: int = D) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(n)).to(dtype)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(-2, 60), max_size=6),
    selects=st.booleans(),
    gated=st.booleans(),
    bias=st.booleans(),
    by_columns=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    activation=st.sampled_from(sorted(KNOWN)),
    f=st.integers(1, 50),
    d=st.integers(1, 70),
)
def test_equals_masking(widths, selects, gated, bias, by_columns, dtype, activation, f, d):
    weights = random_weights(d, f, gated=gated, bias=bias, dtype=dtype, seed=f)
    weights = replace(weights, activation=KNOWN[activation])
    if by_columns:
        weights = replace(weights, down=weights.down.T.contiguous().T)
    x = inputs(len(widths), dtype, d)
    codes, scales, deciding_bias, norm = shadow(weights)
    deciding = LowBitMatrix(codes, scales, d, 4, f)

    def worth(tokens: Tensor) -> Tensor:
        return importance(tokens, deciding, deciding_bias, norm, weights.activation)

    least = worth(x).median(dim=1).values if selects and widths else torch.zeros(len(widths))
    points = [OperatingPoint(min(max(k, 0), f), float(low)) for k, low in zip(widths, least, strict=True)]
    cut = site_cut(range(1, len(widths) + 1), (OperatingPoint(0), *points), importance=worth)
    if selects:
        y = selected_ffn(x, int32(*widths), least, *shadow(weights), *ffn(weights, activation))
    else:
        y = truncated_ffn(x, int32(*widths), *ffn(weights, activation))
    assert_as_good_as_plain(y, x, weights, cut)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_registration_is_sound(gated: bool, n: int) -> None:
    weights = random_weights(D, F, gated=gated, bias=gated)
    x, widths = inputs(n), int32(*range(10, 10 + n))
    opcheck(truncated_ffn, (x, widths, *ffn(weights)))
    opcheck(selected_ffn, (x, widths, torch.full((n,), 0.1), *shadow(weights), *ffn(weights)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, D), (2, 3, D), (0, D)])
def test_a_linear_map(shape: tuple[int, ...], bias: bool) -> None:
    """Its own where the kernel declines, or is gone."""
    x, weight = torch.randn(*shape), torch.randn(F, D)
    b = torch.randn(F) if bias else None
    opcheck(linear, (x, weight, b, 0))
    expected = torch.nn.functional.linear(x, weight, b)
    assert torch.equal(linear(x, weight, b, 0), expected)
    asked: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def run(*arguments: Tensor | None) -> Tensor | None:
        asked.append(arguments)  # type: ignore[arg-type]
        return expected + 1 if len(asked) == 1 else None

    handle = Handle(run)
    assert torch.equal(linear(x, weight, b, handle.number), expected + 1)
    assert torch.equal(linear(x, weight, b, handle.number), expected)
    assert [given.data_ptr() for given in asked[0][:2]] == [x.data_ptr(), weight.data_ptr()]
    number = handle.number
    del handle, run
    assert torch.equal(linear(x, weight, b, number), expected)
    assert len(asked) == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_count(backend: str) -> None:
    """Fused gate and up, down transposed in place: the operators get the weights' own memory, not copies."""
    both = torch.nn.Parameter(torch.cat([random_weights(D, F).gate, random_weights(D, F).up]), requires_grad=False)
    weights = replace(random_weights(D, F, bias=False), gate=both[:F], up=both[F:])
    down = weights.down.T.contiguous().T
    decides = shadow(weights)

    def step(x: Tensor, widths: Tensor, least: Tensor) -> Tensor:
        parts = (both[:F], both[F:], down, None, None, None, "silu", 0)
        y = truncated_ffn(x * 2, widths, *parts)
        return selected_ffn(y, widths, least, *decides, *parts) + 1

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for widths, least in (((0, 5), 0.0), ((F, 7), 0.3), ((2, 1), 1e9)):
        arguments = (inputs(2), int32(*widths), torch.full((2,), least))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), step(*arguments))
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}


def test_an_interleaved_shadow_decides_alike() -> None:
    weights = random_weights(D, F)
    x, widths, least = inputs(3), int32(F, 20, 5), torch.full((3,), 0.2)
    codes, scales, *rest = shadow(weights)
    laid_out = LowBitMatrix(codes, scales, D, 4, F).interleave()
    y = selected_ffn(x, widths, least, laid_out.codes, laid_out.scales, *rest, *ffn(weights))
    assert torch.equal(y, selected_ffn(x, widths, least, codes, scales, *rest, *ffn(weights)))


def test_weights_are_not_copied_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    both, down = torch.randn(2 * F, D), torch.randn(F, D).T
    seen: list[tuple[int, ...]] = []
    build = library._weights

    def watched(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *rest: object) -> FFNWeights:
        seen.append((gate.data_ptr(), up.data_ptr(), down.data_ptr(), *down.stride()))
        return build(x, gate, up, down, *rest)

    monkeypatch.setattr(library, "_weights", watched)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x, widths: truncated_ffn(x + 1, widths, both[:F], both[F:], down, None, None, None, "silu", 0),
        fullgraph=True,
    )
    compiled(inputs(2), int32(3, 4))
    assert seen[-1] == (both.data_ptr(), both[F:].data_ptr(), down.data_ptr(), *down.stride())


def test_a_broken_row_stays_broken() -> None:
    weights = random_weights(D, F)
    x = inputs(2)
    x[0, 3] = float("nan")
    for y in (
        truncated_ffn(x, int32(5, 5), *ffn(weights)),
        selected_ffn(x, int32(5, 5), torch.full((2,), 1e9), *shadow(weights), *ffn(weights)),
    ):
        assert y[0].isnan().all()
        assert not y[1].isnan().any()


def test_what_cannot_be_computed_is_refused() -> None:
    weights = random_weights(D, F)
    with pytest.raises(ConfigError, match=r"`activation` must be one of silu, .*, got 'mish'"):
        truncated_ffn(inputs(1), int32(3), *ffn(weights, "mish"))
    with pytest.raises(ConfigError, match=r"in the weights' dtype torch.float32, got .* in torch.float16"):
        truncated_ffn(inputs(1, torch.float16), int32(3), *ffn(weights))


def test_a_gradient_is_refused_in_front_of_the_work() -> None:
    """PyTorch alone would warn at the backward pass, and give none."""
    weights = random_weights(D, F)
    x, least = inputs(2).requires_grad_(), torch.full((2,), 0.1)
    for call in (
        lambda: truncated_ffn(x, int32(3, 4), *ffn(weights)),
        lambda: selected_ffn(x, int32(3, 4), least, *shadow(weights), *ffn(weights)),
        lambda: linear(x, torch.randn(F, D), None, 0),
    ):
        with pytest.raises(ConfigError, match=r"define no gradient, .* call them under `torch.no_grad\(\)`"):
            call()
        with torch.no_grad():
            assert not call().requires_grad


def test_cuda_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "triton_is_installed", lambda: False)
    weights = random_weights(D, F)
    with pytest.raises(ConfigError, match="need Triton, which is not installed"):
        library._truncated_on_cuda(inputs(1), int32(3), *ffn(weights))


def test_the_cpu_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sedac_hf.ops.library import triton_is_installed, truncated_ffn as run\n"
        "x, widths = torch.ones(2, 3), torch.tensor([0, 4], dtype=torch.int32)\n"
        "y = run(x, widths, None, torch.ones(4, 3), torch.ones(3, 4), None, None, None, 'relu', 0)\n"
        "print(y.tolist(), triton_is_installed())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[0] == "[[0.0, 0.0, 0.0], [12.0, 12.0, 12.0]] False", done.stderr
