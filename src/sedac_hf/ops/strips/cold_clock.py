"""A clock for calls that find their weights in memory, as they do in a model larger than the caches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

REPEATS = 3  # the best counts: whatever else runs on the machine only adds
FLUSH_BYTES = 64 << 20  # written between two calls, which leaves little of anything else in the caches


class ColdClock:
    """Times calls on one device, a CPU or a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._rest = torch.zeros(FLUSH_BYTES // 4, device=device)

    def seconds(self, *calls: Callable[[], object]) -> list[float]:
        """Seconds of each call, which take turns, after one that warms up."""
        best = [math.inf] * len(calls)
        for call in calls:
            call()
        for _ in range(REPEATS):
            for i, call in enumerate(calls):
                self._rest.add_(1)
                self._wait()
                start = time.perf_counter()
                call()
                self._wait()
                best[i] = min(best[i], time.perf_counter() - start)
        return [max(shortest, 1e-9) for shortest in best]

    def _wait(self) -> None:
        if self._rest.device.type == "cuda":
            torch.cuda.synchronize(self._rest.device)
