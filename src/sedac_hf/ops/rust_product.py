"""The compiled product of some dozen rows with down's weights in bfloat16, as `select` lays them out on a CPU.

Torch brings weights that lie by units into another order for every product. Up to some hundred rows that takes from a
tenth of the product's time to more than all of it (`benchmarks/layout.py`); this product does without.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sedac_hf.ops import compiled
from sedac_hf.ops.compiled import address, is_plain, placed, rows_are_runs, wants_gradient
from sedac_hf.ops.threads import kernel_threads

LEAST_ROWS = 2
"""Rows from which it was seen to be quicker than torch."""


@functools.cache
def available() -> bool:
    """Whether this machine has the products of bfloat16 that make it quick."""
    return "avx512-bf16" in compiled.instruction_sets()


@functools.cache
def most_rows() -> int:
    """Rows up to which it was seen to be quicker than torch, whose products use AMX where the machine has it."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)  # there since PyTorch 2.6
    return 4 if asked is not None and asked() else 128


def accepts(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `product` can run ``x W^T + b``, and should: bfloat16 on a CPU that has its products, a weight whose
    columns are runs of memory, `LEAST_ROWS` to `most_rows` rows, no gradient and no autocast."""
    return (
        available()
        and weight.dim() == 2
        and is_plain(weight, torch.bfloat16)
        and rows_are_runs(weight.T)
        and (bias is None or (is_plain(bias, torch.bfloat16) and bias.is_contiguous()))
        and x.is_cpu
        and x.dtype is torch.bfloat16
        and x.size(-1) == weight.shape[1]
        and x.is_contiguous()
        and LEAST_ROWS <= x.numel() // weight.shape[1] <= most_rows()
        and not torch.is_autocast_enabled("cpu")
        and not wants_gradient(x, weight, bias)
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``: x [..., inputs], W [outputs, inputs], b [outputs] -> [..., outputs], bfloat16, for arguments that
    `accepts` has seen. Sums are in float32 and rounded once; a row's result does not depend on the other rows."""
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows = x.numel() // weight.shape[1]
    compiled.module.product(placed(weight.T), address(bias), x.data_ptr(), y.data_ptr(), rows, kernel_threads())
    return y
