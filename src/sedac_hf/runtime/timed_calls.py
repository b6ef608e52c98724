"""Calls that take turns under a clock: how ways of running one and the same thing are compared."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Call = Callable[[], object]

LEAST_REPEATS, MOST_REPEATS = 7, 60
SECONDS = 0.1  # of one comparison; a call that takes long is repeated less often
FEW_REPEATS, MOST_SECONDS = 3, 0.5  # and one that takes very long


def in_turns(*alternatives: Sequence[Call]) -> list[Call]:
    """One call per alternative, which goes from layer to layer: a decoder's layers find their weights in memory.

    Each starts at a place of its own. On the layer that another has just read it would find the weights in the
    last-level cache, which holds an FFN on servers.
    """
    calls: list[Call] = []
    for n, layers in enumerate(alternatives):
        start = n * len(layers) // len(alternatives)
        turns = itertools.cycle([*layers[start:], *layers[:start]])
        calls.append(functools.partial(_call_next, turns))
    return calls


def _call_next(turns: Iterator[Call]) -> object:
    return next(turns)()


def noise(rows: int, size: int) -> Tensor:
    """Activations to time with; drawn apart, since `generate` may be about to sample."""
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def interleaved(calls: Sequence[Call], device: torch.device) -> list[float]:
    """Seconds of each call, taken in turns so that a busy machine slows all alike: the lower quartile, since whatever
    else runs on the machine only adds, and may do so in more than half of a tenth of a second."""
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for repeat in range(MOST_REPEATS + 1):
        spent = time.perf_counter() - started
        if (repeat > LEAST_REPEATS and spent > SECONDS) or (repeat > FEW_REPEATS and spent > MOST_SECONDS):
            break
        for call, kept in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                kept.append(time.perf_counter() - start)
    return [sorted(kept)[len(kept) // 4] for kept in times]
