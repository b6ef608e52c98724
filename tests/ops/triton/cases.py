"""Cases and checks for the Triton engines, run in Triton's interpreter: TRITON_INTERPRET=1 before triton is imported.

`Engines.load` also takes changed copies of the kernels' sources, so that the checks can be checked.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sedac_hf.ops.triton
from sedac_hf.ops import FFNWeights, OperatingPoint, SiteCut
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.contract import ShadowTables
from sedac_hf.ops.low_bit import GROUP, LowBitMatrix, importance, int8_rows
from sedac_hf.ops.triton.launch import Launch
from tests.cut_cases import assert_as_good_as_plain, random_weights, site_cut
from tests.ops.triton.memory import Watch, watched

SOURCES = Path(sedac_hf.ops.triton.__file__).parent
FILES = ("tiles", "down", "truncate", "select")

# Small tiles, so that small sizes have many of them, ragged ends and idle programs. Order as in `Launch`.
NARROW = Launch(4, 8, 16, 16, 4, 3, 4, 1, 4, 1)
WIDE_STEPS = Launch(4, 4, 32, 16, 16, 2, 4, 1, 4, 1)
ONE_SPLIT = Launch(2, 16, 16, 16, 8, 1, 4, 1, 4, 1)
LONG_ROWS = Launch(4, 8, 512, 512, 16, 1, 4, 1, 4, 1)


@dataclass(frozen=True)
class Case:
    """One FFN and its tokens: ``widths``, also beyond the FFN's units; ``shares`` of units by importance, or None."""

    widths: tuple[int, ...]
    shares: tuple[float, ...] | None = None
    d: int = 21
    f: int = 29
    gated: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    layout: str = "linear"  # or "columns" (down transposed in place), "fused" (gate and up are views), "conv1d"
    launch: Launch | None = NARROW
    seed: int = 0

    def weights(self) -> FFNWeights:
        w = random_weights(self.d, self.f, gated=self.gated, bias=self.bias, dtype=self.dtype, seed=self.seed)
        w = replace(w, activation=KNOWN[self.activation])
        if self.layout == "fused":
            both = torch.cat([w.gate, w.up])
            w = replace(w, gate=both[: self.f], up=both[self.f :])
        if self.layout == "conv1d":
            w = replace(w, up=w.up.T.contiguous().T, gate=None if w.gate is None else w.gate.T.contiguous().T)
        if self.layout in ("columns", "conv1d"):
            w = replace(w, down=w.down.T.contiguous().T)
        return w

    def x(self) -> Tensor:
        g = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(len(self.widths), self.d, generator=g).to(self.dtype)


@dataclass(frozen=True)
class Problem:
    """A case drawn: inputs, weights, what decides, and the cut for the reference."""

    x: Tensor
    widths: Tensor
    weights: FFNWeights
    cut: SiteCut
    least: Tensor
    shadow: tuple[Tensor, Tensor, Tensor | None, Tensor]
    worth: Tensor

    @classmethod
    def of(cls, case: Case) -> Problem:
        w, x = case.weights(), case.x()
        rows, bias = (w.up, w.up_bias) if w.gate is None else (w.gate, w.gate_bias)
        bias = None if bias is None else bias.float()
        matrix = LowBitMatrix.quantize(rows)
        norm = torch.rand(case.f, generator=torch.Generator().manual_seed(case.seed + 2)) + 0.5

        def decide(tokens: Tensor) -> Tensor:
            return importance(tokens, matrix, bias, norm, w.activation)

        worth = decide(x)
        least = [0.0] * len(case.widths)
        if case.shares is not None:
            least = [between(row, share) for row, share in zip(worth, case.shares, strict=True)]
        clipped = [min(max(width, 0), case.f) for width in case.widths]
        points = (OperatingPoint(0), *map(OperatingPoint, clipped, least))
        cut = site_cut(range(1, len(points)), points, importance=decide)
        shadow = (matrix.codes, matrix.scales, bias, norm)
        return cls(x, torch.tensor(case.widths, dtype=torch.int32), w, cut, torch.tensor(least), shadow, worth)

    def used(self) -> Tensor:
        """bool [n, f]: the units of each token."""
        return (torch.arange(self.worth.shape[1]) < self.widths[:, None]) & (self.worth >= self.least[:, None])


def between(worth: Tensor, share: float) -> float:
    """A minimum that about ``share`` of the units reach, in the widest gap nearby: rounding does not move a unit over
    it."""
    if share >= 1:
        return 0.0
    falling = worth.sort(descending=True).values
    place = min(int(share * len(falling)), len(falling) - 2)
    near = range(max(0, place - 2), min(len(falling) - 1, place + 3))
    best = max(near, key=lambda i: float(falling[i] - falling[i + 1]))
    return float((falling[best] + falling[best + 1]) / 2) if share > 0 else float(falling[0]) * 2


