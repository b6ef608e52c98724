"""Tokens per second of `generate`: `python benchmarks/decode.py [--full] [--json PATH]`.

Decoders of real shapes with random weights, so nothing here is about quality. Each dtype and batch is one run in
which all rows take turns: the plain model, eager and compiled with a static cache; our kernels with nothing skipped;
SEDAC at forced needed shares (what decides counted in) for `select` and `truncate`, probes and controller running, at
the last share also compiled.
Times are medians over the decode steps of all rounds, the prompt left out.

    time/dense   against the plain model, eager
    bound        what the bytes of the step would give: bytes left to read over all bytes (bf16 needed share)
    eta          time saved against the plain model / time that the skipped bytes could save of it
    eta own      the same against our kernels with nothing skipped, eager or compiled as the row is
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Samples, about, time_tokens
from transformers import CompileConfig

from sedac_hf import SedacForCausalLM
from sedac_hf.evaluation.random_decoders import SHAPES, forced_policy, random_decoder
from sedac_hf.evaluation.speed import TokenClock

Run = Callable[[int, TokenClock], None]

PROMPT, WARM_UP = 32, 3
LEAST_ROUNDS, MOST_ROUNDS = 2, 4
SECONDS = 270.0  # for a table, unless rounds are asked for: the default run's two stay below ten minutes
DENSE, COMPILED = "plain HF, eager", "plain HF, static cache, compiled"
WHOLE, WHOLE_COMPILED = "our kernels, nothing skipped", "our kernels, static cache, compiled"


class Case:
    """One decoder, wrapped twice (a copy of the weights per cut, which one policy at a time would not need)."""

    def __init__(self, shape: str, dtype: torch.dtype, batch: int, shares: list[float], cuts: list[str]) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.models = {cut: SedacForCausalLM.from_base(random_decoder(shape, dtype=dtype, device=self.device))
                       for cut in cuts}  # fmt: skip
        self.schedules: dict[tuple[str, float], Any] = {}
        for cut, model in self.models.items():
            policies = {share: forced_policy(model.runtime, cut, share) for share in shares}  # type: ignore[arg-type]
            self.schedules |= {(cut, share): policy.schedule for share, policy in policies.items()}
            model.install(policies[shares[-1]])
        generator = torch.Generator().manual_seed(1)
        vocabulary = SHAPES[shape][1]["vocab_size"]
        self.ids = torch.randint(vocabulary, (batch, PROMPT), generator=generator).to(self.device)
        self.bytes = step_bytes(next(iter(self.models.values())).model)

    def generate(self, model: Any, tokens: int, clock: TokenClock, **kwargs: Any) -> None:
        model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=[clock],
            **kwargs,
        )

    def variants(self, *, compiled: bool, consistent: bool) -> dict[str, Run]:
        """Row -> a run of so many tokens under a clock."""
        last = list(self.models.values())[-1]  # its weights lie as they came

        def plain(tokens: int, clock: TokenClock, **kwargs: Any) -> None:
            with last.disable():
                self.generate(last.model, tokens, clock, **kwargs)

        def graph() -> dict[str, Any]:
            config = CompileConfig(fullgraph=True)
            config._compile_all_devices = True  # transformers compiles nothing on a CPU else
            return {"cache_implementation": "static", "compile_config": config}

        def static(tokens: int, clock: TokenClock) -> None:
            plain(tokens, clock, **graph())

        def whole(in_graph: bool, tokens: int, clock: TokenClock) -> None:
            with last.full_width():
                self.generate(last, tokens, clock, **(graph() if in_graph else {}))

        def sedac(cut: str, share: float, in_graph: bool, tokens: int, clock: TokenClock) -> None:
            model = self.models[cut]
            model.runtime.reschedule(self.schedules[cut, share])
            how = graph() if in_graph else {}
            self.generate(model, tokens, clock, **({"consistent": True} if consistent else {}), **how)

        rows: dict[str, Run] = {DENSE: plain}
        if compiled:
            rows[COMPILED] = static
        rows[WHOLE] = partial(whole, False)
        if compiled:
            rows[WHOLE_COMPILED] = partial(whole, True)
        for cut, share in self.schedules:
            rows[f"SEDAC {cut} {share:.0%}"] = partial(sedac, cut, share, False)
            if compiled and share == list(self.schedules)[-1][1]:
                rows[f"SEDAC {cut} {share:.0%}, static cache, compiled"] = partial(sedac, cut, share, True)
        return rows


def step_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """(all weight bytes of a decode step, those of FFNs): every linear map, the head included."""
    linears = {id(m.weight): (name, m.weight) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    sizes = [(".mlp." in name, weight.numel() * weight.element_size()) for name, weight in linears.values()]
    return sum(size for _, size in sizes), sum(size for is_ffn, size in sizes if is_ffn)


def measure(case: Case, tokens: int, rounds: int | None, **kinds: bool) -> dict[str, dict[str, Any]]:
    """Median step by row, with what `generate` chose. rounds: None for as many as fit `SECONDS`, within limits."""
    started = time.perf_counter()
    rows = case.variants(**kinds)
    samples = {name: Samples() for name in rows}
    choices: dict[str, str] = {}
    names = list(rows)
    for name in names:
        rows[name](tokens, TokenClock())  # measures, warms up, and compiles: a static cache has the length of its call
    begun = time.perf_counter()
    for round_idx in range(rounds or MOST_ROUNDS):
        now = time.perf_counter()
        if rounds is None and round_idx >= LEAST_ROUNDS and now + (now - begun) / round_idx > started + SECONDS:
            break
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            for model in case.models.values():
                model.reset_stats()
            time_tokens(partial(rows[name], tokens), samples[name], skip=WARM_UP)
            made = [text for model in case.models.values() for text in model.stats().choices]
            choices[name] = made[0].split(":")[0] if made and name.startswith("SEDAC") else ""
    return {
        name: {"step_ms": 1e3 * taken.median, **taken.to_dict(), "samples": taken.count, "chose": choices[name]}
        for name, taken in samples.items()
    }


def add_columns(rows: dict[str, dict[str, Any]], bytes_of_step: tuple[int, int], batch: int) -> None:
    """Ratios and bounds, from the medians of one run."""
    everything, ffns = bytes_of_step
    dense = rows[DENSE]["step_ms"]
    for name, row in rows.items():
        row["tokens_per_s"] = 1e3 * batch / row["step_ms"]
        row["time_over_dense"] = row["step_ms"] / dense
        if not name.startswith("SEDAC"):
            continue
        skipped = (1 - float(name.split()[2].rstrip("%,")) / 100) * ffns / everything
        row["bound"] = 1 - skipped
        whole = rows[WHOLE_COMPILED if name.endswith("compiled") else WHOLE]["step_ms"]
        if skipped > 0:
            row["eta"] = (dense - row["step_ms"]) / (skipped * dense)
            row["eta_own"] = (whole - row["step_ms"]) / (skipped * whole)


def print_table(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}")
    columns = (("tokens/s", 10), ("speed-up", 10), ("time/dense", 12), ("bound", 8), ("eta", 7), ("eta own", 9))
    print(f"{'':<42}" + "".join(f"{name:>{width}}" for name, width in columns) + f"{'samples':>10}  chose")
    for name, row in rows.items():
        cells = [f"{row['tokens_per_s']:>10.1f}{1 / row['time_over_dense']:>9.2f}x{row['time_over_dense']:>12.3f}"]
        cells += [f"{row[key]:>{width}.2f}" if key in row else " " * width
                  for key, width in (("bound", 8), ("eta", 7), ("eta_own", 9))]  # fmt: skip
        print(f"{name:<42}" + "".join(cells) + f"{row['samples']:>10}  {row['chose']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: the 0.5B shape (GPU: 8B)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--batch", type=int, action="append", help="rows; default 1")
    parser.add_argument("--cut", choices=("select", "truncate"), action="append", help="default: both")
    parser.add_argument("--shares", default="1,0.75,0.5,0.35,0.3,0.25", help="needed shares of the FFN bytes")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, help="default: up to four, as many as fit 4.5 minutes per table")
    parser.add_argument("--full", action="store_true", help="more shapes, and batches of 1, 2, 4 and 16")
    parser.add_argument("--no-compiled", action="store_true", help="leave the compiled plain model out")
    parser.add_argument("--consistent", action="store_true", help="cut even where full width is quicker")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    shapes = args.shape or (["llama-3.1-8b"] if on_gpu else ["qwen2.5-0.5b"])
    if args.full and not args.shape:
        shapes = ["llama-3.1-8b", "qwen2.5-7b"] if on_gpu else ["qwen2.5-0.5b", "llama-3.2-1b"]
    batches = args.batch or ([1, 2, 4, 16] if args.full else [1])
    dtypes = args.dtype or (["bfloat16"] if on_gpu else ["float32", "bfloat16"])
    shares = [float(share) for share in args.shares.split(",")]
    machine = about()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    figures = []
    for shape in shapes:
        for dtype in dtypes:
            for batch in batches:
                case = Case(shape, getattr(torch, dtype), batch, shares, args.cut or ["select", "truncate"])
                rows = measure(case, args.tokens, args.rounds, compiled=not args.no_compiled,
                               consistent=args.consistent)  # fmt: skip
                add_columns(rows, case.bytes, batch)
                print_table(f"{shape}, {dtype}, {batch} row(s), {case.device}; random weights: speed only", rows)
                figures.append({"shape": shape, "dtype": dtype, "batch": batch, "rows": rows})
                del case
                torch.compiler.reset()
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "cases": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
