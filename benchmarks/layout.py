"""Products of FFNs by number of rows: how down's weights lie, and which operand is repacked.

    python benchmarks/layout.py [--shape HIDDENxUNITS] [--rows N]

Down alone, one of the three products of an FFN: the kernels read single units of weights that lie by units, as
`select` lays them out; products of more rows than they take run by torch, whose time depends on the layout, or in
bfloat16 by a compiled product, also timed with more rows than it is used for.

    units, ours      torch's product by units, and the compiled one, over torch's with the usual layout

The whole FFN (GLU, SiLU), in bfloat16: `sedac_hf.ops.strips.columns` has one column per token, so that oneDNN repacks
tokens instead of weights.

    columns          over the FFN by rows, as modules run it
    rows, units      by rows, down's weights by units
    columns, units   by columns, down's weights by units

A sample goes through so many matrices that none is in a cache of up to 150 MB. All of a line take turns in one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import about, take_turns
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.rust_product import LEAST_ROWS, available, product
from sedac_hf.ops.strips.columns import down_by_columns, hidden_by_columns, may_pay

SHAPES = ("896x4864", "2048x8192")
ROWS = (1, 2, 5, 16, 32, 64, 128, 256)
LEAST_BYTES = 150e6  # of the matrices of a sample
ROUNDS = 15

Runs = dict[str, Callable[[int], object]]  # what is timed, called with the number of a layer


class Layers:
    """FFNs of one shape, down's weights in both layouts."""

    def __init__(self, d: int, f: int, dtype: torch.dtype) -> None:
        self.d, self.f, self.dtype = d, f, dtype
        self.count = max(2, round(LEAST_BYTES / (d * f * dtype.itemsize)))
        self.usual = [self._ffn() for _ in range(self.count)]
        self.by_units = [replace(w, down=w.down.t().contiguous().t()) for w in self.usual]

    def _ffn(self) -> FFNWeights:
        gate, up, down = (torch.randn(*size).to(self.dtype) for size in ((self.f, self.d),) * 2 + ((self.d, self.f),))
        return FFNWeights(gate, up, down, None, None, None, functional.silu)

    def down(self, rows: int) -> Runs:
        x = torch.randn(rows, self.f).to(self.dtype)
        runs: Runs = {
            "usual": lambda i: functional.linear(x, self.usual[i].down),
            "units": lambda i: functional.linear(x, self.by_units[i].down),
        }
        if available() and self.dtype is torch.bfloat16 and rows >= LEAST_ROWS:
            runs["ours"] = lambda i: product(x, self.by_units[i].down, None)
        return runs

    def whole(self, rows: int) -> Runs:
        """Nothing where the order is not to be had."""
        if not may_pay(rows, self.usual[0].up):
            return {}
        x = torch.randn(rows, self.d).to(self.dtype)
        return {
            "usual": lambda i: by_rows(x, self.usual[i]),
            "columns": lambda i: by_columns(x, self.usual[i]),
            "rows, units": lambda i: by_rows(x, self.by_units[i]),
            "columns, units": lambda i: by_columns(x, self.by_units[i]),
        }


def by_rows(x: Tensor, weights: FFNWeights) -> Tensor:
    return functional.linear(weights.hidden(x), weights.down)


def by_columns(x: Tensor, weights: FFNWeights) -> Tensor:
    return down_by_columns(hidden_by_columns(x, weights, weights.intermediate_size), weights)


def all_of(run: Callable[[int], object], count: int) -> None:
    for i in range(count):
        run(i)


@torch.no_grad()
def line(runs: Runs, count: int, seconds: float) -> dict[str, Any]:
    """Medians of one interleaved run."""
    calls = {name: partial(all_of, run, count) for name, run in runs.items()}
    samples = take_turns(calls, rounds=ROUNDS, seconds=seconds)
    times = {name: taken.median / count for name, taken in samples.items()}
    return {
        "s": times,
        "time_over_usual": {name: time / times["usual"] for name, time in times.items()},
        "n": samples["usual"].count,
    }


def show(what: str, columns: Sequence[str], lines: list[dict[str, Any]]) -> None:
    names = "".join(f"{name:>16}" for name in columns)
    print(f"\n{what:>12}  {'dtype':9}{'rows':>5}{'usual, us':>11}{names}  n")
    for each in lines:
        if each["what"] == what:
            over, usual = each["time_over_usual"], 1e6 * each["s"]["usual"]
            cells = "".join(f"{over[name]:>16.2f}" if name in over else f"{'-':>16}" for name in columns)
            print(f"{each['shape']:>12}  {each['dtype']:9}{each['rows']:>5}{usual:>11.0f}{cells}  {each['n']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help=f"HIDDENxUNITS; default: {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--rows", type=int, action="append", help=f"default: {', '.join(map(str, ROWS))}")
    parser.add_argument("--seconds", type=float, default=6.0, help="at most so many per line")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    machine = about()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    lines = []
    for shape in args.shape or SHAPES:
        d, f = (int(size) for size in shape.split("x"))
        for name in args.dtype or ("float32", "bfloat16"):
            layers = Layers(d, f, getattr(torch, name))
            for rows in args.rows or ROWS:
                for what, runs in (("down", layers.down(rows)), ("whole FFN", layers.whole(rows))):
                    if runs:
                        figures = line(runs, layers.count, args.seconds)
                        lines.append({"what": what, "shape": shape, "dtype": name, "rows": rows, **figures})
    show("down", ("units", "ours"), lines)
    show("whole FFN", ("columns", "rows, units", "columns, units"), lines)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
