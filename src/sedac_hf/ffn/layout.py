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
    """Give each unit of an FFN one run of memory; returns the modules that were changed, for `lay_out_as_usual`.

    Nothing is changed where a weight can't be read here, is quantised, or lies on a device of another type than
    those on which kernels read single units.
    """
    if site.experts is not None:
        spread_out = site.experts.spread_out
        if not site.experts.readable or any(
            weight.dim() != 3 or weight.device.type not in device_types or not weight.is_contiguous()
            for _, weight in spread_out
        ):
            return ()
        for _, weight in spread_out:
            _transpose_in_memory(weight)
        return tuple({id(holder): holder for holder, _ in spread_out}.values())
    for linear in site.linears:
        if not (is_plain(linear) and is_readable(linear) and weight_of(linear).device.type in device_types):
            return ()
    changed = []
    for linear in site.linears:
        if _spread_out(linear, is_down=linear is site.down):
            _transpose_in_memory(weight_of(linear))
            changed.append(linear)
    return tuple(changed)


def lay_out_as_usual(modules: tuple[nn.Module, ...]) -> None:
    """Undo `lay_out_by_units`; a weight that was replaced in between and lies as usual already stays."""
    for module in modules:
        experts = _stacked(module)
        for weight in (weight_of(module),) if experts is None else experts:
            if not weight.is_contiguous():
                _transpose_in_memory(weight)


def _stacked(module: nn.Module) -> tuple[Tensor, ...] | None:
    """The 3-D parameters of a module of experts; None for a linear."""
    stacked = tuple(p for p in module.parameters(recurse=False) if p.dim() == 3)
    return stacked or None


def _spread_out(linear: nn.Module, *, is_down: bool) -> bool:
    """Whether a unit's numbers are apart, in a weight that is dense in memory."""
    weight = weight_of(linear)
    units = 0 if isinstance(linear, Conv1D) == is_down else 1
    return bool(weight.is_contiguous() and units == 1 and min(weight.shape) > 1)


@torch.no_grad()
def _transpose_in_memory(weight: Tensor) -> None:
    """Swap the order in which a dense matrix, or each of several, lies in memory; the matrices stay the same."""
    if weight.dim() == 3:
        lies = weight.data if weight.is_contiguous() else weight.data.transpose(1, 2)
        other = lies.view(lies.shape[0], lies.shape[2], lies.shape[1])
        for matrix, place in zip(lies, other, strict=True):  # one of them is copied at a time
            place.copy_(matrix.t().contiguous())
        weight.data = other.transpose(1, 2) if weight.is_contiguous() else other
    elif weight.is_contiguous():
        weight.data = weight.data.t().contiguous().t()
    else:
        weight.data = weight.data.contiguous()
