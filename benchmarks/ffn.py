"""One FFN on a CPU, by every engine: `python benchmarks/ffn.py [--full] [--isa avx2] [--json FILE]`.

    python benchmarks/ffn.py                                  # 0.5B and 1B shapes, one row, under two minutes
    python benchmarks/ffn.py --shape 896x4864 --rows 1 --rows 4 --dtype bfloat16

GLU sites with SiLU and random weights. Each case has so many layers (copies of one: their values do not matter, their
memory does) that even at the least share they are several times the last-level cache, and walks through them in turn:
what is timed is memory. All cells of a case take turns in one run; figures are medians.

    us           per FFN
    time/dense   over the same FFN by torch (three products on weights as `nn.Linear` has them)
    bytes        the bound: bytes that the rows need (rows' units united, the shadow included) over those of the FFN
    GB/s         those bytes over the time
    time/read    over the time of plainly reading as many bytes in one run of memory, with the same threads
    time/same    over the time of plainly reading the same bytes where they lie: `select` reads the shadow, then a row
                 here and a row there, which memory gives more slowly than one run (the kernels' cells only)
    n            samples in which nobody else had the cores / samples taken

Cells: `rust` are the compiled kernels (whole; `select`, the share's units by a 4-bit shadow; `truncate`, the first
units), `gather`, `masked` and `strips` the engines in plain torch. Before anything is timed every cell is compared
with masking in float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import about, take_turns
from torch import Tensor
from torch.nn import functional

from sedac_hf.ffn.schedule import align_width
from sedac_hf.ffn.shadow import Shadow, unit_norms
from sedac_hf.ops import ENGINES, FFNWeights, LevelPlan, OperatingPoint, SiteCut
from sedac_hf.ops.compiled import MAX_ROWS, available, instruction_sets, read_memory, read_rows
from sedac_hf.ops.low_bit import LowBitMatrix
from sedac_hf.ops.rust_cpu import CpuFFN

SHAPES = {"896x4864": "0.5B", "2048x8192": "1B", "4096x14336": "8B"}
SHARES = (1.0, 0.75, 0.5, 0.35, 0.25)
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # a unit within rounding of its cut may fall either way
CACHES = 3  # what is read at the least share, in last-level caches
ROUNDS = 25
SLOW_LAYERS = 2  # of the engines in torch that decide by a shadow, which expand it: so many layers per sample


@dataclass(frozen=True)
class Cell:
    """One way to run the FFN; ``bytes_share`` of the dense bytes are needed."""

    engine: str
    cut: str
    share: float
    bytes_share: float
    run: Callable[[int], Tensor]
    layers_per_sample: int
    read: Callable[[int], None] | None = None  # plainly what `run` has to read


class Case:
    """Layers of one shape and dtype, and input rows."""

    def __init__(self, d: int, f: int, dtype: torch.dtype, rows: int, isa: str | None) -> None:
        self.d, self.f, self.dtype, self.n_rows, self.isa = d, f, dtype, rows, isa
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        gate, up, down, self.x = draw(f, d), draw(f, d), draw(d, f), draw(rows, d) * d**0.5
        self.bytes = 3 * d * f * dtype.itemsize
        self.n_layers = max(3, -(-int(CACHES * last_level_cache() / min(SHARES)) // self.bytes))
        self.layers = [glu(gate.clone(), up.clone(), down.clone()) for _ in range(self.n_layers)]
        # `select` wants a unit's weights of down in one run of memory, as the runtime lays them out.
        self.by_units = [glu(w.gate, w.up, down.T.contiguous().T) for w in self.layers]
        quantised = LowBitMatrix.quantize(gate)
        self.shadow = Shadow(quantised, None, unit_norms(self.layers[0]), functional.silu)
        self.shadow_share = self.shadow.bytes / self.bytes
        self.kernels, self.selecting, self.shadows = [], [], []
        for usual, by_units in zip(self.layers, self.by_units, strict=True):
            own = Shadow(quantised, None, self.shadow.unit_norm.clone(), functional.silu)
            own.interleave()  # makes memory of its own
            self.shadows.append(own)
            self.kernels.append(CpuFFN(usual, None, isa=isa))
            self.selecting.append(CpuFFN(by_units, own.tables(), isa=isa))

    def dense(self, layer: int) -> Tensor:
        w = self.layers[layer]
        return functional.linear(w.hidden(self.x), w.down)

    def read(self, layer: int) -> None:
        w = self.layers[layer]
        for matrix in (w.gate, w.up, w.down):
            assert matrix is not None
            read_memory(matrix)

    def read_first(self, width: int, layer: int) -> None:
        """The first units; down's lie at the start of each of its rows."""
        w = self.layers[layer]
        assert w.gate is not None
        read_memory(w.gate[:width])
        read_memory(w.up[:width])
        read_rows([w.down[:, :width]], torch.arange(self.d, dtype=torch.int32))

    def read_units(self, chosen: Tensor, layer: int) -> None:
        """The shadow and these units."""
        w, tables = self.by_units[layer], self.shadows[layer].tables()
        assert w.gate is not None
        assert tables is not None
        read_memory(tables.codes)
        read_memory(tables.scales)
        read_rows([w.gate, w.up, w.down.T], chosen)

    def cells(self) -> Iterator[Cell]:
        """Every engine at every share; the whole FFN by the kernels in both layouts."""
        whole = [OperatingPoint(self.f)] * self.n_rows
        yield self._by_kernel("whole", 1.0, self.kernels, whole, self.read)
        yield self._by_kernel("whole, by units", 1.0, self.selecting, whole, self.read)
        for share in SHARES[1:]:
            if share > self.shadow_share:
                point = OperatingPoint(self.f, self._importance(share - self.shadow_share))
                chosen = self.used(point).any(dim=0).nonzero().flatten().to(torch.int32)
                read = partial(self.read_units, chosen)
                yield self._by_kernel("select", share, self.selecting, [point] * self.n_rows, read)
                engine = "gather" if self.n_rows == 1 else "masked"
                yield from self._by_torch(dict.fromkeys([engine, "masked"]), "select", share, point, self.by_units)
            point = OperatingPoint(align_width(share * self.f, self.f))
            read = partial(self.read_first, point.width)
            yield self._by_kernel("truncate", share, self.kernels, [point] * self.n_rows, read)
            yield from self._by_torch(["strips"], "truncate", share, point, self.layers)

    def _by_kernel(
        self,
        cut: str,
        share: float,
        kernels: list[CpuFFN],
        points: list[OperatingPoint],
        read: Callable[[int], None],
    ) -> Cell:
        units = kernels[0].run(self.x, points)[2]
        needed = units / self.f + (self.shadow_share if cut == "select" else 0)
        return Cell("rust", cut, share, needed, lambda i: kernels[i].run(self.x, points)[0], self.n_layers, read)

    def _by_torch(
        self, engines: Any, cut: str, share: float, point: OperatingPoint, layers: list[FFNWeights]
    ) -> Iterator[Cell]:
        used = self.used(point)
        needed = float(used.any(dim=0).double().mean()) + (self.shadow_share if cut == "select" else 0)
        for engine in engines:
            run = partial(self._cut_by_torch, engine, point, layers)
            yield Cell(engine, cut, share, needed, run, SLOW_LAYERS if cut == "select" else self.n_layers)

    def _cut_by_torch(self, engine: str, point: OperatingPoint, layers: list[FFNWeights], layer: int) -> Tensor:
        cut = SiteCut(
            points=(OperatingPoint(0), point, OperatingPoint(self.f)),
            plan=LevelPlan.same(self.n_rows, 1, 2),
            importance=self.shadow.importance if point.importance_min else None,
            compensation=None,
            engine=engine,
            record=lambda **_: None,
        )
        return ENGINES[engine](self.x, layers[layer], cut)

    def _importance(self, units: float) -> float:
        """Importance above which this share of the units lies, over all rows."""
        return float(self.shadow.importance(self.x).flatten().double().quantile(1 - units))

    def used(self, point: OperatingPoint) -> Tensor:
        """bool [rows, f]: the units that each row uses."""
        inside = (torch.arange(self.f) < point.width).expand(self.n_rows, -1)
        return inside & (self.shadow.importance(self.x) >= point.importance_min) if point.importance_min else inside

    def check(self, cells: list[Cell]) -> None:
        """Stop if a cell gives another result than masking in float64."""
        w, x = self.layers[0], self.x.double()
        hidden = functional.silu(x @ w.gate.double().T) * (x @ w.up.double().T)  # type: ignore[union-attr]
        for cell in cells:
            point = OperatingPoint(self.f)
            if cell.cut == "select":
                point = OperatingPoint(self.f, self._importance(cell.share - self.shadow_share))
            elif cell.cut == "truncate":
                point = OperatingPoint(align_width(cell.share * self.f, self.f))
            expected = (hidden * self.used(point)) @ w.down.double().T
            error = float((cell.run(0).double() - expected).norm() / expected.norm())
            if not error < LARGEST_ERROR[self.dtype]:
                raise SystemExit(f"{cell.engine} {cell.cut} {cell.share:.0%} is wrong: relative error {error:.1e}")