@dataclass(frozen=True)
class Engines:
    """The two engines, from the package's sources or from changed ones."""

    modules: dict[str, Any]

    @classmethod
    def load(cls, folder: Path | None = None) -> Engines:
        """From ``folder`` where given: copies of `FILES` there take the place of the package's."""
        names = [f"sedac_hf.ops.triton.{name}" for name in FILES]
        if folder is None:
            return cls({name: importlib.import_module(f"sedac_hf.ops.triton.{name}") for name in FILES})
        kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
        try:
            for name, file in zip(names, FILES, strict=True):
                spec = importlib.util.spec_from_file_location(name, folder / f"{file}.py")
                assert spec is not None
                assert spec.loader is not None
                sys.modules[name] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[name])
            return cls({file: sys.modules[name] for name, file in zip(names, FILES, strict=True)})
        finally:
            for name in names:
                sys.modules.pop(name, None)
            sys.modules.update(kept)

    def run(self, case: Case, problem: Problem) -> Tensor:
        """The result; every access of memory is checked before it is made."""
        return self.watched_run(case, problem)[0]

    def watched_run(self, case: Case, problem: Problem) -> tuple[Tensor, Watch]:
        w = problem.weights
        matrices = (w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias)
        with watched(problem.x, problem.widths, problem.least, *problem.shadow, *matrices) as watch:
            return self._run(case, problem), watch

    def _run(self, case: Case, problem: Problem) -> Tensor:
        common = (problem.weights, case.activation, case.launch)
        if case.shares is None:
            return self.modules["truncate"].truncated(problem.x, problem.widths, *common)
        select = self.modules["select"]
        shadow = ShadowTables(*problem.shadow)
        return select.selected(problem.x, problem.widths, problem.least, shadow, *common)


def check(engines: Engines, case: Case, *, twice: bool = True) -> None:
    """The case gives what masking gives, reads no memory that it should not, and the same bits again."""
    problem = Problem.of(case)
    y, watch = engines.watched_run(case, problem)
    assert_as_good_as_plain(y, problem.x, problem.weights, problem.cut)
    check_reads(case, problem, watch)
    if twice:
        assert torch.equal(engines.run(case, problem), y), "two runs differ"


def check_reads(case: Case, problem: Problem, watch: Watch) -> None:
    """Rows of gate and up are read where some token uses them, and so are columns of down that lie in one piece."""
    w, used = problem.weights, problem.used()
    launch = case.launch
    if launch is None or case.layout == "conv1d":
        return

    def touched(tensor: Tensor, of_unit: Callable[[Tensor, int], Tensor]) -> Tensor:
        read = watch.add_input(tensor)
        base = tensor.untyped_storage().data_ptr()
        cells = (of_unit(tensor, j) for j in range(case.f))
        return torch.tensor([bool(read[cell.data_ptr() - base]) for cell in cells])

    chosen = used.any(0) if case.shares is not None else torch.arange(case.f) < int(problem.widths.max())
    for matrix in (w.gate, w.up):
        if matrix is not None:
            assert torch.equal(touched(matrix, lambda t, j: t[j, 0]), chosen), "other rows were read than were chosen"
    if case.layout == "columns":
        columns = touched(w.down, lambda t, j: t[0, j])
        assert not (columns & ~chosen).any(), "columns were read that nobody chose"
        if case.activation == "silu":  # others are exactly 0 for some units, whose columns need not be read
            assert torch.equal(columns, chosen)


