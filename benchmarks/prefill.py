"""Time of a prompt under `truncate`: every FFN alone, and the whole forward of a decoder, dense and cut in turn.

    python benchmarks/prefill.py [--shape NAME] [--full] [--threads N] [--cpu-time] [--json FILE]

A decoder of the Qwen2.5-0.5B shape (hidden 896, FFN 4864) with random weights: this shows speed and nothing else. Four
layers by default, of which the last three are cut; `--full` takes all 24 layers (17 cut, as with checkpoints at 6, 12,
18) and more rounds. Levels are forced: "uniform" gives every token one level, "mixed" draws each token's at random.
Probes and controller are not in it (`controller.py` times those); sorting and planning are, once per forward.

The FFN rows run the cut FFNs one after the other, so that their weights come from memory and not from a cache; their
times are per FFN. `eta` is time saved over the time that the multiply-adds not spent would save if time fell in
proportion: of the cut FFNs' dense time, measured in the same run. Medians of one interleaved run. `--cpu-time` uses
one thread and counts its processor time, for a machine that has other work to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from sedac_hf.cli.env import machine
from sedac_hf.control import make_controller, strip_planner
from sedac_hf.evaluation.random_decoders import SHAPES, random_decoder
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule, align_width
from sedac_hf.layer_config import LayerConfig
from sedac_hf.ops import LevelPlan, OperatingPoint, SiteCut, cut_ffn
from sedac_hf.ops.compiled import stand_in
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.strips.costs import known_tables
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime

N_LEVELS = 8
LAYERS = 4
VOCABULARY = 4096  # small: a prompt needs the logits of its last token alone
LEVELS = {
    "uniform 75%": (6,),
    "uniform 50%": (4,),
    "uniform 25%": (2,),
    "mixed 4..8": (4, 5, 6, 7, 8),
    "mixed 1..8": (1, 2, 3, 4, 5, 6, 7, 8),
    "mixed 1,2,4,8": (1, 2, 4, 8),
    "mixed 1..3": (1, 2, 3),
}


@dataclass
class Row:
    """One case: ``share`` of the multiply-adds of the FFNs that this work runs was spent."""

    work: str
    dtype: str
    tokens: int
    case: str
    seconds: float
    time_over_dense: float
    share: float
    eta: float | None


def policy(runtime: SedacRuntime) -> Policy:
    """Even widths at every level; FFNs up to the first checkpoint stay whole."""
    rows = []
    for segment, site in zip(runtime.segments, runtime.sites, strict=True):
        f = site.intermediate_size
        widths = [f if segment < 0 else align_width(f * level / N_LEVELS, f) for level in range(1, N_LEVELS)]
        rows.append(tuple(OperatingPoint(width) for width in (0, *widths, f)))
    layers = runtime.checkpoint_layers
    return Policy(
        cut="truncate",
        objective="throughput",
        layer_configs=tuple(LayerConfig(layer, 0.0, 1.0, 1.0) for layer in layers),
        confidence_decay=0.0,
        schedule=WidthSchedule(N_LEVELS, tuple(rows)),
        probes=ProbeBank(runtime.hidden_size, 1, layers),
        risk_scale=tuple(1.0 for _ in layers),
    )


def draw(levels: Sequence[int], tokens: int) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array(levels, np.uint8), tokens)


class FFNsAlone:
    """The cut FFNs of a decoder, one after the other, on the same input."""

    def __init__(self, runtime: SedacRuntime, tokens: int) -> None:
        self.cut_sites = [i for i, segment in enumerate(runtime.segments) if segment >= 0]
        self.runtime = runtime
        generator = torch.Generator().manual_seed(1)
        site = runtime.sites[0]
        self.x = torch.randn(tokens, site.hidden_size, generator=generator).to(site.down.weight.dtype)
        self.controller = make_controller([LayerConfig(0, 0.0, 1.0, 1.0)])
        kernels = stand_in(self.x.dtype)  # then they take the place of strips
        self.kernels = {i: CpuFFN(runtime.sites[i].weights()) if kernels else None for i in self.cut_sites}

    def dense(self) -> None:
        for i in self.cut_sites:
            self.runtime.sites[i].owner(self.x)

    def cut(self, levels: np.ndarray) -> None:
        plan = LevelPlan(levels, *self.controller.plan(levels))
        for i in self.cut_sites:
            points = self.runtime.policy.schedule.points[i]
            cut = SiteCut(
                points, plan, None, None, "auto", lambda **_: None, self.kernels[i], strip_planner=strip_planner()
            )
            cut_ffn(self.x, self.runtime.sites[i].weights(), cut)


def measure(calls: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each call; every round makes each of them once, starting with another one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for round_idx in range(-1, rounds):  # the first round warms up
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            calls[name]()
            if round_idx >= 0:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


class Case:
    """One decoder at one prompt length, and what is timed of it."""

    def __init__(self, runtime: SedacRuntime, tokens: int) -> None:
        self.runtime = runtime
        self.tokens = tokens
        self.ffns = FFNsAlone(runtime, tokens)
        self.ids = torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(2))
        self.levels = {name: draw(choice, tokens) for name, choice in LEVELS.items()}

    def forward(self, context: AbstractContextManager[None]) -> None:
        with context:
            self.runtime.model(self.ids, logits_to_keep=1, use_cache=False)

    def calls_of_ffns(self) -> dict[str, Callable[[], object]]:
        whole = np.full(self.tokens, N_LEVELS, np.uint8)
        cut = {name: partial(self.ffns.cut, levels) for name, levels in self.levels.items()}
        return {"dense": self.ffns.dense, "nothing skipped": partial(self.ffns.cut, whole), **cut}

    def calls_of_model(self) -> dict[str, Callable[[], object]]:
        runtime = self.runtime
        cut = {name: lambda n=name: self.forward(runtime.forced_levels(self.levels[n])) for name in self.levels}
        return {
            "dense": lambda: self.forward(runtime.disabled()),
            "nothing skipped": lambda: self.forward(runtime.full_width()),
            **cut,
        }

    def rows(self, work: str, times: dict[str, float], ffns_dense: float) -> list[Row]:
        runtime, n_ffns = self.runtime, len(self.ffns.cut_sites)
        widths = np.array([point.width for point in runtime.policy.schedule.points[-1]])
        rows = []
        for name, seconds in times.items():
            skipped = 1 - float(widths[self.levels[name]].mean() / widths[-1]) if name in self.levels else 0.0
            rows.append(
                Row(
                    work=work,
                    dtype=str(self.ffns.x.dtype).removeprefix("torch."),
                    tokens=self.tokens,
                    case=name,
                    seconds=seconds / (n_ffns if work == "FFN" else 1),
                    time_over_dense=seconds / times["dense"],
                    share=1 - skipped * (1 if work == "FFN" else n_ffns / len(runtime.sites)),
                    eta=(times["dense"] - seconds) / (ffns_dense * skipped) if skipped else None,
                )
            )
        return rows


@torch.no_grad()
def measure_decoder(
    model: torch.nn.Module, tokens: Sequence[int], rounds: int, clock: Callable[[], float]
) -> list[Row]:
    n_layers = model.config.num_hidden_layers
    runtime = SedacRuntime(model, (n_layers // 4 if n_layers > LAYERS else 0,))
    runtime.install(policy(runtime))
    rows: list[Row] = []
    for n in tokens:
        case = Case(runtime, n)
        runtime.detach()  # the dense FFNs are the untouched modules
        times = measure(case.calls_of_ffns(), rounds, clock)
        rows += case.rows("FFN", times, times["dense"])
        runtime.attach()
        times = measure({**case.calls_of_model(), "FFNs": case.ffns.dense}, max(rounds // 2, 3), clock)
        ffns_dense = times.pop("FFNs")
        rows += case.rows("model", times, ffns_dense)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all layers, 15 rounds")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--tokens", type=int, action="append", help="prompt lengths; default: 512 and 2048")
    parser.add_argument("--rounds", type=int, help="rounds of the FFNs; the whole forward takes half as many")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--cpu-time", action="store_true", help="one thread, its processor time")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.cpu_time or arguments.threads:
        torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    rounds = arguments.rounds or (15 if arguments.full else 7)
    changes = {"vocab_size": VOCABULARY} | ({} if arguments.full else {"num_hidden_layers": LAYERS})
    rows: list[Row] = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_decoder(arguments.shape, dtype=dtype, **changes)
        rows += measure_decoder(model, arguments.tokens or (512, 2048), rounds, clock)
    about = machine() | {
        "threads": torch.get_num_threads(),
        "clock": "processor time of the thread" if arguments.cpu_time else "wall",
        "shape": arguments.shape,
        "layers": model.config.num_hidden_layers,
        "rounds": rounds,
        "costs": "measured" if any(table.measured for table in known_tables()) else "stated rates",
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{'work':<8}{'dtype':<10}{'tokens':>6}  {'case':<18}{'ms':>9}{'time/dense':>12}{'mult-adds':>11}{'eta':>7}")
    for row in rows:
        eta = "" if row.eta is None else f"{row.eta:.2f}"
        print(
            f"{row.work:<8}{row.dtype:<10}{row.tokens:>6}  {row.case:<18}{row.seconds * 1e3:>9.2f}"
            f"{row.time_over_dense:>12.3f}{row.share:>11.3f}{eta:>7}"
        )
    if arguments.json:
        figures = {"machine": about, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