def glu(gate: Tensor | None, up: Tensor, down: Tensor) -> FFNWeights:
    return FFNWeights(gate, up, down, None, None, None, functional.silu)


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not tell."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def in_turn(run: Callable[[int], object], n_layers: int, per_sample: int) -> Callable[[], None]:
    """Each call runs the next ``per_sample`` layers."""
    turns = itertools.cycle(range(n_layers))

    def call() -> None:
        for _ in range(per_sample):
            run(next(turns))

    return call


@torch.no_grad()
def measured(case: Case, seconds: float) -> list[dict[str, Any]]:
    """One line of the table per cell, from one interleaved run."""
    cells = list(case.cells())
    case.check(cells)
    n = case.n_layers
    calls = {"dense": in_turn(case.dense, n, n), "read": in_turn(case.read, n, n)}
    calls |= {str(i): in_turn(cell.run, n, cell.layers_per_sample) for i, cell in enumerate(cells)}
    calls |= {f"read {i}": in_turn(cell.read, n, n) for i, cell in enumerate(cells) if cell.read is not None}
    samples = take_turns(calls, rounds=ROUNDS, seconds=seconds)
    dense, read = samples["dense"].median / n, samples["read"].median / n

    def line(name: str, cut: str, share: float, bytes_share: float, key: str, layers: int) -> dict[str, Any]:
        time = samples[key].median / layers
        same = samples[f"read {key}"].median / n if f"read {key}" in samples else None
        return {
            "engine": name,
            "cut": cut,
            "share": share,
            "us": 1e6 * time,
            "time_over_dense": time / dense,
            "bytes_share": bytes_share,
            "gb_per_s": bytes_share * case.bytes / time / 1e9,
            "time_over_read": time / (bytes_share * read),
            "time_over_same": None if same is None else time / same,
            "samples": samples[key].to_dict(),
            "n": samples[key].count,
        }

    lines = [line("torch", "dense", 1.0, 1.0, "dense", n), line("read", "", 1.0, 1.0, "read", n)]
    return lines + [
        line(cell.engine, cell.cut, cell.share, cell.bytes_share, str(i), cell.layers_per_sample)
        for i, cell in enumerate(cells)
    ]


