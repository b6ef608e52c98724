"""What a keep level means in each FFN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from sedac_hf.errors import ConfigError
from sedac_hf.ops.contract import OperatingPoint


def align_width(width: float, intermediate_size: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """A width rounded up to a multiple of 64 units where the FFN has at least 16 of these, else of 16 bytes."""
    least = max(16 // dtype.itemsize, 1)
    step = 64 if intermediate_size >= 16 * 64 else least
    return min(max(math.ceil(width / step) * step, 0), intermediate_size)


@dataclass(frozen=True)
class WidthSchedule:
    """One operating point per FFN and level.

    points: per FFN (in site order) a tuple indexed by level 0..n_levels; level 0 has width 0, level n_levels is the
    whole FFN, and a higher level never uses less. FFNs before the first checkpoint have one fixed point: there levels
    1..n_levels - 1 are alike.

    Raises:
        ConfigError: the points are not monotone, or their ends are wrong.
    """

    n_levels: int
    points: tuple[tuple[OperatingPoint, ...], ...]

    def __post_init__(self) -> None:
        for i, row in enumerate(self.points):
            if len(row) != self.n_levels + 1:
                raise ConfigError(f"FFN {i} needs {self.n_levels + 1} operating points, one per level, got {len(row)}")
            if row[0].width != 0 or row[-1].importance_min != 0:
                raise ConfigError(f"FFN {i}: level 0 must have width 0 and the top level no threshold, got {row}")
            for low, high in pairwise(row[1:]):
                if low.width > high.width or low.importance_min < high.importance_min:
                    raise ConfigError(f"FFN {i}: a higher level must not use less, got {low} below {high}")
            if any(not math.isfinite(point.importance_min) or point.importance_min < 0 for point in row):
                raise ConfigError(f"FFN {i}: thresholds must be finite and 0 or more, got {row}")

    def check(self, intermediate_sizes: Sequence[int]) -> None:
        """Raise ConfigError unless the schedule is for FFNs of these sizes."""
        sizes = [row[-1].width for row in self.points]
        if sizes != list(intermediate_sizes):
            raise ConfigError(f"the schedule is for FFNs of {sizes} units, the model has {list(intermediate_sizes)}")

    @property
    def selects(self) -> bool:
        """Whether any point chooses units by importance."""
        return any(point.importance_min > 0 for row in self.points for point in row)

    def to_dict(self) -> dict[str, Any]:
        """JSON form: widths and thresholds per FFN, levels 0..n_levels."""
        return {
            "n_levels": self.n_levels,
            "widths": [[point.width for point in row] for row in self.points],
            "importance_min": [[point.importance_min for point in row] for row in self.points],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WidthSchedule:
        """Read `to_dict`'s form.

        Raises:
            ConfigError: a key is missing, or the numbers do not make a schedule.
        """
        try:
            points = tuple(
                tuple(OperatingPoint(int(w), float(t)) for w, t in zip(widths, thresholds, strict=True))
                for widths, thresholds in zip(values["widths"], values["importance_min"], strict=True)
            )
            return cls(int(values["n_levels"]), points)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the schedule cannot be read: {error!r}") from error
