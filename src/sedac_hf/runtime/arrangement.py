"""How a decoder stands while a call runs: in which order the weights of a `select` policy's FFNs lie in memory, and
which of the replaced forwards are in place.

By units, single units are read quickly, and whole matrices by up to a tenth slower, as `benchmarks/layout.py` and
`ffn.py` show. So FFNs lie by units for calls that cut, and as usual for a ``generate`` call that was measured to do
better at full width. Moving them takes a few decode steps' time; it is done when a call wants it otherwise than the
one before. Such a call also has the forwards put aside that would do nothing in it: with caches that the weights have
swept, even asking them takes time that shows (`benchmarks/overhead.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


class Arrangement:
    """Moves weights between the two layouts, never while anybody else reads them, for kernels know addresses alone;
    puts forwards aside and back.

    Attributes:
        fixed: nothing is moved any more, since a captured graph knows where the weights are.
    """

    def __init__(self, runtime: SedacRuntime) -> None:
        self._runtime = runtime
        self._lock = threading.RLock()
        self._readers = 0
        self._places: tuple[object, tuple[int, ...]] = (None, ())  # `by_choice` of a schedule
        self.fixed = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_runtime": self._runtime, "fixed": self.fixed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock(), _readers=0, _places=(None, ()))

    # ---------------------------------------------------------------- who reads

    def enter(self, *, cut: bool = False) -> None:
        """A forward pass or a ``generate`` call begins; nothing is moved before it has called `leave`.

        cut: it needs every forward that is replaced.
        """
        with self._lock:
            self._readers += 1
            if cut:
                self._runtime.put_back_forwards()

    def leave(self) -> None:
        with self._lock:
            self._readers -= 1

    # ---------------------------------------------------------------- what lies how

    @property
    def by_choice(self) -> tuple[int, ...]:
        """The FFNs in which the installed policy lets tokens choose units."""
        policy = self._runtime.policy
        if policy is None or policy.cut != "select":
            return ()
        schedule, places = self._places
        if schedule is not policy.schedule:
            points = enumerate(policy.schedule.points)
            places = tuple(i for i, levels in points if any(point.importance_min > 0 for point in levels))
            self._places = policy.schedule, places
        return places

    def follow(self, *, cut: bool, readers: int = 0, idle: Sequence[nn.Module] = ()) -> None:
        """Have the weights as a call wants them that cuts, or that runs all FFNs whole.

        Nothing happens while others than ``readers`` of the caller's own read them: then the call runs with them as
        they are, which costs time alone. idle: the modules whose replaced forwards have nothing to do in the call.
        """
        with self._lock:
            if self._may_move(readers):
                by_choice = self.by_choice
                self._move(by_choice if cut else self._elsewhere(by_choice))
                self._runtime.put_back_forwards()
                self._runtime.put_forwards_aside(idle)

    def fix(self, *, readers: int) -> None:
        """Have them by units for good: a captured graph is about to note where they are."""
        if not self.fixed:
            self.follow(cut=True, readers=readers)
            self._runtime.put_back_forwards()
            self.fixed = True

    @contextmanager
    def side_by_side(self, sites: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """For timing: some of these FFNs as usual, and as many alike by units; all of them twice where that cannot be
        had. Others wait meanwhile."""
        with self._lock:
            by_choice = self.by_choice
            movable = set(by_choice) - set(self._elsewhere(by_choice))
            alike: dict[tuple[object, ...], list[int]] = {}
            for i in sites:
                if i in movable:
                    site = self._runtime.sites[i]
                    alike.setdefault((site.kind, site.intermediate_size, site.hidden_size), []).append(i)
            pairs = [pair for of_shape in alike.values() for pair in zip(of_shape[::2], of_shape[1::2], strict=False)]
            if not pairs or not self._may_move(0):
                yield sites, sites
                return
            as_usual, by_units = (tuple(places) for places in zip(*pairs, strict=True))
            self._move([i for i in by_choice if i not in as_usual])
            yield as_usual, by_units

    def _move(self, by_units: Sequence[int]) -> None:
        if self._runtime.weights.lay_out(by_units):
            self._runtime.captured.site_cuts.forget()

    def _may_move(self, readers: int) -> bool:
        runtime = self._runtime
        # Ranks of a tensor-parallel base must agree, and choose nothing by time.
        return not self.fixed and not runtime.sharded and runtime.attached and self._readers <= readers

    def _elsewhere(self, sites: Sequence[int]) -> tuple[int, ...]:
        """Those whose weights are not on a CPU: their kernels' layout is kept."""
        return tuple(i for i in sites if self._runtime.sites[i].like.device.type != "cpu")
