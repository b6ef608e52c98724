"""Times that can be trusted on a machine that is not ours alone; shared by the benchmarks of this folder.

Two rules. What is compared takes turns within one run, so that a slow spell of the machine falls on all alike. And a
sample in which somebody else had the core is set aside: on Linux the *run delay* of a thread (how long it was ready
to run and did not; the second number of /proc/self/task/*/schedstat) tells. A sample is *disturbed* if the run delay
of this process's threads grew by more than `DISTURBED` of its time. Medians are over the undisturbed samples, and
every table says how many those were. Two things the run delay does not see: a hypervisor that takes the whole
processor away, and neighbours that use up the memory's bandwidth. Elsewhere than on Linux nothing is set aside.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sedac_hf.cli.env import kernels, machine
from sedac_hf.evaluation.speed import TokenClock

DISTURBED = 0.02
LEAST_UNDISTURBED = 3
"""With fewer the median is over all samples, and the table says so."""

_TASKS = Path("/proc/self/task")


def about() -> dict[str, Any]:
    """The machine, and what decides how fast it is: printed above every table and kept in the JSON."""
    load = {"load before": round(os.getloadavg()[0], 1)} if hasattr(os, "getloadavg") else {}
    versions = {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
    return {**machine(), **kernels(), **versions, **load}


def run_delay() -> float:
    """Seconds for which threads of this process have waited for a core, in total since they began; 0 if unknown."""
    total = 0
    with suppress(OSError):
        for task in os.listdir(_TASKS):
            with suppress(OSError, IndexError, ValueError):  # a thread may end meanwhile
                total += int((_TASKS / task / "schedstat").read_text().split()[1])
    return total * 1e-9


@dataclass
class Samples:
    """Seconds of one case, in the order of taking, apart for whether somebody disturbed."""

    undisturbed: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    def add(self, seconds: float, delay: float) -> None:
        """Take a sample in which this process's run delay grew by ``delay`` seconds."""
        (self.disturbed if delay > DISTURBED * seconds else self.undisturbed).append(seconds)

    @property
    def clean(self) -> bool:
        """Whether the median is over undisturbed samples alone."""
        return len(self.undisturbed) >= LEAST_UNDISTURBED

    @property
    def median(self) -> float:
        return statistics.median(self.undisturbed if self.clean else self.undisturbed + self.disturbed)

    @property
    def count(self) -> str:
        """Samples kept / taken, with a mark where too few were undisturbed."""
        taken = len(self.undisturbed) + len(self.disturbed)
        return f"{len(self.undisturbed)}/{taken}" + ("" if self.clean else " (!)")

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the median in seconds and how it came about."""
        return {
            "median_s": self.median,
            "kept": len(self.undisturbed),
            "taken": len(self.undisturbed) + len(self.disturbed),
            "over_undisturbed_only": self.clean,
        }


def timed(call: Callable[[], object], samples: Samples) -> None:
    """Make the call, which must have finished on its device when it returns, and add its time to the samples."""
    before = run_delay()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    samples.add(seconds, run_delay() - before)


def take_turns(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float, least: int = 5
) -> dict[str, Samples]:
    """Time every call once per round, each round starting with another one, after a round to warm up.

    Ends when every call has ``rounds`` undisturbed samples, or after ``seconds``, but not before ``least`` rounds.
    """
    names = list(calls)
    for name in names:
        calls[name]()
    samples = {name: Samples() for name in names}
    started = time.perf_counter()
    round_idx = 0
    while round_idx < least or (
        time.perf_counter() - started < seconds and min(len(s.undisturbed) for s in samples.values()) < rounds
    ):
        shift = round_idx % len(names)
        for name in names[shift:] + names[:shift]:
            timed(calls[name], samples[name])
        round_idx += 1
    return samples


def time_tokens(generate: Callable[[TokenClock], object], samples: Samples, *, skip: int = 1) -> None:
    """Add the time of each decode step of one `generate` call, but for the first ``skip``.

    ``generate`` gets a logits processor that it must pass on: ``logits_processor=[clock]``. The prompt is not counted.
    """
    clock = TokenClock(note=run_delay)
    generate(clock)
    for seconds, delay in clock.steps()[skip:]:
        samples.add(seconds, delay)