BASE = Case((29, 13, 0, 7, 20))
SELECT = Case((29, 29, 20), (0.5, 0.2, 0.7), layout="columns")
TRUNCATE_CASES: tuple[Case, ...] = (
    BASE,
    replace(BASE, gated=False, activation="gelu", layout="conv1d", widths=(29, 9), seed=5),
    replace(BASE, launch=WIDE_STEPS, layout="fused", widths=(3, 17, 29, 29, 1, 0), seed=1),
    replace(BASE, launch=ONE_SPLIT, layout="columns", widths=(2, 21, 5), seed=2),
    replace(BASE, widths=(0, 0, 0)),
    replace(BASE, widths=(0,), launch=ONE_SPLIT),
    replace(BASE, widths=(1,), layout="columns", d=1, f=1),
    replace(BASE, widths=(40, -3, 28), layout="columns"),  # beyond the FFN's units
    replace(BASE, dtype=torch.bfloat16, layout="columns", seed=3),
    replace(BASE, dtype=torch.float16, layout="fused", bias=False, seed=4),
    replace(BASE, layout="conv1d", launch=WIDE_STEPS, widths=(9, 2), seed=6),
    replace(BASE, widths=(5, 3, 2, 1), launch=WIDE_STEPS, d=64, f=48, seed=8),
    replace(BASE, widths=(4, 33, 12, 40, 8, 0, 16, 1, 21), d=16, f=40, seed=9),
    *(
        replace(BASE, widths=(14,), activation=name, gated=i % 2 == 0, bias=False, seed=i)
        for i, name in enumerate(KNOWN)
    ),
    replace(BASE, widths=(31, 64, 40), d=96, f=64, launch=None, dtype=torch.bfloat16),  # the launch that a GPU gets
)
SELECT_CASES: tuple[Case, ...] = (
    SELECT,
    replace(SELECT, activation="relu", bias=False, widths=(29, 23), shares=(1.0, 0.4), seed=8),
    replace(SELECT, layout="linear", widths=(29,), shares=(0.3,), seed=1),
    replace(
        SELECT, d=130, layout="fused", widths=(29, 24, 29, 9), shares=(0.1, 0.5, 1.0, 0.4), launch=LONG_ROWS, seed=2
    ),
    replace(SELECT, widths=(29, 29), shares=(0.0, 0.3), launch=WIDE_STEPS, seed=3),
    replace(SELECT, widths=(0,), shares=(0.5,)),
    replace(SELECT, widths=(50, 29), shares=(1.0, 0.6), launch=ONE_SPLIT, d=64, seed=4),
    replace(SELECT, dtype=torch.bfloat16, seed=5),
    replace(SELECT, dtype=torch.float16, bias=False, layout="linear", seed=6),
    replace(SELECT, gated=False, activation="gelu", layout="conv1d", widths=(29,), shares=(0.6,), seed=7),
    replace(SELECT, d=1100, f=10, widths=(10, 7), shares=(0.5, 0.5), launch=LONG_ROWS, seed=9),  # steps of the shadow
    replace(SELECT, widths=(31, 64), shares=(0.5, 0.3), d=96, f=64, launch=None, dtype=torch.bfloat16),
)


def check_rounding(engines: Engines) -> None:
    """The rounding of x is `int8_rows`' bit for bit: halves to even, zero rows, many magnitudes, odd sizes; a row that
    is not finite has a NaN scale."""
    module = engines.modules["select"]
    for d in (1, 63, 150):
        g = torch.Generator().manual_seed(d)
        x = torch.randn(4, d, generator=g) * torch.tensor([[1.0], [1e-30], [1e30], [0.0]])
        x[0] = torch.randint(-254, 255, (d,), generator=g) / 2  # halves
        x[0, 0] = 127.0
        with watched(x):
            codes, sums, scales = module.rounded(x)
        wanted = int8_rows(x)
        assert torch.equal(codes[:, :d].float(), wanted.codes)
        assert not codes[:, d:].any()
        assert torch.equal(scales, wanted.scale[:, 0])
        assert torch.equal(sums, codes.view(4, -1, GROUP).sum(2, dtype=torch.int32))
        x[:2, -1] = torch.tensor([float("nan"), float("-inf")])
        with watched(x):
            assert module.rounded(x)[2].isnan().tolist() == [True, True, False, False]


def check_broken_rows(engines: Engines, case: Case) -> None:
    """A row with a NaN or an inf uses all units of its width, so it stays broken; its neighbours do not notice. Nor
    does a row notice a broken unit that it does not use."""
    problem = Problem.of(case)
    healthy = engines.run(case, problem)
    for value in (float("nan"), float("inf")):
        x = problem.x.clone()
        x[0, 1] = value
        y = engines.run(case, replace(problem, x=x))
        assert y[0].isnan().all(), "a broken row looks healthy"
        assert torch.equal(y[1:], healthy[1:]), "a neighbour of a broken row changed"
    unit = int((problem.used()[0] & ~problem.used()[2]).nonzero()[0])
    problem.weights.up[unit] = float("inf")
    assert torch.equal(engines.run(case, problem)[2], healthy[2]), "an unused unit is noticed"


def check_neighbours(engines: Engines, case: Case) -> None:
    """A token's bits are the same whatever its neighbours are, and alone."""
    problem = Problem.of(case)
    y = engines.run(case, problem)
    n = len(case.widths)
    for kept in range(n):
        x, widths, least = torch.randn_like(problem.x), problem.widths.flip(0).clone(), problem.least.flip(0).clone()
        x[kept], widths[kept], least[kept] = problem.x[kept], problem.widths[kept], problem.least[kept]
        others = replace(problem, x=x, widths=widths, least=least)
        assert torch.equal(engines.run(case, others)[kept], y[kept]), "bits depend on the neighbours"
        one = slice(kept, kept + 1)
        alone = replace(problem, x=problem.x[one], widths=problem.widths[one], least=problem.least[one])
        assert torch.equal(engines.run(case, alone)[0], y[kept]), "bits depend on the batch"
