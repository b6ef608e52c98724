"""What captured graphs ran, counted from their log when it is replayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sedac_hf.control.decision_log import LoggedPasses
from sedac_hf.runtime.captured.sites import CapturedSite

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


class CapturedTotals:
    """Adds to the runtime's tally what graphs decided.

    Which units a token chose by importance stays on the device: where a level selects, the level's share, which
    calibration made it use on average, stands for the units needed (in front of the first checkpoint, where levels say
    nothing, the whole FFN). Reads are counted as the kernels do them: up to the widest token of a step where an FFN
    skips anything, else the whole FFN.
    """

    def __init__(self, runtime: SedacRuntime, sites: Sequence[CapturedSite], device: torch.device) -> None:
        self._runtime = runtime
        self._sites = sites
        self._device_type = device.type
        self._rows = 0  # tokens of a step; a captured graph has one shape

    def starts(self, n_tokens: int, *, before_change: Callable[[], object]) -> None:
        """A call of so many tokens comes next; ``before_change`` must have all calls of another number replayed."""
        if n_tokens != self._rows:
            before_change()
            self._rows = n_tokens

    def ran(self, n_tokens: int, *, whole: bool, by_kernel: Collection[int]) -> None:
        """One call of a graph, counted now; what it decided is counted when its log is replayed.

        by_kernel: the FFNs that a compiled kernel runs where they are whole.
        """
        runtime = self._runtime
        runtime.tally.begin(n_tokens)
        for i, cost in enumerate(runtime.tally.costs):
            if whole or runtime.sites[i].experts is not None:  # experts run untouched in a graph
                all_of_it, read = cost.units * n_tokens, cost.whole_read(n_tokens)
                engine = "rust, whole" if i in by_kernel else "whole"
                runtime.tally.ffn(i, engine=engine, tokens=n_tokens, needed=all_of_it, read=read, computed=all_of_it)

    def replayed(self, part: LoggedPasses, exited: NDArray[np.bool_], ratios: NDArray[np.float32]) -> None:
        """What one parameter block decided, token by token."""
        runtime, policy = self._runtime, self._runtime.policy
        if policy is None or runtime.probes is None:
            return
        n = part.levels.shape[1]
        calls = -(-n // max(self._rows, 1))
        for idx, risk_q in enumerate(part.risk_q):
            runtime.tally.checkpoint(idx, exited[idx], ratios[idx], int(np.count_nonzero(risk_q < 0)))
            if runtime.probes_decide:
                runtime.tally.probe(runtime.probes.parameters_per_token, n, calls=calls)
        for i, segment in enumerate(runtime.segments):
            if runtime.sites[i].experts is None:
                self._count_site(i, np.ones(n, np.uint8) if segment < 0 else part.levels[segment], calls)

    def _count_site(self, i: int, levels: NDArray[np.uint8], calls: int) -> None:
        runtime, policy = self._runtime, self._runtime.policy
        assert policy is not None
        units, points = runtime.sites[i].intermediate_size, policy.schedule.points[i]
        used = np.array([round(self._share(i, level) * units) for level in range(len(points))], np.int64)[levels]
        steps = np.arange(0, levels.size, max(self._rows, 1))
        # Rows of a step share what they read: the widest prefix, or at worst as many units as they choose together.
        read = np.add.reduceat(used, steps) if self._sites[i].selects else np.maximum.reduceat(used, steps)
        skips = self._sites[i].skips(self._rows, self._device_type)
        read = np.minimum(read, units) if skips else np.full(steps.size, units)
        compensation = None if policy.compensation is None else policy.compensation[i]
        extra = 0
        if compensation is not None:
            extra = int(np.array([compensation.parameters(level) for level in range(len(points))])[levels].sum())
        runtime.tally.ffn(
            i,
            engine="captured",
            tokens=levels.size,
            needed=int(used.sum()),
            read=int(read.sum()),
            computed=int((read * np.diff(np.append(steps, levels.size))).sum()),
            shadow=self._sites[i].selects,
            extra_parameters=extra,
            extra_read=extra,
            calls=calls,
        )

    def _share(self, i: int, level: int) -> float:
        """Share of the site's units that a token at this level uses."""
        policy = self._runtime.policy
        assert policy is not None
        point, units = policy.schedule.points[i][level], self._runtime.sites[i].intermediate_size
        if level == 0:
            return 0.0
        if point.importance_min > 0:
            return 1.0 if self._runtime.segments[i] < 0 else level / policy.n_levels
        return min(point.width, units) / units
