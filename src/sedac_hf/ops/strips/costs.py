"""What an FFN's products cost on this machine: a table of seconds over tokens and units, measured at first use.

The strip engine asks it where to cut (`plan.py`), and whoever chooses between engines can ask what the whole FFN
would cost at n tokens. One table serves a device, a dtype, a hidden size, a number of matrices and a number of
threads; it is made when a batch of mixed widths first meets such an FFN, on the FFN's own weights (no copy), in about
a second, and kept for the life of the process. ``SEDAC_MEASURE_COSTS=0`` leaves out the measuring, as does whatever
goes wrong in it; stated rates then take its place, as they do in the products that would take too long.

Only the speed depends on any of this: cuts differ in rounding alone. The rates give the cuts wherever the measured
table does not say that others are clearly better, so two processes on one machine normally cut alike; without
measuring they always do. Each time is of weights that come from memory, as they do in a model larger than the caches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sedac_hf.environment import environment_measure_costs
from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.strips.cold_clock import ColdClock
from sedac_hf.ops.strips.columns import fill_outputs, fill_units
from sedac_hf.ops.strips.plan import PlannerClass, StripPlanner

logger = logging.getLogger(__name__)

Part = Literal["hidden", "down", "whole"]
Product = Callable[[int, int], object]  # (tokens, units)

TOKENS = (1, 4, 16, 64, 256, 1024)
UNITS = (1, 16, 64, 256, 1024, 4096)
LEAST_WEIGHTS = 1 << 20  # a smaller FFN is not measured
LONGEST_S = 0.01  # a product that would take longer is reckoned from a smaller one, which is as good as measured there
BUDGET_S = 1.0  # per table; what is left by then is reckoned as well


class CostModel(NamedTuple):
    """Rates that stand in where nothing was measured.

    bytes_per_s: reading weights; flops_per_s: products of float32 (of less precise types in proportion to their size);
    per_strip_s: launches and calls of one strip; act_bytes_per_s: reading and writing activations.
    """

    bytes_per_s: float
    flops_per_s: float
    per_strip_s: float
    act_bytes_per_s: float


# Two desktop or server cores; one current data-centre GPU, whose float32 products run at a quarter of its bfloat16.
CPU_COSTS = CostModel(15e9, 150e9, 80e-6, 40e9)
GPU_COSTS = CostModel(3e12, 200e12, 20e-6, 2e12)


class CostKey(NamedTuple):
    """What a table holds for; threads: torch's on a CPU, else 0."""

    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    matrices: int
    threads: int

    @classmethod
    def of(cls, weights: FFNWeights) -> CostKey:
        up = weights.up
        return cls(
            device=up.device,
            dtype=up.dtype,
            hidden_size=weights.hidden_size,
            matrices=weights.matrices,
            threads=torch.get_num_threads() if up.device.type == "cpu" else 0,
        )

    def __str__(self) -> str:
        """As in "float32 on cpu, hidden size 896, 3 matrices, 2 threads"."""
        text = f"{str(self.dtype).removeprefix('torch.')} on {self.device}, hidden size {self.hidden_size}"
        return f"{text}, {self.matrices} matrices" + (f", {self.threads} threads" if self.threads else "")


class Times(NamedTuple):
    """Seconds [len(TOKENS), len(UNITS)] of ``act(gate x) * up x`` and of down."""

    hidden: NDArray[np.float64]
    down: NDArray[np.float64]

    def of(self, part: Part) -> NDArray[np.float64]:
        return self.hidden + self.down if part == "whole" else self.hidden if part == "hidden" else self.down


