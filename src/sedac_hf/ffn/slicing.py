"""Does a class's own forward let its hidden units be computed a prefix at a time?

Most do: every unit is computed alone. A forward that mixes the units (statistics over all of them, gate and up
interleaved) does not; there only zeroing at down's input is right. Decided on numbers where the owner can be called.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sedac_hf.ffn.linears import bias_of, close, describe, is_here, rows, sliced, slices_of, weight_of
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ffn.verify import run_alone


def why_masked(site: FFNSite) -> str | None:
    """Why everything must be computed and the zeroing alone can cut this FFN; None where slices are right."""
    if site.experts is not None:
        return None
    for linear in site.linears:
        if not slices_of(linear).prefix:
            return f"it is {describe(linear)}, which cannot be read in slices"
    if site.beside:
        names = ", ".join(parameter.path for parameter in site.beside)
        return f"{type(site.owner).__name__} has other parameters over its hidden units ({names})"
    return None if slicing_is_exact(site) else f"the forward of {type(site.owner).__name__} mixes the units"


def slicing_is_exact(site: FFNSite) -> bool:
    """Whether emitting the first k units equals zeroing the others. Where that can't be tried (the weights are not
    here, the owner is a whole layer) separate linears are trusted and a fused one is not."""
    if site.beside:
        return False
    if site.plain_forward:
        return not (site.kind == "fused" and not all(is_here(linear) for linear in site.linears))
    trusted = site.kind != "fused"
    part = site.shard is not None
    if not all(is_here(linear, part=part) for linear in site.linears) or hasattr(site.owner, "_hf_hook"):
        return trusted
    extra = _extra_arguments(site.owner)
    if extra is None:
        return trusted
    x = torch.randn(3, site.hidden_size, generator=torch.Generator().manual_seed(1))
    x = x.to(weight_of(site.down).device, weight_of(site.down).dtype)
    k = max(1, site.intermediate_size // 3)
    with torch.no_grad():
        zeroed = _trial(site, x, k, extra, narrow=False)
        narrow = _trial(site, x, k, extra, narrow=True)
    if zeroed is None:
        return trusted
    return close(narrow, zeroed)


def _extra_arguments(owner: nn.Module) -> int | None:
    """How many tensors besides x the forward demands (a residual, at most one); None where it is another thing."""
    try:
        parameters = list(inspect.signature(owner.forward).parameters.values())
    except (TypeError, ValueError):
        return None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    demanded = [p for p in positional if p.default is p.empty]
    return len(demanded) - 1 if len(demanded) in (1, 2) else None


def _trial(site: FFNSite, x: Tensor, k: int, extra: int, *, narrow: bool) -> Tensor | None:
    """The owner's output with its units from k on zeroed, or not computed at all; the linears are restored."""
    kept: list[tuple[nn.Module, Any]] = []
    f = site.intermediate_size

    def put(linear: nn.Module, forward: Any) -> None:
        kept.append((linear, linear.__dict__.get("forward")))
        linear.forward = forward

    def up_forward(linear: nn.Module) -> Any:
        if site.kind == "fused":
            return lambda z: torch.cat((sliced(linear, z, 0, k), sliced(linear, z, f, f + k)), dim=-1)
        return lambda z: sliced(linear, z, 0, k)

    def down_forward(h: Tensor) -> Tensor:
        h = h[..., :k]
        return nn.functional.linear(h, rows(site.down)[:, :k], bias_of(site.down))

    try:
        put(site.down, down_forward)
        if narrow:
            for linear in site.linears[:-1]:
                put(linear, up_forward(linear))
        return run_alone(site.owner, x, extra)
    finally:
        for linear, forward in reversed(kept):
            if forward is None:
                del linear.forward
            else:
                linear.forward = forward
