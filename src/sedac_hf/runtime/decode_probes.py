"""The probes of a decode step by their compiled kernel: the dozen small operations of torch take 0.2 ms each time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ops.rust_probe import CpuProbe
from sedac_hf.probes import ProbeBank, RiskProbe

_Known = tuple[RiskProbe, torch.dtype, tuple[tuple[int, int], ...], CpuProbe | None]


class DecodeProbes:
    """Risks of a few rows on a CPU; kernels are made anew when a probe or its memory is another."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_known": {}}  # kernels are made of addresses

    def risks(self, bank: ProbeBank, layer_idx: int, hidden: Tensor) -> np.ndarray | None:
        """float32 [n] for hidden [..., d] after a layer; None where the kernel can't run this call."""
        probe, known = bank[layer_idx], self._known.get(layer_idx)
        norm, down, out = probe.norm._parameters, probe.down._parameters, probe.out._parameters
        parameters = [held[name] for held in (norm, down, out) for name in ("weight", "bias")]
        if any(parameter is None for parameter in parameters):
            return None
        places = tuple([(parameter.data_ptr(), parameter.nbytes) for parameter in parameters])  # type: ignore[union-attr]
        if known is None or known[0] is not probe or known[1] is not hidden.dtype or known[2] != places:
            kernel = None
            if CpuProbe.fits(parameters, hidden.dtype):  # type: ignore[arg-type]
                kernel = CpuProbe(parameters, probe.norm.eps, hidden.dtype)  # type: ignore[arg-type]
            known = self._known[layer_idx] = (probe, hidden.dtype, places, kernel)
        kernel = known[3]
        return kernel.run_accepted(hidden) if kernel is not None and kernel.accepts(hidden) else None