@dataclass(eq=False)
class CostTable:
    """The times of one kind of FFN; ``measured`` is None where the rates stand alone."""

    key: CostKey
    prior: Times
    measured: Times | None
    _planners: dict[tuple[Part, PlannerClass], StripPlanner] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Where its times come from: "measured" on this machine, or "stated" by the rates."""
        return "stated" if self.measured is None else "measured"

    def planner(self, part: Part, planner_class: PlannerClass) -> StripPlanner:
        """The planner over a part's times, made once; it also answers ``seconds(tokens, units)``.

        ``planner("whole", ...).seconds(n, intermediate_size)`` is what the whole FFN would cost at n tokens.
        """
        made = self._planners.get((part, planner_class))
        if made is None:
            tokens, units = np.array(TOKENS, np.float64), np.array(UNITS, np.float64)
            measured = None if self.measured is None else self.measured.of(part)
            made = self._planners[part, planner_class] = planner_class(tokens, units, self.prior.of(part), measured)
        return made


_tables: dict[tuple[CostKey, bool], CostTable] = {}
measuring = threading.Lock()  # one at a time: two would time each other


def cost_table(weights: FFNWeights) -> CostTable:
    """The table for this FFN, made at its first use.

    Raises:
        ConfigError: ``SEDAC_MEASURE_COSTS`` is neither a yes nor a no.
    """
    key = CostKey.of(weights)
    wanted = environment_measure_costs()
    table = _tables.get((key, wanted))
    if table is None:
        with measuring:
            table = _tables.get((key, wanted))
            if table is None:
                table = _tables[key, wanted] = CostTable(
                    key, _stated(key), _measured(key, weights) if wanted else None
                )
    return table


def known_tables() -> tuple[CostTable, ...]:
    """The tables of this process so far."""
    return tuple(_tables.values())


def forget_tables() -> None:
    """Measure anew at the next use, for a process whose machine has changed under it."""
    _tables.clear()


def too_small(weights: FFNWeights) -> bool:
    """Whether measuring is not worth the while: calls cost more than products there."""
    return weights.matrices * weights.up.numel() < LEAST_WEIGHTS


def _stated(key: CostKey) -> Times:
    """The times by the rates."""
    rates = CPU_COSTS if key.device.type == "cpu" else GPU_COSTS
    size, d = key.dtype.itemsize, key.hidden_size
    flops_per_s = rates.flops_per_s * 4 / size
    n, u = np.array(TOKENS, np.float64)[:, None], np.array(UNITS, np.float64)[None, :]

    def product(matrices: int, activations: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = np.maximum(matrices * d * u * size / rates.bytes_per_s, 2 * matrices * d * u * n / flops_per_s)
        return np.asarray(weights + activations * size / rates.act_bytes_per_s + rates.per_strip_s / 2)

    return Times(product(key.matrices - 1, key.matrices * n * u), product(1, 2 * n * d + 0 * u))


def _measured(key: CostKey, weights: FFNWeights) -> Times | None:
    """The times on these weights; None, and why in the log, where they cannot be had."""
    if key.device.type not in ("cpu", "cuda") or too_small(weights):
        return None
    start = time.perf_counter()
    try:
        with torch.no_grad():
            times = _measure(weights, start + BUDGET_S)
    except Exception as error:  # out of memory, an exotic weight: the rates do
        logger.warning("the costs of an FFN could not be measured, so stated rates are used: %s", error)
        return None
    spent = time.perf_counter() - start
    logger.info(
        "measured what FFNs of hidden size %d (%s, %s, %d threads) cost, in %.2f s",
        *(key.hidden_size, key.dtype, key.device, key.threads, spent),
    )
    return times


def _measure(weights: FFNWeights, deadline: float) -> Times:
    products = _by_rows(weights) if accumulates(weights.up.dtype) else _by_columns(weights)
    clock = ColdClock(weights.up.device)
    hidden, down = (np.zeros((len(TOKENS), len(UNITS))) for _ in range(2))
    for i, n in enumerate(TOKENS):
        for j, u in enumerate(UNITS):
            hidden[i, j], down[i, j] = expected = _expected(hidden, i, j), _expected(down, i, j)
            if u > weights.intermediate_size or max(expected) > LONGEST_S or time.perf_counter() > deadline:
                continue
            hidden[i, j], down[i, j] = clock.seconds(*(partial(product, n, u) for product in products))
    return Times(_monotone(hidden), _monotone(down))


def accumulates(dtype: torch.dtype) -> bool:
    """Whether down's partial sums may be added up in this dtype, so that down too runs in strips of units."""
    return dtype not in (torch.bfloat16, torch.float16)


def _by_rows(weights: FFNWeights) -> tuple[Product, Product]:
    """What the strip engine does for n tokens and u units where `accumulates`: hidden units, then down."""
    x, y, h = _operands(weights)

    def down(n: int, u: int) -> None:
        y[:n].addmm_(h[: n * u].view(n, u), weights.down[:, :u].T)

    return lambda n, u: weights.hidden(x[:n], 0, u), down


def _by_columns(weights: FFNWeights) -> tuple[Product, Product]:
    """The same where it does not."""
    x, y, h = _operands(weights)

    def units(n: int, u: int) -> Tensor:
        return h[: n * u].view(u, n)

    return (
        lambda n, u: fill_units(units(n, u), x[:n], weights, 0, u),
        lambda n, u: fill_outputs(y.T[:, :n], units(n, u), weights),
    )


def _operands(weights: FFNWeights) -> tuple[Tensor, Tensor, Tensor]:
    """x and y [tokens, d], and room for hidden units; the caller's random numbers stay as they are."""
    noise = torch.randn(TOKENS[-1], weights.hidden_size, generator=torch.Generator().manual_seed(0))
    x = noise.to(weights.up.device, weights.up.dtype)
    return x, torch.zeros_like(x), x.new_zeros(TOKENS[-1] * min(UNITS[-1], weights.intermediate_size))


def _expected(times: NDArray[np.float64], i: int, j: int) -> float:
    """The time of a cell in proportion to the one beside or above it; 0 for the first."""
    if j > 0:
        return float(times[i, j - 1]) * UNITS[j] / UNITS[j - 1]
    return float(times[i - 1, j]) * TOKENS[i] / TOKENS[i - 1] if i > 0 else 0.0


def _monotone(times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Never less for more tokens or more units: between the least such table above these times and the largest below,
    so that one time that came out too long or too short moves few others."""
    if not bool((times > 0).all()):
        raise RuntimeError("no product of this FFN could be timed")
    above = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
    below = np.minimum.accumulate(np.minimum.accumulate(times[::-1, ::-1], axis=0), axis=1)[::-1, ::-1]
    return np.asarray(np.sqrt(above * below))
