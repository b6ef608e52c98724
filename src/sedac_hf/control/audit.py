"""The compiled controller checks, behind the device's back, what the device decided, and learns from the same log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sedac_hf.control.base import Controller
from sedac_hf.control.decision_log import DecisionLog, LoggedPasses
from sedac_hf.control.torch_engine import DeviceLaw

logger = logging.getLogger(__name__)

OnReplay = Callable[[LoggedPasses, NDArray[np.bool_], NDArray[np.float32]], None]
"""Called with the log and what the law makes of it: exited bool, ratio float32, both [n_checkpoints, n]."""


@dataclass(frozen=True)
class AuditCounts:
    """Totals of an audit.

    decisions: token x checkpoint decisions that were replayed; mismatches: those that were not the law's, always 0
    unless something is broken; dropped: tokens that the ring lost before they were collected.
    """

    decisions: int
    mismatches: int
    dropped: int


class DecisionAudit:
    """Replays the log through the block that decided, and moves the thresholds where they are to adapt.

    Args:
        controller: the law's owner, which `law` was made from.
        law, log: what the graphs run, and where they write.
        every: passes between two looks at the log; large passes make it look before the ring is full.
        adaptive_thresholds: feed the logged risks to `update_threshold`, once per look.
        on_replay: told what was decided, for statistics.
    """

    def __init__(
        self,
        controller: Controller,
        law: DeviceLaw,
        log: DecisionLog,
        *,
        every: int = 16,
        adaptive_thresholds: bool = False,
        on_replay: OnReplay | None = None,
    ) -> None:
        self._controller = controller
        self._law = law
        self._log = log
        self._every = every
        self._passes = 0
        self._tokens = 0
        self._decisions = 0
        self._mismatches = 0
        self._adaptive = adaptive_thresholds
        self._on_replay = on_replay

    @property
    def counts(self) -> AuditCounts:
        """Totals so far; call `flush` first to have everything in them."""
        return AuditCounts(self._decisions, self._mismatches, self._log.dropped)

    def after_pass(self, n_tokens: int) -> None:
        """Count a pass; every so many of them, look at what has arrived. Never waits for the device."""
        self._passes += 1
        self._tokens += n_tokens
        # What is asked for at one look arrives at the next, so two stretches must fit into the ring.
        if self._passes >= self._every or self._tokens >= self._log.capacity // 4:
            self._passes = self._tokens = 0
            self._replay(self._log.collect())

    def flush(self) -> AuditCounts:
        """Replay everything decided so far; waits for the device."""
        self._replay(self._log.flush())
        return self.counts

    def _replay(self, parts: list[LoggedPasses]) -> None:
        for part in parts:
            block = self._law.blocks[part.version]
            mismatches, exited, ratios = block.replay(part.risk_q, part.levels)
            if mismatches and not self._mismatches:
                logger.warning(
                    "%d of %d decisions of the captured graph are not the law's: the device computes integers "
                    "wrongly, or memory was overwritten; run eagerly and please report this",
                    mismatches,
                    part.levels.size,
                )
            self._mismatches += mismatches
            self._decisions += part.levels.size
            if self._on_replay is not None:
                self._on_replay(part, exited, ratios)
        if not parts:
            return
        if self._adaptive:
            for i, config in enumerate(self._controller.layer_configs):
                risks = [self._law.blocks[part.version].dequantise(i, part.risk_q[i]) for part in parts]
                self._controller.update_threshold(config.layer_idx, np.concatenate(risks))
        self._law.forget(parts[-1].version)
        self._law.upload()
