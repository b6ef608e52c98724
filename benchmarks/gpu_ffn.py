"""Time of cut FFNs on a GPU: `python benchmarks/gpu_ffn.py [--rows 1 4 16] [--json PATH]`. Needs CUDA and Triton.

NO FIGURE OF THIS SCRIPT HAS BEEN MEASURED YET: it was written where there was no GPU. On the CPU its kernels are only
shown to be right (Triton's interpreter) and to compile for sm_90; see tests/ops/test_triton.py.

One FFN of an 8B decoder, several layers of it so that no weight stays in the cache, each way in one CUDA graph:

    dense      three cuBLAS products, as the module runs them
    truncate   sedac_hf::truncated_ffn, every row cut to the share
    select     sedac_hf::selected_ffn, every row uses the share of its units by importance (up to 4 rows)

The share is changed between replays by copying into the graph's inputs; nothing is captured again. Ways and shares
take turns in every round; the figures are medians. ``needs`` is the share of the dense bytes that the cut must read
(select: the union over rows, with the shadow); eta = time saved / time that the bytes not read could save. Before
anything is timed each result is compared with masking in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.ops import FFNWeights
from sedac_hf.ops.library import selected_ffn, triton_is_installed, truncated_ffn
from sedac_hf.ops.low_bit import LowBitMatrix, importance
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS

CACHE_BYTES = 1 << 29  # weights of all layers together: several times the cache of any GPU
LARGEST_ERROR = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}

SELECT_ERROR = 2e-2  # a unit within rounding of its cut point may fall on either side


@dataclass(frozen=True)
class Layer:
    """One FFN: weights in a Linear's layout, down also by columns for `select`, and the shadow of the gate."""

    weights: FFNWeights
    down_by_columns: Tensor
    shadow: LowBitMatrix
    unit_norm: Tensor

    @classmethod
    def random(cls, d: int, f: int, dtype: torch.dtype, seed: int) -> Layer:
        g = torch.Generator("cuda").manual_seed(seed)

        def draw(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=g, device="cuda").div(columns**0.5).to(dtype)

        gate, up, down = draw(f, d), draw(f, d), draw(d, f)
        norm = up.float().norm(dim=1) * down.float().norm(dim=0)
        weights = FFNWeights(gate, up, down, None, None, None, functional.silu)
        return cls(weights, down.T.contiguous().T, LowBitMatrix.quantize(gate), norm)

    def importance(self, x: Tensor) -> Tensor:
        return importance(x, self.shadow, None, self.unit_norm, functional.silu)

    def dense(self, x: Tensor) -> Tensor:
        w = self.weights
        assert w.gate is not None
        y: Tensor = functional.linear(
            functional.silu(functional.linear(x, w.gate)) * functional.linear(x, w.up), w.down
        )
        return y

    def truncated(self, x: Tensor, widths: Tensor) -> Tensor:
        w = self.weights
        y: Tensor = truncated_ffn(x, widths, w.gate, w.up, w.down, None, None, None, "silu", 0)
        return y

    def selected(self, x: Tensor, widths: Tensor, least: Tensor) -> Tensor:
        w, deciding = self.weights, (self.shadow.codes, self.shadow.scales, None, self.unit_norm)
        y: Tensor = selected_ffn(
            x, widths, least, *deciding, w.gate, w.up, self.down_by_columns, None, None, None, "silu", 0
        )
        return y


