"""FFNs with a compiled kernel, for tests: weights in several layouts, a real shadow, thresholds away from ties."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from hypothesis import reject
from torch import Tensor

from sedac_hf.ffn.shadow import Shadow, unit_norms
from sedac_hf.ops import FFNWeights, OperatingPoint, SiteCut, cut_ffn
from sedac_hf.ops import threads as threads_module
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.low_bit import LowBitMatrix
from sedac_hf.ops.rust_cpu import CpuFFN
from tests.cut_cases import Recorder, TableCompensation, level_plan, random_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "columns", "fused"]


def laid_out(weights: FFNWeights, layout: str) -> FFNWeights:
    """Down's columns as runs of memory, or gate and up as two halves of one matrix."""
    if layout == "columns":
        return replace(weights, down=weights.down.T.contiguous().T)
    if layout == "fused" and weights.gate is not None:
        both = torch.cat((weights.gate, weights.up))
        f = weights.intermediate_size
        weights = replace(weights, gate=both[:f], up=both[f:])
        if weights.gate_bias is not None and weights.up_bias is not None:
            biases = torch.cat((weights.gate_bias, weights.up_bias))
            weights = replace(weights, gate_bias=biases[:f], up_bias=biases[f:])
    return weights


def shadow_of(weights: FFNWeights) -> Shadow:
    rows, bias = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
    bias = None if bias is None else bias.detach().float().clone()
    shadow = Shadow(LowBitMatrix.quantize(rows), bias, unit_norms(weights), weights.activation)
    shadow.interleave()
    return shadow


def between(values: Tensor, share: float) -> float:
    """A threshold that about ``share`` of the values reach, in the widest gap nearby: no value is within rounding."""
    ordered = values.flatten().sort().values
    middle = int((1 - share) * (len(ordered) - 1))
    near = ordered[max(0, middle - 24) : middle + 25]
    if len(near) < 2:
        return float(ordered[0]) / 2
    gaps = near.diff()
    if float(gaps.max()) <= 2e-5 * float(ordered[-1]):
        reject()  # no threshold here is away from all values
    at = int(gaps.argmax())
    return float((near[at] + near[at + 1]) / 2)


@dataclass
class Case:
    weights: FFNWeights
    shadow: Shadow | None
    points: tuple[OperatingPoint, ...]
    x: Tensor
    compensation: TableCompensation | None
    kernel: CpuFFN

    def cut(self, levels: list[int], record: Recorder | None = None) -> SiteCut:
        importance = None if self.shadow is None else self.shadow.importance
        plan = level_plan(levels)
        return SiteCut(self.points, plan, importance, self.compensation, "rust", record or Recorder(), self.kernel)

    def run(self, levels: list[int], rows: slice = slice(None)) -> Tensor:
        return cut_ffn(self.x[rows], self.weights, self.cut(levels[rows]))


def case(
    d: int, f: int, rows: int, *, selects: bool = True, narrows: bool = False, gated: bool = True, bias: bool = True,
    dtype: torch.dtype = torch.float32, activation: str = "silu", layout: str = "columns", compensates: bool = False,
    share: float = 0.5, isa: str | None = None, seed: int = 0,
) -> Case:  # fmt: skip
    weights = random_weights(d, f, gated=gated, bias=bias, dtype=dtype, seed=seed)
    weights = laid_out(replace(weights, activation=KNOWN[activation]), layout)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(rows, d, generator=generator).to(dtype)
    shadow = shadow_of(weights) if selects else None
    widths = [f * level // 8 if narrows or not selects else f for level in range(8)]
    least = [0.0] * 8
    if shadow is not None:
        importance = shadow.importance(x)
        least = [0.0, *(between(importance, share * level / 8) for level in range(1, 8))]
    points = (*map(OperatingPoint, widths, least), OperatingPoint(f))
    compensation = None
    if compensates:
        pair = (torch.randn(d, 2, generator=generator) / 4, torch.randn(2, points[5].width, generator=generator) / 4)
        compensation = TableCompensation(torch.randn(9, d, generator=generator), {5: pair})
    tables = None if shadow is None else shadow.tables()
    return Case(weights, shadow, points, x, compensation, CpuFFN(weights, tables, isa=isa))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_threads(*, active: bool = True) -> Iterator[None]:
    """Kernels on a pool of their own, as where torch's runtime can't be entered."""
    if not active:
        yield
        return
    from sedac_hf import _rust

    address = threads_module.parallel_address
    real = address()
    threads_module.parallel_address = lambda: 0
    _rust.set_openmp(0)
    try:
        yield
    finally:
        threads_module.parallel_address = address
        _rust.set_openmp(real)
