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
from sedac_hf.ffn.experts import Experts
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
        cost.units * float(np.square(values[: len(values) // 2]).sum()) / len(values)
        for cost, values in zip(runtime.weights.costs(), importance, strict=True)
    ]
    measured = sensitivities(runtime, windows, points, left_out, progress=progress)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    overhead = np.asarray([cost.shadow_bytes for cost in costs]) / (NEEDED_ELEMENT_BYTES * parameters)
    chosen = [(cost.chosen_parameters or cost.unit_parameters) / cost.unit_parameters for cost in costs]
    return SelectAllocation(importance, measured, sizes, parameters, overhead, np.asarray(chosen))


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
    for i, site in enumerate(runtime.sites):
        if site.experts is not None:
            worth.append(statistics.power[i].sqrt() * site.experts.down_norms().cpu())
            continue
        norm = norms(site.parts()[2], dim=0).cpu()
        # Tied weights have one order: by what their units do in all of their uses.
        uses = [j for j, other in enumerate(runtime.sites) if (other.origin or other) is (site.origin or site)]
        power = torch.stack([statistics.power[j] for j in uses]).mean(dim=0)
        worth.append(power.sqrt() * norm)
    order = tuple(values.argsort(dim=-1, descending=True, stable=True) for values in worth)
    runtime.weights.reorder(order)
    costs = runtime.weights.costs()
    parameters = np.asarray([cost.parameters for cost in costs], dtype=np.float64)
    compensator = Compensator(runtime, statistics, order, _rank(runtime, statistics, n_levels, reserved))
    ordered = [_by_place(values, places).double().numpy() for values, places in zip(worth, order, strict=True)]
    points = [OperatingPoint(max(site.intermediate_size // 2, 1)) for site in runtime.sites]
    left_out = [float(np.square(values[point.width :]).sum()) for values, point in zip(ordered, points, strict=True)]
    compensation = [compensator(i, {1: point.width}, 2) for i, point in enumerate(points)]
    measured = sensitivities(runtime, windows, points, left_out, compensation=compensation, progress=progress)
    own = tuple(None if site.origin else places for site, places in zip(runtime.sites, order, strict=True))
    ranks = [0 if site.experts else compensator.rank for site in runtime.sites]
    return own, compensator, TruncateAllocation(ordered, measured, parameters, runtime.hidden_size, ranks)


def _by_place(worth: Tensor, order: Tensor) -> Tensor:
    """Worth [f] in channel order; of experts [E, f] the root of the summed squares at each place: one token's left-out
    units are those behind one place in all of its experts."""
    values = worth.gather(-1, order)
    return values if values.dim() == 1 else values.square().sum(0).sqrt()


def _rank(runtime: SedacRuntime, statistics: Statistics, n_levels: int, reserved: int) -> int:
    """Rank of the compensation: what pays, as far as the memory cap allows (all levels of all FFNs are held).

    Widths are not known yet: a pair is counted as if its level had all units.
    """
    single = [i for i, site in enumerate(runtime.sites) if site.experts is None]
    if any(statistics.moment[i] is None for i in single) or not single:
        return 0
    d, item = runtime.hidden_size, running_dtype(runtime.model).itemsize
    sizes = [runtime.sites[i].intermediate_size for i in single]
    orders = 8 * sum(mean.numel() for mean in statistics.mean)
    biases = (4 + item) * (n_levels + 1) * d * len(runtime.sites)
    per_rank = item * (n_levels - 1) * sum(d + f for f in sizes)
    room = runtime.memory().cap - reserved - orders - biases
    return max(0, min(max(d // _RANK_DIVISOR, 4), room // per_rank))


def _left_means(experts: Experts, mean: Tensor) -> Tensor:
    """float32 [f, d]: what the units at each place add to the output on average, over all experts; means [E, f] and
    the weights are in channel order."""
    total = torch.zeros(experts.intermediate_size, experts.hidden_size)
    for expert in range(experts.count):
        total += experts.down_of(expert).detach().T.float().cpu() * mean[expert][:, None]
    return total


class Compensator:
    """Fits compensation of a site from the statistics, put in channel order; made while that order is in place.

    Of experts a level has a bias alone: what the units behind its width add to the mean token.
    """

    def __init__(self, runtime: SedacRuntime, statistics: Statistics, order: tuple[Tensor, ...], rank: int) -> None:
        self.runtime = runtime
        self.mean = [mean.gather(-1, places) for mean, places in zip(statistics.mean, order, strict=True)]
        with_experts = [(i, site.experts) for i, site in enumerate(runtime.sites) if site.experts is not None]
        self._left = {i: _left_means(experts, self.mean[i]) for i, experts in with_experts}
        self.statistics = statistics
        self.order = order
        self.rank = rank

    def __call__(self, site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
        if site in self._left:
            bias = torch.zeros(n_levels + 1, self.runtime.hidden_size)
            for level, width in widths.items():
                if 0 < width < len(self._left[site]):
                    bias[level] = self._left[site][width:].sum(0)
            return LevelCompensation(bias, {}, n_levels)
        places = self.order[site]
        second = self.statistics.moment[site] if self.rank else None
        if second is not None:
            second = second[places[:, None], places]
        down = self.runtime.weights.natural_down(site)[:, places]
        return fit_compensation(down, self.mean[site], second, widths, n_levels, self.rank)


def no_compensation(site: int, widths: Mapping[int, int], n_levels: int) -> LevelCompensation | None:
    """Selection leaves a different rest for each token: nothing stands in for it."""
    return None
