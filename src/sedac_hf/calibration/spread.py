"""How far the law may move tokens from the mean, measured at the dial's position on tokens no probe was fitted on.

Where the probes order tokens well a wide spread harms less than a constant level at equal share; near the dense end,
or with weak probes, it may harm more. So a few spreads, the constant level among them, are run and the best is taken.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.collect import stream
from sedac_hf.calibration.dial import Dial, prepared
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import Batch, WindowSet, kl_to, scored_logits
from sedac_hf.runtime import SedacRuntime

SPREADS = (0.5, 1.0)
"""Tried against 0, a constant level; 1 trusts the probes fully."""

_TOKENS = 6144
_REFERENCE_BYTES = 1 << 30  # dense logits held while settings are compared
_MISS = 0.004  # of the share, that need not be put right


class Reference:
    """Dense logits of a few windows, to compare settings of the runtime with."""

    def __init__(self, runtime: SedacRuntime, windows: WindowSet, tokens: int = _TOKENS) -> None:
        self.runtime = runtime
        self.batches: list[Batch] = []
        self.dense: list[Tensor] = []
        held, seen = 0, 0
        for batch in stream(runtime, windows, False, "reference"):
            logits = scored_logits(runtime.model, batch)
            held, seen = held + logits.numel() * logits.element_size(), seen + logits.shape[0]
            if self.batches and held > _REFERENCE_BYTES:
                break
            self.batches.append(batch)
            self.dense.append(logits)
            if seen >= tokens:
                break

    def kl(self, setting: AbstractContextManager[object] | None = None) -> tuple[float, float]:
        """(mean KL in nats, needed share of bytes) of the model as it is inside ``setting``.

        Raises:
            CalibrationError: the KL is not finite.
        """
        total, count = 0.0, 0
        with setting or nullcontext():
            self.runtime.tally.reset()
            for batch, dense in zip(self.batches, self.dense, strict=True):
                values = kl_to(dense, scored_logits(self.runtime.model, batch), torch.float32)
                total, count = total + float(values.double().sum()), count + values.numel()
            share = self.runtime.stats().needed_bytes_share
        if not math.isfinite(total):
            raise CalibrationError("the KL between full and cut output must be finite; got NaN or infinity")
        return max(total / count, 1e-12), share

    def constant_kl(self, dial: Dial, share: float) -> tuple[float, float]:
        """The same, of a dial that is `prepared`, at the constant level for ``share``."""
        return self.kl(self.runtime.forced(*dial.constant(share)))


@dataclass(frozen=True)
class HarmCurve:
    """Mean KL of constant operating points, about ``exp(log_kl - rate * (share - middle))``."""

    rate: float
    middle: float
    log_kl: float

    @classmethod
    def measure(cls, reference: Reference, dial: Dial) -> HarmCurve:
        """From a constant level on either side of the middle."""
        middle = 0.5 if dial.cut == "select" else 0.75
        runs = []
        for asked in (middle - 0.08, middle + 0.08):
            kl, needed = reference.constant_kl(dial, asked)
            runs.append((needed, math.log(kl)))
        (low, harsh), (high, mild) = runs
        rate = max((harsh - mild) / max(high - low, 1e-3), 1.0)
        return cls(rate, (low + high) / 2, (harsh + mild) / 2)

    def share_for(self, kl: float) -> float:
        """The share at which the mean KL is about that."""
        return self.middle + (self.log_kl - math.log(kl)) / self.rate


@dataclass(frozen=True)
class Settled:
    """The dial with the spread that harmed least; kl: of every spread tried, corrected to equal share."""

    dial: Dial
    spread: float
    kl: dict[float, float]


def settle(runtime: SedacRuntime, dial: Dial, rate: float, windows: WindowSet, share: float) -> Settled:
    """Choose the spread at a needed share.

    Args:
        dial: with gain 0.
        rate: of the `HarmCurve`.
        windows: tokens that no probe was fitted on.

    Raises:
        CalibrationError: a KL is not finite.
    """
    share = float(np.clip(share, dial.least_share, 0.98))
    with prepared(runtime, dial):
        reference = Reference(runtime, windows)
        kl, needed = reference.constant_kl(dial, share)
    found = {0.0: kl * math.exp(rate * (needed - share))}
    best = Settled(dial, 0.0, found)
    keep = float(np.clip(share, 0.1, 0.9))
    for spread in SPREADS:
        trial = replace(dial, gain=spread / (4 * rate * keep * (1 - keep)))
        for _ in range(2):  # once to see what the tokens really use, once with that put right
            runtime.install(trial.policy(share))
            try:
                kl, needed = reference.kl()
            finally:
                runtime.uninstall()
            trial.offset += needed - share
            if abs(needed - share) < _MISS:
                break
        found[spread] = kl * math.exp(rate * (needed - share))
        if found[spread] < found[best.spread]:
            best = Settled(trial, spread, found)
    return best
