"""In which order the products of an FFN run whose tokens are all as wide as the widest: one row per token as usual, or
one column (`columns.py`).

Which is quicker depends on the machine, the shape and the number of tokens. A whole FFN of 2048 x 8192 in bfloat16
took by columns 0.83 of the usual time at 5 tokens with AMX, and 1.84 on a Zen 4; 0.68 and 0.96 at 64, 0.86 and 1.05
at 256 (`benchmarks/layout.py`). So it is measured when so many tokens first meet such an FFN, on its own weights, in
a tenth of a second or so, and kept for the life of the process; where nothing is measured (`costs.py` says when) it
is columns from `STATED_LEAST` tokens on.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.environment import environment_measure_costs
from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.strips.cold_clock import ColdClock
from sedac_hf.ops.strips.columns import MOST_TOKENS, down_by_columns, hidden_by_columns, may_pay
from sedac_hf.ops.strips.costs import CostKey, measuring, too_small
from sedac_hf.ops.strips.plan import WORTH_A_CHANGE

logger = logging.getLogger(__name__)

STATED_LEAST = 64
SIZES = (8, 32, 128, MOST_TOKENS)  # tokens that are timed, each of them for batches of up to twice as many
UNITS = 1024  # that are timed, where there are more

_known: dict[tuple[CostKey, bool, int], float] = {}  # kind, down by units, size -> time by columns over that by rows


def by_columns(tokens: int, weights: FFNWeights) -> bool:
    """Whether so many tokens of one width take the order with one column per token. Not under autograd.

    Raises:
        ConfigError: ``SEDAC_MEASURE_COSTS`` is neither a yes nor a no.
    """
    if not may_pay(tokens, weights.up):
        return False
    stated = tokens >= STATED_LEAST
    if too_small(weights) or not environment_measure_costs():
        return stated
    size = next(size for size in SIZES if tokens <= 2 * size)
    key = CostKey.of(weights), weights.down.stride(0) == 1, size
    if key not in _known:
        with measuring:
            if key not in _known:
                _known[key] = _columns_over_rows(weights, size)
    # As with cuts, what is stated holds where the other is not clearly better: small noise must not move last bits.
    ratio = _known[key]
    return ratio * (1 - WORTH_A_CHANGE) <= 1 if stated else ratio < 1 - WORTH_A_CHANGE


def forget_orders() -> None:
    """Measure anew at the next use, for a process whose machine has changed under it."""
    _known.clear()


def hidden_by_rows(x: Tensor, weights: FFNWeights, width: int) -> Tensor:
    """Values [n, width] of the first units for x [n, d]."""
    return weights.hidden(x, 0, width)


def down_by_rows(h: Tensor, weights: FFNWeights) -> Tensor:
    """Down's output [n, d] for the first units, h [n, k]."""
    return functional.linear(h, weights.down[:, : h.shape[1]], weights.down_bias)


@torch.no_grad()
def _columns_over_rows(weights: FFNWeights, tokens: int) -> float:
    """1, so that what is stated holds, where it can't be measured."""
    units = min(UNITS, weights.intermediate_size)
    try:
        noise = torch.randn(tokens, weights.hidden_size, generator=torch.Generator().manual_seed(0))
        x = noise.to(weights.up.device, weights.up.dtype)
        columns, rows = ColdClock(x.device).seconds(
            lambda: down_by_columns(hidden_by_columns(x, weights, units), weights),
            lambda: down_by_rows(hidden_by_rows(x, weights, units), weights),
        )
    except Exception as error:  # out of memory, an exotic weight
        logger.warning("the order of an FFN's products could not be measured: %s", error)
        return 1.0
    return columns / rows
