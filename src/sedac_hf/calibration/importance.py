"""What the units are worth: the channel order, and how the work is shared out between the FFNs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.allocation import SelectAllocation, TruncateAllocation
from sedac_hf.calibration.collect import Statistics
from sedac_hf.calibration.compensate import fit_compensation
from sedac_hf.calibration.sensitivity import sensitivities
from sedac_hf.errors import UnsupportedModelError
from sedac_hf.evaluation import WindowSet
from sedac_hf.ffn.channel_order import can_reorder
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.linears import describe, is_readable, norms
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.memory import running_dtype
from sedac_hf.runtime.stats import NEEDED_ELEMENT_BYTES

_RANK_DIVISOR = 24  # hidden size over rank of the compensation: the best trade measured, at 1.4% of FFN bytes


def select_allocation(
    runtime: SedacRuntime, statistics: Statistics, windows: WindowSet, progress: bool
) -> SelectAllocation:
    """Thresholds on the importance; each FFN's sensitivity is measured at its median importance."""
    importance = [values.double().numpy() for values in statistics.importance]
    sizes = [site.intermediate_size for site in runtime.sites]
    medians = [float(values[len(values) // 2]) for values in importance]
    points = [OperatingPoint(f, m) for f, m in zip(sizes, medians, strict=True)]
    left_out = [
        f * float(np.square(values[: len(values) // 2]).sum()) / len(values)
        for f, values in zip(sizes, importance, strict=True)
    ]
    measured = sensitivities(runtime, windows, points, left_out, progress=progress)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    overhead = np.asarray([cost.shadow_bytes for cost in costs]) / (NEEDED_ELEMENT_BYTES * parameters)
    return SelectAllocation(importance, measured, sizes, parameters, overhead)


def truncate_allocation(
    runtime: SedacRuntime,
    statistics: Statistics,
    windows: WindowSet,
    n_levels: int,
    reserved: int,
    progress: bool,
) -> tuple[tuple[Tensor | None, ...], Compensator, TruncateAllocation]:
    """Channel order (rms of h_j times the norm of down's column j), put in place; widths; compensation.

    Each FFN's sensitivity is measured at half its width, compensated. reserved: bytes of the memory cap that something
    else will take.

    Raises:
        UnsupportedModelError: weights that cannot be permuted.
    """
    for site in runtime.sites:
        if not (can_reorder(site) and all(is_readable(linear) for linear in site.linears)):
            raise UnsupportedModelError(
                f'objective="throughput" needs FFN weights that are in memory and can be put in another order, got '
                f"{', '.join(dict.fromkeys(describe(linear) for linear in site.linears))} at {site.name!r}: calibrate "
                'with objective="latency", where the exact gate can decide'
            )
    worth = []
    for site in runtime.sites:
        norm = norms(site.parts()[2], dim=0).cpu()
        # Tied weights have one order: by what their units do in all of their uses.
        uses = [i for i, other in enumerate(runtime.sites) if (other.origin or other) is (site.origin or site)]
        power = torch.stack([statistics.power[i] for i in uses]).mean(dim=0)
        worth.append(power.sqrt() * norm)
    order = tuple(values.argsort(descending=True, stable=True) for values in worth)
    runtime.weights.reorder(order)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    compensator = Compensator(runtime, statistics, order, _rank(runtime, statistics, n_levels, reserved))
    ordered = [values[places].double().numpy() for values, places in zip(worth, order, strict=True)]
    points = [OperatingPoint(max(site.intermediate_size // 2, 1)) for site in runtime.sites]
    left_out = [float(np.square(values[point.width :]).sum()) for values, point in zip(ordered, points, strict=True)]
    compensation = [compensator(i, {1: point.width}, 2) for i, point in enumerate(points)]
    measured = sensitivities(runtime, windows, points, left_out, compensation=compensation, progress=progress)
    own = tuple(None if site.origin else places for site, places in zip(runtime.sites, order, strict=True))
    return own, compensator, TruncateAllocation(ordered, measured, parameters, runtime.hidden_size, compensator.rank)


def _rank(runtime: SedacRuntime, statistics: Statistics, n_levels: int, reserved: int) -> int:
    """Rank of the compensation: what pays, as far as the memory cap allows (all levels of all FFNs are held).

    Widths are not known yet: a pair is counted as if its level had all units.
    """
    if any(second is None for second in statistics.moment):
        return 0
    d, item = runtime.hidden_size, running_dtype(runtime.model).itemsize
    sizes = [site.intermediate_size for site in runtime.sites]
    orders = 8 * sum(sizes)
    biases = (4 + item) * (n_levels + 1) * d * len(sizes)
    per_rank = item * (n_levels - 1) * sum(d + f for f in sizes)
    room = runtime.memory().cap - reserved - orders - biases
    return max(0, min(max(d // _RANK_DIVISOR, 4), room // per_rank))


class Compensator:
    """Fits compensation of a site from the statistics, put in channel order."""

    def __init__(self, runtime: SedacRuntime, statistics: Statistics, order: tuple[Tensor, ...], rank: int) -> None:
        self.runtime = runtime
        self.mean = [mean[places] for mean, places in zip(statistics.mean, order, strict=True)]
        self.statistics = statistics
        self.order = order
        self.rank = rank

    def __call__(self, site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
        places = self.order[site]
        second = self.statistics.moment[site] if self.rank else None
        if second is not None:
            second = second[places[:, None], places]
        down = self.runtime.weights.natural_down(site)[:, places]
        return fit_compensation(down, self.mean[site], second, widths, n_levels, self.rank)


def no_compensation(site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
    """Selection leaves a different rest for each token: nothing stands in for it."""
    return None
