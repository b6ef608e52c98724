"""What ran: exits per checkpoint, the needed share and the saved share of FFN compute, kept apart.

The *needed share* is what the policy's tokens use, per token, and is counted in bytes of a bf16 base whatever the
running dtype, so that figures of different machines compare. The *saved share* is what this run did not spend: a batch
reads a weight once, masking saves nothing. Shadow, probes and compensation are cost in both.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from sedac_hf.ops.strips.costs import known_tables

NEEDED_ELEMENT_BYTES = 2  # the needed share is quoted for a bf16 base


@dataclass(frozen=True)
class SiteCost:
    """Cost of one FFN: per unit, and what deciding costs per token whatever the level.

    units: that a token has at full width, of all its experts where the FFN is made of experts; unit_parameters:
    weights of one hidden unit; element_bytes: that a weight is kept in; chosen_parameters: what a unit that was chosen
    costs beside the choosing, if not all of it; all_units: of all experts.
    """

    units: int
    unit_parameters: int
    element_bytes: float
    shadow_bytes: int = 0
    shadow_multiply_adds: int = 0
    chosen_parameters: int = 0
    all_units: int = 0

    def whole_read(self, n_tokens: int) -> int:
        """Units that a call of so many tokens reads at full width: at most those of all experts."""
        return min(self.units * n_tokens, self.all_units) if self.all_units and n_tokens else self.units

    @property
    def parameters(self) -> int:
        return self.units * self.unit_parameters


@dataclass
class CheckpointStats:
    """Totals of one checkpoint: tokens seen (prompt tokens at full width not among them), exits, mean ratio.

    Where layers run in a loop, a token is seen each time.
    """

    layer_idx: int
    tokens: int = 0
    exits: int = 0
    ratio_sum: float = 0.0

    @property
    def mean_ratio(self) -> float:
        return self.ratio_sum / self.tokens if self.tokens else 0.0


@dataclass
class SedacStats:
    """A snapshot of a runtime's totals since the last reset.

    Shares are of all FFNs and all tokens; padding positions of a batch run, and count, as tokens. ``needed_*``: what
    the tokens' operating points use; ``saved_*``: what this run did not spend. ``fail_safe``: token x checkpoint
    decisions sent to full width because of an unusable risk, an unreadable call or a checkpoint that was left out.
    ``choices``: how often ``generate`` chose to cut or to run at full width, with its reason. ``memory``: bytes held,
    of the base and of what SEDAC keeps beside it (`sedac_hf.runtime.memory.MemoryUse`). ``strip_costs``: for each kind
    of FFN that this process has cut in strips so far, in words, whether the times that its strips are cut by were
    "measured" on this machine or "stated" (`sedac_hf.ops.strips.costs`); it outlives a reset. ``masked``: how many
    FFNs can be cut by zeroing alone, which computes all of them, by the reason.
    """

    tokens: int
    forward_passes: int
    checkpoints: list[CheckpointStats]
    needed_bytes_share: float
    needed_multiply_adds_share: float
    saved_bytes_share: float
    saved_multiply_adds_share: float
    fail_safe: int
    engines: dict[str, int]
    choices: dict[str, int]
    memory: dict[str, int] = field(default_factory=dict)
    strip_costs: dict[str, str] = field(default_factory=dict)
    masked: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        values = asdict(self)
        for item, checkpoint in zip(values["checkpoints"], self.checkpoints, strict=True):
            item["mean_ratio"] = checkpoint.mean_ratio
            del item["ratio_sum"]
        return values


def joined_origins(origins: Iterable[str]) -> str:
    """Origins of one kind's strip costs as one text: "measured", "stated", or both, where they differ."""
    return " and ".join(sorted({part for origin in origins for part in origin.split(" and ")}))


def strip_costs() -> dict[str, str]:
    """What `SedacStats.strip_costs` holds, of the process so far.

    A kind has both origins where ``SEDAC_MEASURE_COSTS`` was changed in between.
    """
    found: dict[str, list[str]] = {}
    for table in known_tables():
        found.setdefault(str(table.key), []).append(table.origin)
    return {kind: joined_origins(origins) for kind, origins in found.items()}


@dataclass
class _Totals:
    tokens: int = 0
    passes: int = 0
    fail_safe: int = 0
    dense_needed: float = 0.0  # parameters x tokens
    needed_parameters: float = 0.0  # parameters x tokens
    needed_extra_bytes: float = 0.0
    extra_multiply_adds: float = 0.0
    dense_bytes: float = 0.0
    spent_bytes: float = 0.0
    spent_multiply_adds: float = 0.0
    pending: list[tuple[int, torch.Tensor]] = field(default_factory=list)


