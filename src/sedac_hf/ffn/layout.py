"""The memory layout of an FFN's weights for reading single units: each unit one run of memory in every linear.

`nn.Linear` keeps up and gate so, but spreads a unit's column of down over the whole matrix (`Conv1D`: the other way
round). The layout is changed in place of the old one: the parameter keeps its shape, values and state dict, and no
second copy stays. Restoring it gives the strides that it had.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sedac_hf.ffn.linears import is_plain, is_readable, weight_of
from sedac_hf.ffn.sites import FFNSite


def lay_out_by_units(site: FFNSite, device_types: Collection[str] = ("cpu",)) -> tuple[nn.Module, ...]:
    """Give each unit of an FFN one run of memory; returns the linears that were changed, for `lay_out_as_usual`.

    Nothing is changed where a weight can't be read here, is quantised, or lies on a device of another type than
    those on which kernels read single units.
    """
    for linear in site.linears:
        if not (is_plain(linear) and is_readable(linear) and weight_of(linear).device.type in device_types):
            return ()
    changed = []
    for linear in site.linears:
        if _spread_out(linear, is_down=linear is site.down):
            _transpose_in_memory(weight_of(linear))
            changed.append(linear)
    return tuple(changed)


def lay_out_as_usual(linears: tuple[nn.Module, ...]) -> None:
    """Undo `lay_out_by_units`; a weight that was replaced in between and lies as usual already stays."""
    for linear in linears:
        if not weight_of(linear).is_contiguous():
            _transpose_in_memory(weight_of(linear))


def _spread_out(linear: nn.Module, *, is_down: bool) -> bool:
    """Whether a unit's numbers are apart, in a weight that is dense in memory."""
    weight = weight_of(linear)
    units = 0 if isinstance(linear, Conv1D) == is_down else 1
    return bool(weight.is_contiguous() and units == 1 and min(weight.shape) > 1)


@torch.no_grad()
def _transpose_in_memory(weight: Tensor) -> None:
    """Swap the order in which a dense matrix lies in memory; the matrix stays the same."""
    if weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    else:
        weight.data = weight.data.contiguous()
