"""The Triton kernels as an engine for `select` at one to a few rows on CUDA, outside captured graphs.

Inside them `ops/library.py` runs the same kernels. Of one call only two counts come back to the host, for the record.
Calls in which no token chooses stay with the strips engine: products of matrices up to each width.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from sedac_hf.ops.activations import name_of
from sedac_hf.ops.contract import FFNWeights, ShadowTables, SiteCut
from sedac_hf.ops.library import triton_is_installed
from sedac_hf.ops.packing import GROUP
from sedac_hf.ops.tokens import compensated, widest
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_device() -> str:
    """Type of the device whose memory the kernels read: "cuda", or "cpu" where Triton interprets them
    (TRITON_INTERPRET=1: slow, to look for faults without a GPU)."""
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class TritonFFN:
    """The kernels on one FFN's weights and its shadow, row by row; `fits` must hold."""

    engine = "triton"
    selects = True
    truncates = False

    def __init__(self, weights: FFNWeights, shadow: ShadowTables) -> None:
        name = name_of(weights.activation)
        if name is None or not self.fits(weights, shadow):
            raise ValueError("the kernels must be able to read the weights and know the activation; ask `fits` first")
        self.weights, self.shadow, self.activation = weights, shadow, name

    @staticmethod
    def fits(weights: FFNWeights, shadow: ShadowTables) -> bool:
        """Whether the kernels can run an FFN: ordinary weights of one floating dtype, all on one device of the kind
        that Triton runs on, a known activation, and a 4-bit shadow that is not interleaved."""
        up, groups = weights.up, -(-weights.hidden_size // GROUP)
        matrices = (up, weights.down, *(() if weights.gate is None else (weights.gate,)))
        biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
        tensors = [tensor for tensor in (*matrices, *biases, *shadow) if tensor is not None]
        return (
            triton_is_installed()
            and weights.ordinary
            and up.dtype in _DTYPES
            and all(matrix.dtype == up.dtype for matrix in matrices)
            and up.device.type == kernel_device()
            and all(tensor.device == up.device for tensor in tensors)
            and shadow.codes.shape == (weights.intermediate_size, groups * GROUP // 2)
            and name_of(weights.activation) is not None
        )

    def accepts(self, x: Tensor, *, in_turns: bool = False) -> bool:
        """Whether a call with this input can be run: few rows, the weights' dtype and device, no gradient."""
        up = self.weights.up
        return (
            1 <= x.shape[0] <= MOST_SELECTING_ROWS
            and x.shape[1] == up.shape[1]
            and x.dtype == up.dtype
            and x.device == up.device
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weights.learns))
        )


def triton_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """The cut FFN by ``cut.kernel``, which must accept x: [n, d] -> [n, d]."""
    # Not at the top: a machine without a GPU need not have Triton.
    from sedac_hf.ops.triton.select import selected

    kernel = cut.kernel
    assert isinstance(kernel, TritonFFN)
    n, f = x.shape[0], weights.intermediate_size
    counts = torch.zeros(2, dtype=torch.int32, device=x.device)
    # A low-rank compensation reads the hidden units; nothing else does.
    hidden = None if cut.compensation is None else x.new_zeros(n, f)
    y = selected(x, *cut.points_on(x.device), kernel.shadow, weights, kernel.activation, hidden=hidden, counts=counts)
    needed, chosen = counts.tolist()
    # A matrix in which a unit's numbers are apart is read up to the widest token. Reported as whole units, rounded up.
    matrices = weights.matrices
    of_hidden = chosen if weights.up.stride(1) == 1 else widest(cut, f)
    of_down = chosen if weights.down.stride(1) != 1 else widest(cut, f)
    read = -(-((matrices - 1) * of_hidden + of_down) // matrices)
    cut.record(engine="triton", tokens=n, needed=needed, read=read, computed=n * read)
    return y if hidden is None else compensated(y, hidden, cut)
