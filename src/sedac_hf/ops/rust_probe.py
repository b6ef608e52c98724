"""The compiled kernel of a probe on torch tensors, for a few rows on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ops import compiled
from sedac_hf.ops.compiled import DTYPES, MAX_ROWS, is_plain, placed


class CpuProbe:
    """The kernel of one probe: LayerNorm, low-rank map, GELU, scalar, softplus, as `sedac_hf.probes` defines it.

    Args:
        parameters: LayerNorm's weight and bias [d], the map's weight [rank, d] and bias [rank], the output's weight
            [1, rank] and bias [1]; must satisfy `fits`. The kernel keeps them.
        eps: LayerNorm's.
        dtype: of the hidden states.
    """

    def __init__(self, parameters: Sequence[Tensor], eps: float, dtype: torch.dtype) -> None:
        self._keep = norm, norm_bias, down, down_bias, out, out_bias = tuple(parameters)
        self.dtype, self.hidden_size = dtype, down.shape[1]
        self._most = MAX_ROWS * self.hidden_size
        self._kernel = compiled.module.ProbeKernel(
            str(dtype).removeprefix("torch."),
            (norm.data_ptr(), norm_bias.data_ptr(), eps),
            placed(down),
            (down_bias.data_ptr(), out.data_ptr(), out_bias.data_ptr()),
        )

    @staticmethod
    def fits(parameters: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Whether the kernel can run a probe: float32 in contiguous CPU memory, hidden states of a known dtype."""
        plain = all(is_plain(tensor, torch.float32) and tensor.is_contiguous() for tensor in parameters)
        return compiled.available() and dtype in DTYPES and plain

    def accepts(self, hidden: Tensor) -> bool:
        """Whether the kernel can run this input [..., d]: 1 to `MAX_ROWS` rows, contiguous, of its dtype."""
        return (
            hidden.dtype is self.dtype
            and hidden.size(-1) == self.hidden_size
            and 0 < hidden.numel() <= self._most
            and hidden.is_cpu
            and hidden.is_contiguous()
        )

    def run_accepted(self, hidden: Tensor) -> np.ndarray:
        """Risks float32 [n] of hidden [..., d] that `accepts` has seen."""
        risks: np.ndarray = self._kernel.run(hidden.data_ptr(), hidden.numel() // self.hidden_size)
        return risks
