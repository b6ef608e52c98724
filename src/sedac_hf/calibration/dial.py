"""From one number, the share that is needed, to a policy: schedule, compensation and law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sedac_hf.calibration.allocation import Allocation, mean_share, threshold_for
from sedac_hf.calibration.law import LawShape, centre_of, layer_configs, levels_of
from sedac_hf.configuration import Cut, Objective
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule
from sedac_hf.layer_config import LayerConfig
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime

Compensate = Callable[[int, Mapping[int, int], int], "LevelCompensation | None"]
"""(site, level -> width, n_levels) -> compensation."""

Forcing = tuple[list[OperatingPoint], list["LevelCompensation | None"]]
"""Points and compensation per FFN, as `SedacRuntime.forced` takes them."""

_STEPS = 40


@contextmanager
def prepared(runtime: SedacRuntime, dial: Dial) -> Iterator[None]:
    """Channel order or shadows of a dial in place, no policy; the runtime must be bare, and is bare afterwards."""
    runtime.weights.reorder(dial.channel_order)
    try:
        if dial.cut == "select":
            runtime.build_shadows(dial.shadow_bits)
        yield
    finally:
        runtime.uninstall()


@dataclass
class Dial:
    """All that calibration found, short of the share.

    Args:
        segments: for each FFN the checkpoint that governs it, -1 before the first.
        allocation: threshold -> operating points and their cost.
        compensate: fits compensation at given widths.
        risks: float32 [n_checkpoints, n], of tokens that the probes were not fitted on.
        probe_share: cost of the probes, as a share of all FFNs.
        gain: slope of C per predicted log harm; 0: constant level.
        offset: needed share that tokens turn out to use beyond what their levels stand for on average.
        refitted: level -> site -> compensation (of two levels, 1 the point) that takes the fitted one's place.
    """

    cut: Cut
    objective: Objective
    n_levels: int
    layers: tuple[int, ...]
    segments: tuple[int, ...]
    allocation: Allocation
    compensate: Compensate
    channel_order: tuple[Tensor | None, ...] | None
    shadow_bits: int
    probes: ProbeBank
    risk_scale: tuple[float, ...]
    risks: np.ndarray
    shape: LawShape
    probe_share: float
    gain: float = 0.0
    offset: float = 0.0
    refitted: dict[int, dict[int, LevelCompensation | None]] = field(default_factory=dict)
    _level_compensation: dict[int, LevelCompensation | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.governed = [i for i, segment in enumerate(self.segments) if segment >= 0]
        n = self.n_levels
        self.thresholds = {level: threshold_for(self.allocation, level / n, self.governed) for level in range(1, n)}
        shares = {level: self.allocation.shares(t) for level, t in self.thresholds.items()}
        weights = self.allocation.parameters[self.governed]
        self.segment_weight = np.zeros(len(self.layers))
        self.level_share = np.ones((len(self.layers), n + 1))  # needed share of a segment at a level
        for segment in range(len(self.layers)):
            inside = [i for i in self.governed if self.segments[i] == segment]
            parameters = self.allocation.parameters[inside]
            self.segment_weight[segment] = parameters.sum() / weights.sum()
            for level in range(1, n):
                self.level_share[segment, level] = shares[level][inside] @ parameters / max(parameters.sum(), 1.0)

    @property
    def deciding_share(self) -> float:
        """Cost of the probes that the law needs, as a share of all FFNs."""
        return self.probe_share if self.gain else 0.0

    @property
    def least_share(self) -> float:
        """The smallest needed share that the dial reaches."""
        lowest = threshold_for(self.allocation, 1 / self.n_levels)
        return self.deciding_share + mean_share(self.allocation, lowest, range(len(self.segments)))

    def constant(self, share: float) -> Forcing:
        """The best constant level: one operating point per FFN for all tokens, at ``share`` of all FFNs, no probes."""
        return self._forcing(self.allocation.points(threshold_for(self.allocation, share)))

    def level_points(self, level: int, share: float) -> Forcing:
        """What all tokens at one level would run, nothing refitted.

        share: the dial's position, for the FFNs before the first checkpoint.
        """
        points = self.allocation.points(self.thresholds[level])
        position = self.allocation.points(self._threshold(share))
        return self._forcing([position[i] if segment < 0 else points[i] for i, segment in enumerate(self.segments)])

    def levels_in_use(self, share: float, least: float) -> list[int]:
        """Levels below the top that at least this part of the known tokens is given at some checkpoint."""
        levels = levels_of(self.policy(share).layer_configs, self._decay, self.n_levels, self.risks)
        counts = np.stack([np.bincount(row, minlength=self.n_levels + 1) / max(row.size, 1) for row in levels])
        return [level for level in range(1, self.n_levels) if counts[:, level].max() >= least]

    def _forcing(self, points: list[OperatingPoint]) -> Forcing:
        return points, [self.compensate(i, {1: point.width}, 2) for i, point in enumerate(points)]

    def _threshold(self, share: float) -> float:
        return threshold_for(self.allocation, share - self.deciding_share - self.offset)

    def policy(self, share: float) -> Policy:
        """The policy whose tokens need ``share`` of all FFNs, probes included, on average."""
        threshold = self._threshold(share)
        points = self.allocation.points(threshold)
        keep = mean_share(self.allocation, threshold, self.governed)
        constant_level = None
        if self.gain == 0:
            constant_level = int(np.clip(np.ceil(keep * self.n_levels - 1e-9), 1, self.n_levels - 1))
            configs = self._constant_law(keep, constant_level)
        else:
            configs = self._graded_law(keep)
        levels = levels_of(configs, self._decay, self.n_levels, self.risks)
        return Policy(
            cut=self.cut,
            objective=self.objective,
            layer_configs=configs,
            confidence_decay=self._decay,
            schedule=self._schedule(points, constant_level),
            probes=self.probes,
            risk_scale=self.risk_scale,
            channel_order=self.channel_order,
            shadow_bits=self.shadow_bits,
            compensation=self._compensation(points, constant_level),
            typical_level=int(Counter(levels.flatten().tolist()).most_common(1)[0][0]),
        )

    @property
    def _decay(self) -> float:
        return self.shape.decay if self.gain else 0.0

    def _constant_law(self, keep: float, level: int) -> tuple[LayerConfig, ...]:
        n = self.n_levels
        # The keep itself where it lies within the level, else the nearest that does.
        keep = float(np.clip(keep, (level - 1 + 1e-3) / n, (level - 1e-3) / n))
        flat = LawShape(0.0, (0.0,) * len(self.layers), (0.0,) * len(self.layers), 1.0)
        return layer_configs(flat, self.layers, max(centre_of(keep), 0.0), 0.0, self.risks)

    def _graded_law(self, keep: float) -> tuple[LayerConfig, ...]:
        low, high = -2.0, 4.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            configs = layer_configs(self.shape, self.layers, middle, self.gain, self.risks)
            if self.expected_share(configs) > keep:
                low = middle
            else:
                high = middle
        return layer_configs(self.shape, self.layers, high, self.gain, self.risks)

    def expected_share(self, configs: tuple[LayerConfig, ...]) -> float:
        """Needed share of the governed FFNs, from the levels that the law gives to the known risks."""
        levels = levels_of(configs, self._decay, self.n_levels, self.risks)
        per_segment = [row[level].mean() for row, level in zip(self.level_share, levels, strict=True)]
        return float(self.segment_weight @ np.asarray(per_segment))

    def _schedule(self, points: Sequence[OperatingPoint], constant_level: int | None) -> WidthSchedule:
        per_level = {level: self.allocation.points(t) for level, t in self.thresholds.items()}
        if constant_level is not None:
            per_level[constant_level] = list(points)
        rows = []
        for i, segment in enumerate(self.segments):
            whole = OperatingPoint(self._units(i))
            inner = [points[i] if segment < 0 else per_level[level][i] for level in range(1, self.n_levels)]
            rows.append((OperatingPoint(0), *inner, whole))
        return WidthSchedule(self.n_levels, tuple(rows))

    def _with_refits(self, site: int, fitted: LevelCompensation | None) -> LevelCompensation | None:
        for level, sites in self.refitted.items():
            refit = sites.get(site)
            if fitted is not None and refit is not None:
                fitted = fitted.replaced(level, refit, 1)
        return fitted

    def _units(self, site: int) -> int:
        return self.allocation.points(0.0)[site].width

    def _compensation(
        self, points: Sequence[OperatingPoint], constant_level: int | None
    ) -> tuple[LevelCompensation | None, ...] | None:
        if self.cut == "select":
            return None
        result = []
        inner = range(1, self.n_levels)
        for i, segment in enumerate(self.segments):
            if segment < 0:
                result.append(self.compensate(i, dict.fromkeys(inner, points[i].width), self.n_levels))
                continue
            widths = {level: self.allocation.points(self.thresholds[level])[i].width for level in inner}
            if constant_level is not None:
                widths[constant_level] = points[i].width
                result.append(self.compensate(i, widths, self.n_levels))
                continue
            if i not in self._level_compensation:
                self._level_compensation[i] = self.compensate(i, widths, self.n_levels)
            result.append(self._with_refits(i, self._level_compensation[i]))
        return tuple(result)