class Tally:
    """Thread-safe running totals; device numbers are kept as tensors and read only when a snapshot is taken."""

    def __init__(self, costs: tuple[SiteCost, ...], checkpoint_layers: tuple[int, ...]) -> None:
        self.costs = costs
        self._layers = checkpoint_layers
        self._lock = threading.Lock()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def reset(self) -> None:
        """Start again from zero."""
        with self._lock:
            self._totals = _Totals()
            self._checkpoints = [CheckpointStats(layer) for layer in self._layers]
            self._engines: Counter[str] = Counter()
            self._choices: Counter[str] = Counter()

    def choice(self, text: str) -> None:
        """One ``generate`` call's choice."""
        with self._lock:
            self._choices[text] += 1

    def fail_safe(self, count: int) -> None:
        """Decisions that were sent to full width."""
        with self._lock:
            self._totals.fail_safe += count

    def begin(self, n_tokens: int) -> None:
        """One forward pass over so many tokens."""
        with self._lock:
            self._totals.tokens += n_tokens
            self._totals.passes += 1

    def recount(self, n_tokens: int) -> None:
        """The pass that was begun last has so many tokens more (or fewer, below 0)."""
        with self._lock:
            self._totals.tokens += n_tokens

    def checkpoint(self, idx: int, exited: np.ndarray, ratio: np.ndarray, failed: int) -> None:
        """Decisions at one checkpoint: exited bool [n], ratio float32 [n]."""
        with self._lock:
            stats = self._checkpoints[idx]
            stats.tokens += int(exited.shape[0])
            stats.exits += int(exited.sum())
            stats.ratio_sum += float(ratio.sum(dtype=np.float64))
            self._totals.fail_safe += failed

    def probe(self, parameters: int, n_tokens: int, *, calls: int = 1) -> None:
        """Calls of one probe; its weights are read once per call and used for every token."""
        with self._lock:
            totals = self._totals
            totals.needed_extra_bytes += NEEDED_ELEMENT_BYTES * parameters * n_tokens
            totals.spent_bytes += 4 * parameters * calls  # probes compute in float32
            totals.extra_multiply_adds += parameters * n_tokens
            totals.spent_multiply_adds += parameters * n_tokens

    def ffn(
        self,
        site: int,
        *,
        engine: str,
        tokens: int,
        needed: int | torch.Tensor,
        read: int,
        computed: int,
        shadow: bool = False,
        extra_parameters: int = 0,
        extra_read: int = 0,
        calls: int = 1,
        whole_read: int | None = None,
    ) -> None:
        """Calls of one FFN: units needed (summed over tokens), units read, unit x token products computed.

        shadow: whether these calls decided by the shadow; extra_parameters: of the compensation, summed over tokens;
        extra_read: those of a call's levels, each read once; whole_read: units that the calls would have read at full
        width, where that is known. All figures are totals over the ``calls``.
        """
        cost = self.costs[site]
        if whole_read is None:
            whole_read = cost.whole_read(tokens // max(calls, 1)) * calls
        with self._lock:
            totals = self._totals
            self._engines[engine] += calls
            totals.dense_needed += cost.parameters * tokens
            totals.dense_bytes += cost.element_bytes * cost.unit_parameters * whole_read
            totals.spent_bytes += cost.element_bytes * (cost.unit_parameters * read + extra_read)
            totals.spent_multiply_adds += cost.unit_parameters * computed + extra_parameters
            totals.needed_extra_bytes += NEEDED_ELEMENT_BYTES * extra_parameters
            totals.extra_multiply_adds += extra_parameters
            chosen = cost.unit_parameters
            if shadow:
                if cost.chosen_parameters:  # then deciding and computing are the same reads
                    chosen = cost.chosen_parameters
                if chosen == cost.unit_parameters:
                    totals.spent_bytes += cost.shadow_bytes * whole_read / cost.units
                    totals.spent_multiply_adds += cost.shadow_multiply_adds * tokens
                totals.needed_extra_bytes += cost.shadow_bytes * tokens
                totals.extra_multiply_adds += cost.shadow_multiply_adds * tokens
            if isinstance(needed, torch.Tensor):
                totals.pending.append((chosen, needed.detach()))
            else:
                totals.needed_parameters += chosen * needed

    def snapshot(self) -> SedacStats:
        """The totals so far; reads pending device numbers."""
        with self._lock:
            totals = self._totals
            for parameters, needed in totals.pending:
                totals.needed_parameters += parameters * float(needed)
            totals.pending.clear()
            dense = max(totals.dense_needed, 1.0)
            nothing = totals.dense_needed == 0
            return SedacStats(
                tokens=totals.tokens,
                forward_passes=totals.passes,
                checkpoints=[CheckpointStats(**asdict(item)) for item in self._checkpoints],
                needed_bytes_share=1.0
                if nothing
                else (totals.needed_parameters + totals.needed_extra_bytes / NEEDED_ELEMENT_BYTES) / dense,
                needed_multiply_adds_share=1.0
                if nothing
                else (totals.needed_parameters + totals.extra_multiply_adds) / dense,
                saved_bytes_share=0.0 if nothing else 1 - totals.spent_bytes / totals.dense_bytes,
                saved_multiply_adds_share=0.0 if nothing else 1 - totals.spent_multiply_adds / dense,
                fail_safe=totals.fail_safe,
                engines=dict(self._engines),
                choices=dict(self._choices),
            )
