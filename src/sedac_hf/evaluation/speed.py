"""Measured time of `generate` and `forward`: dense and SEDAC in turn, in one process.

Machines drift (clock, heat, neighbours), so figures of separate runs do not compare. Here the variants take turns in
every round, in a different order each time, and the median over the rounds is what is quoted. Switching between the
variants happens outside the timer, and each measurement is preceded by a short call that warms the caches.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from transformers import LogitsProcessor

from sedac_hf.errors import EvaluationError

Work = Literal["generate", "forward"]


@dataclass(frozen=True)
class SpeedReport:
    """Times of one comparison.

    ``seconds`` holds every measurement by variant, in order: "dense" (`disable()`: the base as it was), "full_width"
    (hooks and probes run, nothing is cut) and "sedac" (as calibrated). ``ratio`` is median SEDAC time over median
    dense time: below 1 is faster. ``choices``: what `generate` decided in this run, and how often; a comparison in
    which it chose full width throughout says nothing about cutting.
    """

    work: Work
    batch: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dtype: str
    device: str
    machine: str
    threads: int
    seconds: dict[str, list[float]]
    choices: dict[str, int]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by variant."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """Median time of "sedac" over median time of "dense"."""
        medians = self.medians
        return medians["sedac"] / medians["dense"]

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON, with the derived figures."""
        return asdict(self) | {"medians": self.medians, "ratio": self.ratio}


class TokenClock(LogitsProcessor):
    """Notes when each token of one `generate` call is decided: give it as ``logits_processor=[clock]``.

    Args:
        note: read at every token beside the time, e.g. a counter of what else went on; its own time is not counted.
    """

    def __init__(self, note: Callable[[], float] | None = None) -> None:
        self._note = note
        self._marks: list[tuple[float, float, float]] = []  # time on entry, what was noted, time on leaving

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leaves the scores as they are."""
        if scores.device.type == "cuda":
            torch.cuda.synchronize(scores.device)
        entry = time.perf_counter()
        noted = 0.0 if self._note is None else self._note()
        self._marks.append((entry, noted, time.perf_counter()))
        return scores

    def steps(self) -> list[tuple[float, float]]:
        """(seconds, growth of the note) of each decode step: from one token to the next, so without the prompt."""
        return [(entry - left, noted - before) for (_, before, left), (entry, noted, _) in pairwise(self._marks)]


def interleaved(
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    work: Callable[[], object],
    *,
    rounds: int,
    warm_up: Callable[[], object],
) -> dict[str, list[float]]:
    """Time ``work`` under each variant in turn.

    Args:
        variants: name -> factory of the context manager under which the work runs.
        work: what is timed; it must have finished on its device when it returns.
        rounds: measurements per variant, 1 or more; every round measures each variant once.
        warm_up: a short call made untimed after each switch.

    Returns:
        Seconds by variant, one per round.
    """
    if rounds < 1:
        raise EvaluationError(f"`rounds` must be 1 or more, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for round_idx in range(rounds):
        shift = round_idx % len(names)  # no variant always follows the same one
        for name in names[shift:] + names[:shift]:
            with variants[name]():
                warm_up()
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def compare_speed(
    model: Any,
    *,
    work: Work = "generate",
    batch: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    rounds: int = 5,
    seed: int = 0,
    **generate_kwargs: Any,
) -> SpeedReport:
    """Time a SEDAC model against itself with SEDAC disabled, on random token ids.

    Args:
        model: a `SedacForCausalLM`, or whatever else offers `disable()`, `full_width()`, `generate` and `stats()`.
        work: "generate" (prompt and ``new_tokens`` greedy tokens) or "forward" (the prompt alone).
        batch, prompt_tokens: shape of the prompt, each 1 or more.
        new_tokens: tokens generated per row, 1 or more; the end-of-text token does not stop the run.
        rounds: measurements per variant, 1 or more; the median is quoted.
        seed: seed of the random prompt.
        **generate_kwargs: passed to `generate`, e.g. ``consistent=True`` to time the policy even where the wrapper
            would rather run at full width.

    Raises:
        EvaluationError: a size is below 1, or `work` is unknown.
    """
    for name, value in (("batch", batch), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise EvaluationError(f"`{name}` must be 1 or more, got {value}")
    if work not in ("generate", "forward"):
        raise EvaluationError(f"`work` must be 'generate' or 'forward', got {work!r}")
    device = model.device
    vocab_size = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, prompt_tokens), generator=generator).to(device)
    mask = torch.ones_like(ids)

    def generate(tokens: int) -> None:
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            **generate_kwargs,
        )

    def run(tokens: int) -> None:
        if work == "generate":
            generate(tokens)
        else:
            model(input_ids=ids, attention_mask=mask)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    before = dict(model.stats().choices)
    variants: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "dense": model.disable,
        "full_width": model.full_width,
        "sedac": nullcontext,
    }
    was_training = model.training
    model.eval()
    try:
        seconds = interleaved(variants, lambda: run(new_tokens), rounds=rounds, warm_up=lambda: run(1))
    finally:
        model.train(was_training)
    after = model.stats().choices
    return SpeedReport(
        work=work,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens if work == "generate" else 0,
        rounds=rounds,
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        machine=platform.platform(),
        threads=torch.get_num_threads(),
        seconds=seconds,
        choices={text: count - before.get(text, 0) for text, count in after.items() if count > before.get(text, 0)},
    )
