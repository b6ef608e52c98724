"""The channel order of an FFN: a lossless permutation of its hidden units, in place.

Rows of gate and up (with their biases), columns of down, and whatever else has an entry per unit are permuted alike,
so the FFN computes the same function up to the rounding of a sum; storages stay where they are, and the inverse
restores every bit. A quantised weight is permuted in the tensors that it is kept in, where these show that it can be
(one scale per output row, say).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.linears import bias_of, close, describe, inner_tensors, is_here, weight_of
from sedac_hf.ffn.site import FFNSite
from sedac_hf.ops.contract import is_ordinary

_CHUNK = 1 << 21  # elements that are copied at a time
_TRIED = 16


def apply_order(site: FFNSite, order: Tensor) -> None:
    """Put unit ``order[j]`` of the present order at place j. Of a site that has an origin only what is its own moves:
    its linears are the origin's.

    Args:
        site: the FFN; its linears must hold plain weights that can be read here.
        order: int64 [f], a permutation; of experts int64 [E, f], one for each.

    Raises:
        UnsupportedModelError: the weights are quantised, offloaded, or not plain linears.
        ConfigError: ``order`` is no permutation of the site's units.
    """
    check_order(site, order)
    if site.experts is not None:
        _put_experts(site.experts, order)
        return
    _put(site, order if site.shard is None else site.shard.dealt(order))


def _put(site: FFNSite, places: Tensor) -> None:
    """Put unit ``places[j]`` at place j, the ranks' units of a sharded FFN counted one rank behind the other."""
    if not can_reorder(site):
        raise UnsupportedModelError(
            f"the weights of {site.name!r} must be in memory and let their units be put in another order; got "
            f"{', '.join(dict.fromkeys(describe(linear) for linear in site.linears))} (offloaded, wrapped and most "
            "quantised weights do not); use objective='latency' (select), which needs none"
        )
    f = site.intermediate_size
    for linear in site.linears[:-1] if site.origin is None else ():
        tensors = [(weight_of(linear), _unit_dim(site, linear))]
        bias = bias_of(linear)
        if bias is not None:
            tensors.append((bias, 0))
        for tensor, dim in tensors:
            if site.shard is None:
                permute(tensor, torch.cat((places, places + f)) if site.kind == "fused" else places, dim)
                continue
            for lo in (0, f) if site.kind == "fused" else (0,):
                site.shard.permute(tensor.detach().narrow(dim, lo, f), places, dim)
    if site.origin is None:
        (permute if site.shard is None else site.shard.permute)(
            weight_of(site.down).detach(), places, _unit_dim(site, site.down)
        )
    for parameter in site.beside:
        if parameter.path in site.tied:
            continue
        value = parameter.value.detach()
        both = value.shape[parameter.dim] == 2 * f
        vector = value.numel() == value.shape[parameter.dim]
        order = torch.cat((places, places + f)) if both else places
        permute(value.squeeze() if vector else value, order, 0 if vector else parameter.dim)


@torch.no_grad()
def _put_experts(experts: Experts, order: Tensor) -> None:
    """Put unit ``order[e, j]`` of each expert e at place j."""
    if not experts.readable:
        raise UnsupportedModelError(
            "experts must be in memory for their units to be put in another order, got offloaded ones; use "
            "objective='latency' (select), which needs none"
        )
    for expert, places in enumerate(order):
        for tensor, dim, per_unit in experts.unit_tensors(expert):
            permute(tensor, _entries(places, per_unit), dim)


def _entries(places: Tensor, per_unit: int) -> Tensor:
    """Places of the entries of units that have one, two side by side (2) or one in each of two halves (-2)."""
    if per_unit == 1:
        return places
    return (
        torch.cat((places, places + len(places)))
        if per_unit < 0
        else torch.stack((2 * places, 2 * places + 1), 1).flatten()
    )


def check_order(site: FFNSite, order: Tensor) -> None:
    """Raise ConfigError unless ``order`` is a permutation of the site's units."""
    f = site.total_units
    shape = (f,) if site.experts is None else (site.experts.count, f)
    if order.shape != shape or not torch.equal(order.sort(dim=-1).values, torch.arange(f).expand(shape)):
        raise ConfigError(
            f"`order` must be a permutation of the {f} units of {site.name!r}, shape {shape}, got shape "
            f"{tuple(order.shape)}"
        )


def undo_order(site: FFNSite, order: Tensor) -> None:
    """Undo `apply_order` with the same ``order``."""
    check_order(site, order)
    if site.experts is not None:
        _put_experts(site.experts, order.argsort(dim=1))
        return
    _put(site, torch.argsort(order if site.shard is None else site.shard.dealt(order)))


def can_reorder(site: FFNSite) -> bool:
    """Whether `apply_order` can permute this FFN."""
    if site.experts is not None:
        return site.experts.readable
    part = site.shard is not None
    if any(
        part or parameter.value.is_meta or not is_ordinary(parameter.value) or hasattr(parameter.module, "_hf_hook")
        for parameter in site.beside
    ):
        return False
    return all(is_here(linear, part=part) and _can_permute(linear, _unit_dim(site, linear)) for linear in site.linears)


def _unit_dim(site: FFNSite, linear: nn.Module) -> int:
    """The dimension of a linear's weight that counts hidden units."""
    return int((linear is site.down) != isinstance(linear, Conv1D))


@torch.no_grad()
def permute(weight: Tensor, order: Tensor, dim: int) -> None:
    """Put index ``order[j]`` of dimension ``dim`` at place j, in place, bit for bit, with a bounded copy."""
    for part in inner_tensors(weight):
        if part.shape[dim] == 1:
            continue  # one number for all of them
        part = part.view(torch.uint8) if part.element_size() == 1 else part  # float8 has no index_select
        places = order.to(part.device)
        if part.dim() == 1:
            part.copy_(part.index_select(0, places))
            continue
        across = 1 - dim
        step = max(1, _CHUNK // max(1, part.shape[dim]))
        for lo in range(0, part.shape[across], step):
            piece = part.narrow(across, lo, min(step, part.shape[across] - lo))
            piece.copy_(piece.index_select(dim, places))


@torch.no_grad()
def _can_permute(linear: nn.Module, dim: int) -> bool:
    """Whether a weight's own tensors can be permuted so; tried on a part of it where it is of another class."""
    weight = weight_of(linear)
    if is_ordinary(weight):
        return True
    size = weight.shape[dim]
    if any(part.dim() != 2 or part.shape[dim] not in (1, size) for part in inner_tensors(weight)):
        return False
    reverse = torch.arange(size - 1, -1, -1)
    trial = (weight[:, :_TRIED] if dim == 0 else weight[:_TRIED]).detach().clone()
    x = torch.randn(2, trial.shape[1], generator=torch.Generator().manual_seed(3)).to(weight.device, weight.dtype)
    before = nn.functional.linear(x, trial)
    permute(trial, reverse, dim)
    if dim == 0:
        return close(nn.functional.linear(x, trial), before.flip(1))
    return close(nn.functional.linear(x.flip(1), trial), before)
