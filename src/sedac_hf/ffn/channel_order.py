"""The channel order of an FFN: a lossless permutation of its hidden units, in place.

Rows of gate and up (with their biases) and columns of down are permuted alike, so the FFN computes the same function
up to the rounding of a sum; storages stay where they are, and the inverse restores every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.ffn.linears import is_readable
from sedac_hf.ffn.sites import FFNSite


def apply_order(site: FFNSite, order: Tensor) -> None:
    """Put unit ``order[j]`` of the present order at place j.

    Args:
        site: the FFN; its linears must hold plain weights that can be read here.
        order: int64 [f], a permutation.

    Raises:
        UnsupportedModelError: the weights are quantised, offloaded, or not plain linears.
        ConfigError: ``order`` is no permutation of the site's units.
    """
    check_order(site, order)
    f = site.intermediate_size
    if not can_reorder(site):
        raise UnsupportedModelError(
            f"the weights of {site.name!r} must be plain and on a device for a channel order (quantised, offloaded or "
            "wrapped weights are not); use objective='latency' (select), which needs none"
        )
    for linear in site.linears[:-1]:
        halves = torch.cat((order, order + f)) if site.kind == "fused" else order
        _permute(linear.weight, halves, dim=1 if isinstance(linear, Conv1D) else 0)
        if linear.bias is not None:
            _permute(linear.bias, halves, dim=0)
    _permute(site.down.weight, order, dim=0 if isinstance(site.down, Conv1D) else 1)


def check_order(site: FFNSite, order: Tensor) -> None:
    """Raise ConfigError unless ``order`` is a permutation of the site's units."""
    f = site.intermediate_size
    if order.shape != (f,) or not torch.equal(order.sort().values, torch.arange(f)):
        raise ConfigError(
            f"`order` must be a permutation of the {f} units of {site.name!r}, got shape {tuple(order.shape)}"
        )


def undo_order(site: FFNSite, order: Tensor) -> None:
    """Undo `apply_order` with the same ``order``."""
    apply_order(site, torch.argsort(order))


def can_reorder(site: FFNSite) -> bool:
    """Whether `apply_order` can permute this FFN."""
    return all(is_readable(linear) for linear in site.linears)


@torch.no_grad()
def _permute(weight: Any, order: Tensor, dim: int) -> None:
    weight.copy_(weight.index_select(dim, order.to(weight.device)))
