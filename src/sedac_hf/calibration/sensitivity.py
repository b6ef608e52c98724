"""How dear each FFN is: KL between full and cut output when that FFN alone is cut to half."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sedac_hf.calibration.collect import stream
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import WindowSet, kl_to, scored_logits
from sedac_hf.ops.contract import Compensation, OperatingPoint
from sedac_hf.runtime import SedacRuntime

_FLOOR = 1e-3  # of the median: an FFN that seems to harm nothing is not cut to nothing


def sensitivities(
    runtime: SedacRuntime,
    windows: WindowSet,
    points: Sequence[OperatingPoint],
    left_out: Sequence[float],
    *,
    compensation: Sequence[Compensation | None] | None = None,
    progress: bool = True,
) -> np.ndarray:
    """c_i^2 of each FFN, float64 [n_sites]: its KL at ``points[i]`` over the squared importance left out there.

    Args:
        points: where each FFN is measured, the others being whole.
        left_out: mean over tokens of the sum of squared importances that each point leaves out.

    Raises:
        CalibrationError: a KL is not finite.
    """
    n = len(runtime.sites)
    totals = np.zeros(n)
    tokens = 0
    for batch in stream(runtime, windows, progress, "sensitivity"):
        dense = scored_logits(runtime.model, batch)
        tokens += dense.shape[0]
        for i in range(n):
            alone = [point if i == j else None for j, point in enumerate(points)]
            with runtime.forced(alone, compensation):
                harm = kl_to(dense, scored_logits(runtime.model, batch), torch.float32)
            totals[i] += float(harm.double().sum())
        del dense  # logits are large: none is held while the next are made
    values = totals / tokens / np.maximum(np.asarray(left_out, dtype=np.float64), 1e-30)
    if not np.isfinite(values).all():
        raise CalibrationError(f"the harm of cutting one FFN must be finite, got {values.tolist()} per FFN")
    return np.maximum(values, _FLOOR * max(float(np.median(values)), 1e-30))
