"""What the wrapper costs where it saves nothing: `python benchmarks/overhead.py [--json FILE]`, about five minutes.

A decoder of a real shape with random weights, `generate` with one row, in one run in which these take turns:

    base         the plain model, after `unload()`: no hooks, weights as they were
    base, again  the same once more in each round: how far from 1 it is, is the noise of this machine
    disabled     wrapped, inside `disable()`
    full width   wrapped, inside `full_width()`: hooks, compiled kernels where they are quicker, nothing skipped
    auto         wrapped, as `generate` chooses under a policy of the share asked for
    auto, 95%    the same where little is to be gained: it must not lose

Times are medians of single decode steps of all rounds, the prompt and the first steps left out; with `--prompt N` of
whole prompts of N tokens instead, which `generate` runs at full width under `select`, and cut under `--cut truncate`.
On a machine whose compiled kernels are quicker than torch's, "full width" is below 1; `--engine strips` shows the
hooks without them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from timing import Samples, about, time_tokens, timed

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.evaluation.random_decoders import SHAPES, forced_policy, random_decoder
from sedac_hf.evaluation.speed import TokenClock

PROMPT, WARM_UP = 16, 4
PROMPTS = 4  # per variant and round
LITTLE_TO_GAIN = 0.95


class Case:
    """One decoder, wrapped, with two policies."""

    def __init__(
        self,
        shape: str,
        dtype: torch.dtype,
        share: float,
        engine: str,
        prompt: int = PROMPT,
        cut: Literal["select", "truncate"] = "select",
        **sizes: Any,
    ) -> None:
        base = random_decoder(shape, dtype=dtype, **sizes)
        self.model = SedacForCausalLM.from_base(base, SedacConfig(engine=engine))
        runtime = self.model.runtime
        self.policy = forced_policy(runtime, cut, share)
        self.schedules = {s: forced_policy(runtime, cut, s).schedule for s in (share, LITTLE_TO_GAIN)}
        self.share, self.choices = share, dict[str, str]()
        self.model.install(self.policy)
        vocabulary = base.get_input_embeddings().weight.shape[0]
        self.ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1))
        self.steps(self.model, 2, None)  # `generate` measures its choice while the policy is in place

    def steps(self, model: Any, tokens: int, clock: TokenClock | None) -> None:
        model.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=[] if clock is None else [clock],
        )

    @contextmanager
    def unloaded(self) -> Iterator[Any]:
        """The base itself; then it is wrapped and laid out again."""
        base = self.model.unload()
        try:
            yield base
        finally:
            self.model.install(self.policy)

    @contextmanager
    def auto(self, name: str, share: float) -> Iterator[Any]:
        self.model.runtime.reschedule(self.schedules[share])
        self.model.reset_stats()
        yield self.model
        self.choices[name] = "; ".join(self.model.stats().choices)

    @contextmanager
    def inside(self, switch: Callable[[], AbstractContextManager[Any]], model: Any) -> Iterator[Any]:
        with switch():
            yield model

    def variants(self) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
        """Name -> context that gives the model to run."""
        model, little = self.model, f"auto, {LITTLE_TO_GAIN:.0%}"
        return {
            "base": self.unloaded,
            "disabled": partial(self.inside, model.disable, model),
            "full width": partial(self.inside, model.full_width, model),
            f"auto, {self.share:.0%}": partial(self.auto, f"auto, {self.share:.0%}", self.share),
            "base, again": self.unloaded,
            little: partial(self.auto, little, LITTLE_TO_GAIN),
        }


def measured(case: Case, tokens: int, rounds: int, *, prompts: bool = False) -> dict[str, Samples]:
    """Decode steps, or prompts, by variant; each round starts with another one."""
    variants = case.variants()
    samples = {name: Samples() for name in variants}
    names = list(variants)
    for round_idx in range(rounds):
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            with variants[name]() as model:
                case.steps(model, WARM_UP, None)
                if prompts:
                    for _ in range(PROMPTS):
                        timed(partial(case.steps, model, 1, None), samples[name])
                    continue
                time_tokens(lambda clock, m=model: case.steps(m, tokens, clock), samples[name], skip=2)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--layers", type=int, help="only so many decoder layers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="default: both")
    parser.add_argument("--share", type=float, default=0.30, help="needed share of the FFN bytes under the policy")
    parser.add_argument("--engine", default="auto", help="as in `SedacConfig`")
    parser.add_argument("--cut", choices=("select", "truncate"), default="select")
    parser.add_argument("--prompt", type=int, help="time prompts of so many tokens")
    parser.add_argument("--tokens", type=int, default=24, help="per variant and round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    sizes = {"num_hidden_layers": args.layers} if args.layers else {}
    about_run = {**about(), "engine": args.engine}
    print(", ".join(f"{key} {value}" for key, value in about_run.items()))
    cases = []
    for dtype in args.dtype or ("float32", "bfloat16"):
        case = Case(
            args.shape, getattr(torch, dtype), args.share, args.engine, args.prompt or PROMPT, args.cut, **sizes
        )
        samples = measured(case, args.tokens, args.rounds, prompts=args.prompt is not None)
        base = samples["base"].median
        what = f"prompts of {args.prompt} tokens" if args.prompt else "decode steps"
        print(f"\n{args.shape}, {dtype}, {args.cut}, one row, {what}; random weights: speed only")
        print(f"  {'':14}{'ms':>10}{'per second':>12}{'time/base':>11}  n")
        rows = {}
        for name, taken in samples.items():
            rows[name] = {**taken.to_dict(), "time_over_base": taken.median / base, "chose": case.choices.get(name)}
            print(
                f"  {name:14}{1e3 * taken.median:>10.2f}{1 / taken.median:>12.1f}{taken.median / base:>11.3f}"
                f"  {taken.count}  {case.choices.get(name, '')}",
                flush=True,
            )
        cases.append({"shape": args.shape, "dtype": dtype, "rows": rows})
        del case
    if args.json:
        args.json.write_text(json.dumps({"machine": about_run, "cases": cases}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
