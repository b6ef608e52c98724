"""Cost of the controller: `python benchmarks/controller.py [--json PATH]`.

One run, the engines taking turns in every round, medians over the rounds. Compared are the compiled engine, the NumPy
oracle and plain Python: a per-token loop for the law, `sedac_hf.ops.strips.plan` for where strips are cut (one plan of
an FFN of the 0.5B shape, by the table of times that is measured first; it has no part in NumPy). Before anything is
timed the first two must give the same levels and both planners the same strips; the loop, which reckons in float64,
the same levels but for one in 10,000.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sedac_hf.control import Controller, make_controller, strip_planner
from sedac_hf.layer_config import LayerConfig
from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.strips.costs import cost_table
from sedac_hf.ops.strips.plan import PythonStripPlanner, StripPlanner

LAYERS = [LayerConfig(3, 0.2, 0.8, 0.3), LayerConfig(6, 0.5, 1.0, 0.4), LayerConfig(9, 0.8, 1.2, 0.3)]
LOOP_TOKENS = 20_000
"""The per-token loop is timed on so many and scaled: its cost per token does not depend on their number."""

HIDDEN_SIZE, UNITS = 896, 4864
STRIP_TOKENS = (512, 2048)


def per_token_loop(controller: Controller, risk: np.ndarray) -> list[list[int]]:
    """The law token by token; float32 by way of NumPy scalars would be slower still, so Python floats."""
    cuts = controller.cut_points.tolist()[1:]
    layers = list(zip(controller.layer_configs, controller.thresholds.tolist(), strict=True))
    levels = []
    for risks in risk.T.tolist():
        confidence, answers = 0.0, []
        for (config, threshold), value in zip(layers, risks, strict=True):
            confidence *= controller.confidence_decay
            confidence += config.confidence_weight * max((threshold - max(value, 0.0)) / threshold, -1e6)
            level = controller.n_levels
            if confidence >= config.target_exit_rate:
                level -= sum(confidence >= cut for cut in cuts)
            answers.append(level)
        levels.append(answers)
    return levels


def one_pass(controller: Controller, risk: np.ndarray) -> Callable[[], None]:
    def run() -> None:
        state = controller.begin(risk.shape[1])
        for i in range(len(risk)):
            controller.step(state, i, risk[i])

    return run


def strip_planners() -> dict[str, StripPlanner]:
    """Both planners, over the times of a gated float32 FFN on this machine."""
    generator = torch.Generator().manual_seed(0)
    gate, up, down = (
        torch.randn(shape, generator=generator) * 0.02
        for shape in ((UNITS, HIDDEN_SIZE), (UNITS, HIDDEN_SIZE), (HIDDEN_SIZE, UNITS))
    )
    table = cost_table(FFNWeights(gate, up, down, None, None, None, torch.nn.functional.silu))
    print(f"strips are cut by {table.origin} costs: {table.key}")
    classes = {"rust": strip_planner("rust"), "plain": PythonStripPlanner}
    return {name: table.planner("whole", planner_class) for name, planner_class in classes.items()}


def ends_of(levels: np.ndarray, n_levels: int) -> list[tuple[int, int]]:
    """(width, row after the last token of it) of a batch with these levels, widths in proportion, the widest first."""
    counts = np.bincount(levels, minlength=n_levels + 1)[::-1]
    rows = np.cumsum(counts).tolist()
    widths = range(UNITS, -1, -UNITS // n_levels)
    return [(width, row) for width, row, count in zip(widths, rows, counts, strict=True) if count]


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def measure(cases: dict[str, tuple[Callable[[], Any], int]], rounds: int) -> dict[str, float]:
    """Median seconds per call; each case is (call, calls per round), and every round runs every case."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (call, calls) in cases.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_cost(controller: Controller, n_tokens: int, calls: int) -> Callable[[], float]:
    """Seconds of one `step` alone: passes are begun beforehand."""
    risk = np.full(n_tokens, 0.3, np.float32)

    def run() -> float:
        states = [controller.begin(n_tokens) for _ in range(calls)]
        start = time.perf_counter()
        for state in states:
            controller.step(state, 0, risk)
        return (time.perf_counter() - start) / calls

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of the throughput part")
    args = parser.parse_args()

    rust, python = (make_controller(LAYERS, controller=engine) for engine in ("rust", "python"))
    rng = np.random.default_rng(0)
    risk = rng.random((len(LAYERS), args.tokens), np.float32) * np.float32(1.5)
    few = np.ascontiguousarray(risk[:, :LOOP_TOKENS])
    levels = rust.evaluate_batch(risk).levels
    np.testing.assert_array_equal(levels, python.evaluate_batch(risk).levels)
    same = np.mean(levels[:, : few.shape[1]] == np.array(per_token_loop(rust, few)).T)
    assert same > 0.9999, f"the loop (float64) agrees on {same:.4%} of the levels only"

    planners = strip_planners()
    batches = {n: ends_of(rng.integers(1, rust.n_levels + 1, n), rust.n_levels) for n in STRIP_TOKENS}
    for ends in batches.values():
        in_rust, in_python = (list(map(tuple, planner.strips(ends))) for planner in planners.values())
        assert in_rust == in_python, f"the planners cut {ends} differently: {in_rust} and {in_python}"

    engines = {"rust": rust, "numpy": python}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            steps[name].append(step_cost(engine, 1, 1000)())
    one = np.ascontiguousarray(risk[:, :1])
    samples = risk[0, :256].copy()
    small = measure(
        {
            **{f"pass/{name}": (one_pass(engine, one), 500) for name, engine in engines.items()},
            "pass/plain": (lambda: per_token_loop(rust, one), 500),
            **{f"plan_1/{n}": (lambda e=e: e.plan(levels[0, :1]), 500) for n, e in engines.items()},
            **{f"plan_1000/{n}": (lambda e=e: e.plan(levels[0, :1000]), 100) for n, e in engines.items()},
            **{
                f"strips_{n}/{name}": (lambda p=planner, e=ends: p.strips(e), 100)
                for n, ends in batches.items()
                for name, planner in planners.items()
            },
            **{f"update_256/{n}": (lambda e=e: e.update_threshold(3, samples), 100) for n, e in engines.items()},
        },
        args.rounds,
    )
    large = measure(
        {
            **{f"batch/{n}": (lambda e=e: e.evaluate_batch(risk), 1) for n, e in engines.items()},
            "batch/plain": (lambda: per_token_loop(rust, few), 1),
            **{f"plan/{n}": (lambda e=e: e.plan(levels[0]), 1) for n, e in engines.items()},
        },
        max(3, args.rounds // 2),
    )
    large["batch/plain"] *= args.tokens / few.shape[1]

    rows = [
        ("step, 1 token", 1e6, "us", {name: statistics.median(values) for name, values in steps.items()}),
        ("begin + 3 steps, 1 token", 1e6, "us", pick(small, "pass")),
        ("plan, 1 token", 1e6, "us", pick(small, "plan_1")),
        ("plan, 1,000 tokens", 1e6, "us", pick(small, "plan_1000")),
        *((f"strips of {n:,} mixed tokens", 1e6, "us", pick(small, f"strips_{n}")) for n in STRIP_TOKENS),
        ("update_threshold, 256 samples", 1e6, "us", pick(small, "update_256")),
        (f"evaluate_batch, {len(LAYERS)} x {args.tokens:,}", 1e3, "ms", pick(large, "batch")),
        (f"plan, {args.tokens:,} tokens", 1e3, "ms", pick(large, "plan")),
    ]
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'median of the rounds':<34}{'rust':>12}{'numpy':>12}{'python':>12}{'numpy/rust':>12}{'python/rust':>12}")
    for label, scale, unit, seconds in rows:
        cells = [f"{seconds[e] * scale:,.2f} {unit}" if e in seconds else "" for e in ("rust", "numpy", "plain")]
        cells += [f"{seconds[e] / seconds['rust']:.1f}x" if e in seconds else "" for e in ("numpy", "plain")]
        print(f"{label:<34}" + "".join(f"{cell:>12}" for cell in cells))
    if args.json:
        figures = {label: seconds for label, _, _, seconds in rows}
        args.json.write_text(
            json.dumps({"machine": about, "tokens": args.tokens, "seconds": figures}, indent=2) + "\n"
        )


def pick(figures: dict[str, float], what: str) -> dict[str, float]:
    return {name.split("/")[1]: value for name, value in figures.items() if name.split("/")[0] == what}


if __name__ == "__main__":
    main()