class Captured:
    """A call in a CUDA graph; its inputs are changed in place between replays."""

    def __init__(self, call: Callable[[], list[Tensor]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles the kernels, which a capture must not
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call()

    def microseconds(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


@dataclass
class Way:
    """One line of the table: a graph, what its inputs must hold, the share of the dense bytes that it must read."""

    name: str
    share: float
    graph: Captured
    prepare: Callable[[], None]
    needs: float


def ways(layers: list[Layer], rows: int, shares: list[float]) -> list[Way]:
    """Dense, then each cut at each share, checked against float64."""
    w = layers[0].weights
    d, f, dtype = w.hidden_size, w.intermediate_size, w.up.dtype
    x = torch.randn(rows, d, device="cuda").to(dtype)
    widths = torch.full((rows,), f, dtype=torch.int32, device="cuda")
    dense = Captured(lambda: [layer.dense(x) for layer in layers])
    found = [Way("dense", 1.0, dense, lambda: None, 1.0)]
    truncate = Captured(lambda: [layer.truncated(x, widths) for layer in layers])
    for share in shares:
        width = round(share * f / 64) * 64
        way = Way("truncate", share, truncate, partial(fill, [widths], [float(width)]), width / f)
        below = torch.arange(f, device="cuda").expand(rows, f) < width
        check(way, layers, x, [below] * len(layers))
        found.append(way)
    if rows > MOST_SELECTING_ROWS:
        return found
    worth = [layer.importance(x) for layer in layers]
    whole = torch.full((rows,), f, dtype=torch.int32, device="cuda")
    least = [torch.zeros(rows, device="cuda") for _ in layers]
    select = Captured(lambda: [layer.selected(x, whole, low) for layer, low in zip(layers, least, strict=True)])
    dense_bytes = 3 * d * f * w.up.element_size()
    for share in shares:
        cut_points = [torch.quantile(importances, 1 - share, dim=1) for importances in worth]
        used = [importances >= low[:, None] for importances, low in zip(worth, cut_points, strict=True)]
        union = statistics.mean(float(chosen.any(0).float().mean()) for chosen in used)
        needs = union + layers[0].shadow.bytes / dense_bytes
        way = Way("select", share, select, partial(fill, least, cut_points), needs)
        check(way, layers, x, used)
        found.append(way)
    return found


def fill(inputs: list[Tensor], values: Sequence[Tensor | float]) -> None:
    """New values for a graph's inputs."""
    for tensor, value in zip(inputs, values, strict=True):
        tensor.copy_(torch.as_tensor(value))


def check(way: Way, layers: list[Layer], x: Tensor, used: list[Tensor]) -> None:
    """Stops where a result is not the masked one."""
    way.prepare()
    way.graph.graph.replay()
    largest = LARGEST_ERROR[x.dtype] if way.name == "truncate" else SELECT_ERROR
    for layer, y, chosen in zip(layers, way.graph.outputs, used, strict=True):
        w = layer.weights
        assert w.gate is not None
        h = functional.silu(x.double() @ w.gate.double().T) * (x.double() @ w.up.double().T) * chosen
        wanted = h @ w.down.double().T
        error = float((y.double() - wanted).norm() / wanted.norm())
        if not error <= largest:
            sys.exit(f"{way.name} at share {way.share} is wrong: relative error {error:.1e} against float64")


def measured(lines: list[Way], layers: int, rounds: int) -> list[dict[str, Any]]:
    times: list[list[float]] = [[] for _ in lines]
    for _ in range(rounds):
        for way, taken in zip(lines, times, strict=True):
            way.prepare()
            taken.append(way.graph.microseconds() / layers)
    dense = statistics.median(times[0])
    rows = []
    for way, taken in zip(lines, times, strict=True):
        time = statistics.median(taken)
        saves = 1 - way.needs
        eta = (1 - time / dense) / saves if saves > 0.01 else None
        rows.append(
            {
                "way": way.name,
                "share": way.share,
                "needs": way.needs,
                "us": time,
                "time/dense": time / dense,
                "eta": eta,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--units", type=int, default=14336)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.35, 0.25])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark times CUDA graphs and found no CUDA device: run it on a machine with an NVIDIA GPU")
    if not triton_is_installed():
        sys.exit("this benchmark times Triton kernels and Triton is not installed: pip install triton")
    dtype: torch.dtype = getattr(torch, args.dtype)
    layer_bytes = 3 * args.hidden * args.units * dtype.itemsize
    n_layers = max(2, -(-CACHE_BYTES // layer_bytes))
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "hidden": args.hidden,
        "units": args.units,
        "dtype": args.dtype,
        "layers": n_layers,
        "rounds": args.rounds,
        "rows": {},
    }
    print(f"{report['gpu']}, torch {torch.__version__}, {args.hidden} x {args.units} {args.dtype}, {n_layers} layers")
    with torch.no_grad():
        layers = [Layer.random(args.hidden, args.units, dtype, seed) for seed in range(n_layers)]
        for rows in args.rows:
            figures = measured(ways(layers, rows, args.shares), n_layers, args.rounds)
            report["rows"][rows] = figures
            print(f"\n{rows} row(s)\n  {'way':9} {'share':>6} {'needs':>6} {'us':>8} {'time/dense':>11} {'eta':>6}")
            for line in figures:
                eta = "" if line["eta"] is None else f"{line['eta']:.2f}"
                print(
                    f"  {line['way']:9} {line['share']:6.2f} {line['needs']:6.2f} {line['us']:8.1f} "
                    f"{line['time/dense']:11.3f} {eta:>6}"
                )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
