"""What a controller decides: `ExitDecision` for one token, `CascadeDecisions` for a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ExitDecision(NamedTuple):
    """The cascade's answer for one token.

    should_exit: whether the exit holds at the last checkpoint (a hard exit, once taken, holds).
    exit_layer: ``layer_idx`` of the first checkpoint whose condition held, -1 if none did.
    accumulated_confidence: C after the last checkpoint; where a risk was NaN or infinite, C before that risk.
    soft_exit_ratio: share of FFN hidden units skipped after the last checkpoint, 0..1.
    """

    should_exit: bool
    exit_layer: int
    accumulated_confidence: float
    soft_exit_ratio: float


@dataclass(frozen=True, eq=False)
class CascadeDecisions:
    """The cascade's answers for a batch, as arrays; ``decisions[t]`` is token t's `ExitDecision`.

    should_exit: bool [n_tokens]; exit_layer: int64 [n_tokens]; accumulated_confidence, soft_exit_ratio: float32
    [n_tokens]; ratios: float32 [n_checkpoints, n_tokens], the share skipped after each checkpoint; levels: uint8
    [n_checkpoints, n_tokens], the same as keep levels 0..n_levels.
    """

    should_exit: NDArray[np.bool_]
    exit_layer: NDArray[np.int64]
    accumulated_confidence: NDArray[np.float32]
    soft_exit_ratio: NDArray[np.float32]
    ratios: NDArray[np.float32]
    levels: NDArray[np.uint8]

    def __len__(self) -> int:
        return int(self.should_exit.shape[0])

    def __getitem__(self, token: int) -> ExitDecision:
        return ExitDecision(
            bool(self.should_exit[token]),
            int(self.exit_layer[token]),
            float(self.accumulated_confidence[token]),
            float(self.soft_exit_ratio[token]),
        )

    def __iter__(self) -> Iterator[ExitDecision]:
        return (self[token] for token in range(len(self)))
