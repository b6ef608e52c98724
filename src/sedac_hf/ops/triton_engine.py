"""The Triton kernels as an engine for `select` at one to a few rows on CUDA, outside captured graphs.

Inside them `ops/library.py` runs the same kernels. Of one call only two counts come back to the host, for the record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.ops.activations import name_of
from sedac_hf.ops.contract import FFNWeights, ShadowTables, SiteCut
from sedac_hf.ops.library import triton_is_installed
from sedac_hf.ops.tokens import compensated, level_widths
from sedac_hf.ops.triton_launch import MOST_SELECTING_ROWS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonFFN:
    """The kernels on one FFN's weights and its shadow, row by row; `fits` must hold.

    Attributes:
        selects: it can choose units by importance.
    """

    selects = True

    def __init__(self, weights: FFNWeights, shadow: ShadowTables) -> None:
        name = name_of(weights.activation)
        if name is None or not self.fits(weights, shadow):
            raise ValueError("the kernels must be able to read the weights and know the activation; ask `fits` first")
        self.weights, self.shadow, self.activation = weights, shadow, name

    @staticmethod
    def fits(weights: FFNWeights, shadow: ShadowTables) -> bool:
        """Whether the kernels can run an FFN: on CUDA with Triton, one floating dtype, a known activation, and a
        shadow that is not interleaved."""
        matrices = (weights.up, weights.down, *(() if weights.gate is None else (weights.gate,)))
        return (
            triton_is_installed()
            and weights.up.dtype in _DTYPES
            and all(matrix.is_cuda and matrix.dtype == weights.up.dtype for matrix in matrices)
            and shadow.codes.is_cuda
            and shadow.codes.dim() == 2
            and name_of(weights.activation) is not None
        )

    def accepts(self, x: Tensor) -> bool:
        """Whether a call with this input can be run: few rows, the weights' dtype and device, no gradient."""
        up = self.weights.up
        return (
            1 <= x.shape[0] <= MOST_SELECTING_ROWS
            and x.dtype == up.dtype
            and x.device == up.device
            and not (x.requires_grad and torch.is_grad_enabled())
        )


def triton_ffn(x: Tensor, kernel: TritonFFN, cut: SiteCut) -> Tensor:
    """The cut FFN: x [n, d] -> [n, d]; ``kernel`` must accept x."""
    from sedac_hf.ops.triton_select import selected

    n, f = x.shape[0], kernel.weights.intermediate_size
    levels = cut.plan.on(x.device)
    widths = torch.tensor(level_widths(cut, f), dtype=torch.int32, device=x.device)[levels]
    least = torch.tensor([point.importance_min for point in cut.points], dtype=torch.float32, device=x.device)[levels]
    counts = torch.zeros(2, dtype=torch.int32, device=x.device)
    # A low-rank compensation reads the hidden units; nothing else does.
    hidden = None if cut.compensation is None else x.new_zeros(n, f)
    y = selected(
        x, widths, least, kernel.shadow, kernel.weights, kernel.activation, hidden=hidden, counts=counts
    )  # fmt: skip
    needed, read = counts.tolist()
    cut.record(engine="triton", tokens=n, needed=needed, read=read, computed=n * read)
    return y if hidden is None else compensated(y, hidden, cut)
