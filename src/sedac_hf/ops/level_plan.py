"""The levels of one call's tokens, sorted, with what engines work out from them once.

A level l counts keep levels, 0..n_levels; level n_levels is the whole FFN, level 0 is down's bias alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class LevelPlan:
    """The levels of one call's tokens, sorted once per checkpoint and passed along the stretch.

    levels: uint8 [n]; order: int64 [n], a stable sort by descending level; at_least: int64 [n_levels + 1],
    ``at_least[l]`` tokens have level >= l, so they are the first ``at_least[l]`` of ``order``.
    """

    levels: np.ndarray
    order: np.ndarray
    at_least: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray, n_levels: int) -> LevelPlan:
        """Sort uint8 levels [n] here, where no controller is at hand to do it."""
        counts = np.bincount(levels, minlength=n_levels + 1)
        order = np.argsort(-levels.astype(np.int64), kind="stable")
        return cls(levels, order, np.cumsum(counts[::-1])[::-1].astype(np.int64))

    @classmethod
    def same(cls, n_tokens: int, level: int, n_levels: int) -> LevelPlan:
        """One level for all tokens."""
        at_least = np.where(np.arange(n_levels + 1) <= level, n_tokens, 0).astype(np.int64)
        return cls(np.full(n_tokens, level, np.uint8), np.arange(n_tokens, dtype=np.int64), at_least)

    def __getstate__(self) -> dict[str, np.ndarray]:
        """What a copy or a pickle takes along: the plan without what was worked out from it."""
        return {"levels": self.levels, "order": self.order, "at_least": self.at_least}

    @property
    def n_tokens(self) -> int:
        return int(self.levels.shape[0])

    @property
    def n_levels(self) -> int:
        return int(self.at_least.shape[0]) - 1

    @cached_property
    def uniform(self) -> int | None:
        """The one level that every token has, or None for a mixed (or empty) batch."""
        if self.n_tokens == 0 or self.levels[self.order[0]] != self.levels[self.order[-1]]:
            return None
        return int(self.levels[0])

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(level, lo, hi) for each level that occurs, descending: rows ``order[lo:hi]`` have that level."""
        runs, lo = [], 0
        for level in range(self.n_levels, -1, -1):
            hi = int(self.at_least[level])
            if hi > lo:
                runs.append((level, lo, hi))
            lo = hi
        return tuple(runs)

    @cached_property
    def in_order(self) -> bool:
        """Whether the tokens come sorted, so that no row need be moved."""
        return bool((self.order[1:] > self.order[:-1]).all())

    @cached_property
    def inverse(self) -> np.ndarray:
        """int64 [n]: place of each token in ``order``."""
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(self.n_tokens, dtype=self.order.dtype)
        return inverse

    @cached_property
    def _remembered(self) -> dict[Hashable, object]:
        return {}

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gave the first time; for what an engine works out once per stretch, not once per layer."""
        if key not in self._remembered:
            self._remembered[key] = make()
        return self._remembered[key]  # type: ignore[return-value]

    @cached_property
    def _device_copies(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def on(self, device: torch.device, what: str = "levels") -> Tensor:
        """``levels``, ``order`` or ``inverse`` as an int64 tensor on ``device``, copied once."""
        key = (what, device)
        if key not in self._device_copies:
            self._device_copies[key] = torch.from_numpy(getattr(self, what).astype(np.int64)).to(device)
        return self._device_copies[key]
