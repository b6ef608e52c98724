"""Products with down's weights that lie by units, as `select` lays them out, by number of rows.

The kernels read single units of such weights. Products of more rows than they take run by torch, whose time depends on
the layout, or in bfloat16 by a compiled product: `units/usual` is torch's time by units over torch's with the usual
layout, `ours/usual` the compiled product's, also of more rows than it is used for, for one of the three products of an
FFN. A sample goes through so many
matrices that none is in a cache.

    python benchmarks/layout.py [--shape HIDDENxUNITS] [--rows N]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from timing import about, take_turns
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops.rust_product import LEAST_ROWS, available, product

SHAPES = ("896x4864", "2048x8192")
ROWS = (1, 2, 5, 16, 32, 64, 128, 256)
LEAST_BYTES = 150e6  # of the matrices of a sample
ROUNDS = 15


def one_by_one(
    x: Tensor, weights: list[Tensor], run: Callable[[Tensor, Tensor, None], Tensor] = functional.linear
) -> Callable[[], None]:
    """All products of a sample."""

    def call() -> None:
        for weight in weights:
            run(x, weight, None)

    return call


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
    print(f"\n{'shape':>12}  {'dtype':9}{'rows':>5}{'usual, us':>11}{'units/usual':>13}{'ours/usual':>12}  n")
    lines = []
    for shape in args.shape or SHAPES:
        d, f = (int(size) for size in shape.split("x"))
        for name in args.dtype or ("float32", "bfloat16"):
            dtype = getattr(torch, name)
            count = max(2, round(LEAST_BYTES / (d * f * dtype.itemsize)))
            usual = [torch.randn(d, f).to(dtype) for _ in range(count)]
            by_units = [weight.t().contiguous().t() for weight in usual]
            for rows in args.rows or ROWS:
                x = torch.randn(rows, f).to(dtype)
                calls = {"usual": one_by_one(x, usual), "by units": one_by_one(x, by_units)}
                if available() and dtype is torch.bfloat16 and rows >= LEAST_ROWS:
                    calls["ours"] = one_by_one(x, by_units, product)
                samples = take_turns(calls, rounds=ROUNDS, seconds=args.seconds)
                times = {key: taken.median / count for key, taken in samples.items()}
                over = {key: seconds / times["usual"] for key, seconds in times.items()}
                lines.append({"shape": shape, "dtype": name, "rows": rows, "time_over_usual": over, "s": times})
                ours = f"{over['ours']:.2f}" if "ours" in over else "-"
                print(
                    f"{shape:>12}  {name:9}{rows:>5}{1e6 * times['usual']:>11.0f}{over['by units']:>13.2f}{ours:>12}"
                    f"  {samples['by units'].count}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "lines": lines}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
