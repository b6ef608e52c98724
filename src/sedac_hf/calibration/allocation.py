"""How much of each FFN one global threshold leaves: the FFNs share out the work by what their units are worth.

Leaving out unit j of FFN i for a token harms about as ``c_i^2 * importance_j^2``, where the *sensitivity* ``c_i^2`` is
KL per unit of importance squared that is left out (see `sensitivity`). Minimising the summed harm at a given cost is
then one threshold T for all FFNs (the Lagrangian condition): unit j is used where ``c_i * importance_j >= T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from sedac_hf.ffn.schedule import align_width
from sedac_hf.ops.contract import OperatingPoint

_STEPS = 60


class Allocation(Protocol):
    """Maps one threshold to operating points and their cost."""

    @property
    def parameters(self) -> np.ndarray:
        """float64 [n_sites]: parameters of each whole FFN."""

    def points(self, threshold: float) -> list[OperatingPoint]:
        """One operating point per FFN."""

    def shares(self, threshold: float) -> np.ndarray:
        """float64 [n_sites]: needed share of each FFN, deciding and compensation counted."""

    @property
    def span(self) -> tuple[float, float]:
        """Thresholds between which something changes."""


class SelectAllocation:
    """Thresholds on the importance.

    Args:
        importance: per FFN a sorted sample of importances, float32 [m].
        sensitivity: c_i^2 per FFN.
        units: units per FFN.
        parameters: parameters of each whole FFN.
        overhead: cost of deciding, as a share of each FFN.
        chosen: what a chosen unit costs beside that, as a share of all its parameters; default: 1.
    """

    def __init__(
        self,
        importance: Sequence[np.ndarray],
        sensitivity: np.ndarray,
        units: Sequence[int],
        parameters: np.ndarray,
        overhead: np.ndarray,
        chosen: np.ndarray | None = None,
    ) -> None:
        self._scale = np.sqrt(sensitivity)
        self._sorted = [np.asarray(values, dtype=np.float64) for values in importance]
        self._units = list(units)
        self.parameters = np.asarray(parameters, dtype=np.float64)
        self._overhead = np.asarray(overhead, dtype=np.float64)
        self._chosen = np.ones(len(self._units)) if chosen is None else np.asarray(chosen, dtype=np.float64)

    @property
    def span(self) -> tuple[float, float]:
        tops = [scale * values[-1] for scale, values in zip(self._scale, self._sorted, strict=True)]
        return max(tops) * 1e-9, max(tops) * 2

    def points(self, threshold: float) -> list[OperatingPoint]:
        return [
            OperatingPoint(f, float(np.float32(threshold / scale)))
            for f, scale in zip(self._units, self._scale, strict=True)
        ]

    def shares(self, threshold: float) -> np.ndarray:
        used = [
            1 - np.searchsorted(values, threshold / scale) / len(values)
            for values, scale in zip(self._sorted, self._scale, strict=True)
        ]
        return np.asarray(used) * self._chosen + self._overhead


class TruncateAllocation:
    """Widths: as many units of the channel order as pass the threshold.

    Args:
        worth: per FFN the units' root mean square importance, most important first, float64 [f].
        sensitivity: c_i^2 per FFN.
        parameters: parameters of each whole FFN.
        hidden_size: rows of down.
        ranks: of each FFN's compensation.
    """

    def __init__(
        self,
        worth: Sequence[np.ndarray],
        sensitivity: np.ndarray,
        parameters: np.ndarray,
        hidden_size: int,
        ranks: Sequence[int],
    ) -> None:
        self._worth = [
            np.sort(np.asarray(values, dtype=np.float64)) * scale
            for values, scale in zip(worth, np.sqrt(sensitivity), strict=True)
        ]
        self.parameters = np.asarray(parameters, dtype=np.float64)
        self._hidden_size, self._ranks = hidden_size, list(ranks)

    @property
    def span(self) -> tuple[float, float]:
        top = max(values[-1] for values in self._worth)
        return top * 1e-9, top * 2

    def points(self, threshold: float) -> list[OperatingPoint]:
        widths = []
        for values in self._worth:
            f = len(values)
            width = f - int(np.searchsorted(values, threshold))
            widths.append(max(align_width(width, f), align_width(1, f)))
        return [OperatingPoint(width) for width in widths]

    def shares(self, threshold: float) -> np.ndarray:
        shares = []
        for point, values, whole, rank in zip(
            self.points(threshold), self._worth, self.parameters, self._ranks, strict=True
        ):
            f = len(values)
            extra = self.extra_parameters(point.width, f, rank)
            shares.append(point.width / f + extra / whole)
        return np.asarray(shares)

    def extra_parameters(self, width: int, units: int, rank: int) -> int:
        """Parameters of the compensation at a width."""
        if width >= units:
            return 0
        return self._hidden_size + rank * (self._hidden_size + width)


def threshold_for(allocation: Allocation, share: float, sites: Sequence[int] | None = None) -> float:
    """The largest threshold at which these FFNs together need at least ``share`` of their parameters.

    A share below what deciding alone costs gives the upper end of the span, one above all gives the lower end.
    """
    chosen = np.arange(len(allocation.parameters)) if sites is None else np.asarray(sites)
    low, high = (float(np.log(edge)) for edge in allocation.span)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if mean_share(allocation, float(np.exp(middle)), chosen) >= share:
            low = middle
        else:
            high = middle
    return float(np.exp(low))


def mean_share(allocation: Allocation, threshold: float, sites: Sequence[int] | np.ndarray) -> float:
    """Needed share of these FFNs together."""
    chosen = np.asarray(sites)
    weights = allocation.parameters[chosen]
    return float(allocation.shares(threshold)[chosen] @ weights / weights.sum())