def print_table(title: str, lines: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    print(
        f"  {'engine':8}{'cut':17}{'share':>6}{'us':>9}{'time/dense':>12}{'bytes':>8}{'GB/s':>7}{'time/read':>11}"
        f"{'time/same':>11}  n"
    )
    for row in lines:
        same = "-" if row["time_over_same"] is None else f"{row['time_over_same']:.2f}"
        print(
            f"  {row['engine']:8}{row['cut']:17}{row['share']:>6.0%}{row['us']:>9.0f}{row['time_over_dense']:>12.3f}"
            f"{row['bytes_share']:>8.3f}{row['gb_per_s']:>7.1f}{row['time_over_read']:>11.2f}{same:>11}  {row['n']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", action="append", help=f"HIDDENxUNITS; default: the first two of {', '.join(SHAPES)}"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--rows", type=int, action="append", help=f"default: 1; at most {MAX_ROWS}")
    parser.add_argument("--full", action="store_true", help="all shapes (the 8B one takes 6 GB), and rows 1, 2 and 4")
    parser.add_argument("--isa", choices=instruction_sets(), help="make the kernels use this instruction set")
    parser.add_argument("--seconds", type=float, default=18.0, help="at most so many per case")
    parser.add_argument("--threads", type=int, help="torch's, which are the kernels' too")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if not available():
        raise SystemExit("this benchmark needs the compiled module sedac_hf._rust: pip install .")
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = {**about(), "kernels": args.isa or instruction_sets()[0], "last-level cache": last_level_cache()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    cases = []
    for shape in args.shape or list(SHAPES)[: None if args.full else 2]:
        d, f = (int(size) for size in shape.split("x"))
        for dtype in args.dtype or ("float32", "bfloat16"):
            for rows in args.rows or ((1, 2, 4) if args.full else (1,)):
                case = Case(d, f, getattr(torch, dtype), rows, args.isa)
                lines = measured(case, args.seconds)
                print_table(f"{shape}, {dtype}, {rows} row(s), {case.n_layers} layers", lines)
                cases.append({"shape": shape, "dtype": dtype, "rows": rows, "layers": case.n_layers, "cells": lines})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
