"""Trials of an FFN on a copy of its owner with random numbers: what holds by the present numbers alone does not count.

A norm of ones and an adapter of zeros show only so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch

from sedac_hf.ffn.channel_order import apply_order, can_reorder
from sedac_hf.ffn.linears import close
from sedac_hf.ffn.site import FFNSite, UnitParameter
from sedac_hf.ffn.verify import run_alone
from sedac_hf.ops.activations import Activation


def has_others(site: FFNSite, sizes: tuple[int, ...] | None = None) -> bool:
    """Whether the owner has parameters beside its linears', of more than one number, or with a side of ``sizes``."""
    ours = {id(parameter) for linear in site.linears for parameter in linear.parameters()}
    others = (p for p in (*site.owner.parameters(), *site.owner.buffers()) if id(p) not in ours and p.numel() > 1)
    return any(sizes is None or set(sizes) & set(other.shape) for other in others)


def order_is_lossless(site: FFNSite, beside: tuple[UnitParameter, ...]) -> bool:
    """Whether putting the units, with the parameters ``beside`` them, in another order leaves the owner's output."""
    trial = _with_random_numbers(replace(site, beside=beside))
    if trial is None or not can_reorder(trial):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, site.hidden_size, generator=generator)
    with torch.no_grad():
        before = run_alone(trial.owner, x)
        if before is None:
            return False
        apply_order(trial, torch.randperm(site.intermediate_size, generator=generator))
        return close(run_alone(trial.owner, x), before)


def holds_with_other_numbers(site: FFNSite, formula: Callable[[FFNSite], Activation | None]) -> bool:
    """Whether a formula that was seen of a site is still seen with random numbers in all parameters of its owner; one
    that has its linears alone is not tried again."""
    if not has_others(site):
        return True
    trial = _with_random_numbers(site)
    return trial is not None and formula(trial) is not None


def _with_random_numbers(site: FFNSite) -> FFNSite | None:
    """A copy of a site and its owner in float32 with random weights; None where it cannot be copied."""
    if any(parameter.is_meta for parameter in site.owner.parameters()) or hasattr(site.owner, "_hf_hook"):
        return None
    generator = torch.Generator().manual_seed(2)
    try:
        trial = copy.deepcopy(site)
        trial.owner.to("cpu", torch.float32)
        with torch.no_grad():
            for parameter in trial.owner.parameters():
                if parameter.is_floating_point():
                    values = torch.randn(parameter.shape, generator=generator)
                    scaled = values / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * values
                    parameter.copy_(scaled)
    except Exception:  # whatever a foreign module or a class of weights raises, it cannot be tried
        return None
    return trial
