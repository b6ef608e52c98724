"""Cut an FFN through its linears, leaving the class's own forward in place (*coupled linears*).

Gate and up emit only the first k units, the widest that a token of the call has, and down accepts a k-wide input;
units that a token does not use are zeroed at down's input, and what stands in for them is added at down's output.
Activation, clamps, multipliers and residual arguments in between stay the model's own. Where a weight can't be read in
slices (quantised, adapter-wrapped, ...) everything is computed and the zeroing alone does the cut. Sites whose forward
is known run `sedac_hf.ops.cut_ffn` at the owner instead, with the coupled linears behind it for unusual calls.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.deciders import SiteUnits
from sedac_hf.ffn.expert_calls import ExpertsOwner
from sedac_hf.ffn.linears import bias_of, original_forward, rows, sliced, weight_of
from sedac_hf.ffn.shadow import ExactGate
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ffn.slicing import why_masked
from sedac_hf.ops import SiteCut, cut_ffn
from sedac_hf.ops.experts import ExpertKernels
from sedac_hf.ops.tokens import (
    add_level_bias,
    add_low_rank,
    compensated,
    is_whole,
    units_by_width,
    used_units,
    widest,
)

logger = logging.get_logger(__name__)

Current = Callable[[], "SiteCut | None"]
Decode = Callable[[Tensor], "Tensor | None"]
Uneven = Callable[[int], "SiteCut | None"]

# Some classes split or view the hidden units; an empty tensor would break them.
_LEAST_EMITTED = 8


def forward_replacements(
    site: FFNSite,
    current: Current,
    decode: Decode | None = None,
    uneven: Uneven | None = None,
    kernels: Callable[[], ExpertKernels | None] | None = None,
) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of a site and the forwards that cut it.

    Args:
        site: the FFN.
        current: the cut of the forward pass that calls it, asked at each call; None runs the original forwards.
        decode: asked first for a recognised FFN's output, in the input's shape; None leaves the call to the others.
        kernels: gives the compiled kernels of experts, where there are any.
        uneven: asked, with a call's number of rows, where that is not the cut's number of tokens; None: run whole.

    Returns:
        (module, forward) pairs. Install each as ``module.forward``, or as accelerate's ``_old_forward`` where the
        module is hooked; restoring what was there undoes everything. The forwards are bound methods, so a deep copy of
        the model is cut by a deep copy of them.
    """
    call = _Calls(site, current, uneven)
    if site.experts is not None:
        return [(site.owner, ExpertsOwner(call, site.experts, kernels).forward)]
    pairs: list[tuple[nn.Module, Callable[..., Any]]] = []
    if site.gate is not None:
        pairs.append((site.gate, _Producer(call, site.gate, gives_x=True).forward))
    pairs.append((site.up, _Producer(call, site.up, gives_x=site.gate is None).forward))
    pairs.append((site.down, _Consumer(call, site.down).forward))
    if site.plain_forward:
        pairs.append((site.owner, _Owner(call, decode).forward))
    return pairs


def masked_because(replacements: list[tuple[nn.Module, Callable[..., Any]]]) -> str | None:
    """Why the forwards that `forward_replacements` gave cut by zeroing alone; None where they save."""
    call: _Calls = replacements[0][1].__self__.call  # type: ignore[attr-defined]
    return call.masked


class _Scratch(threading.local):
    """What gate leaves for down within one FFN call. Per thread: two threads may run one model at once."""

    whole = False  # every token of this call is whole, as the owner was told: no linear need ask again
    x: Tensor | None = None  # the FFN's input, where a shadow will read it
    z: Tensor | None = None  # the gate's output, where the gate itself decides

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        x, z, self.x, self.z = self.x, self.z, None, None
        return x, z

    def __deepcopy__(self, memo: dict[int, Any]) -> _Scratch:
        return _Scratch()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Scratch, ()


class _Calls:
    """What the replacements of one site share: the site, where its cut comes from, and whether slices are right."""

    def __init__(self, site: FFNSite, current: Current, uneven: Uneven | None) -> None:
        self.site = site
        self.current = current
        self._uneven = uneven
        self.scratch = _Scratch()
        self.masked = why_masked(site)
        if self.masked is not None and site.shard is not None:
            raise UnsupportedModelError(f"the tensor-parallel FFN {site.name!r} cannot be cut: {self.masked}")
        if self.masked is not None:
            logger.warning_once(f"an FFN is cut by zeroing alone, which saves nothing: {self.masked}")

    def cut(self) -> SiteCut | None:
        """The cut of this call; None where every token is whole."""
        cut = self.current()
        return None if cut is None or is_whole(cut, self.site.intermediate_size) else cut

    def uneven(self, n: int) -> SiteCut | None:
        """The cut of a call of ``n`` rows, which are not the tokens of `cut`; None where every row is whole."""
        cut = None if self._uneven is None else self._uneven(n)
        return None if cut is None or is_whole(cut, self.site.intermediate_size) else cut

    def emitted(self, cut: SiteCut) -> int:
        """How many units gate and up emit."""
        f = self.site.intermediate_size
        return max(widest(cut, f), min(_LEAST_EMITTED, f)) if self.masked is None else f


def _exact_gate(cut: SiteCut) -> ExactGate | None:
    decider = getattr(cut.importance, "__self__", None)
    return decider if isinstance(decider, ExactGate) else None


def _importance(cut: SiteCut, x: Tensor | None, z: Tensor | None, h: Tensor) -> Tensor | None:
    """Importance [n, >= k] from what the gate left, or from the hidden values h [n, k]; None where nobody chooses (or
    nothing was left: all are used)."""
    if not cut.chooses or cut.importance is None:
        return None
    if isinstance(getattr(cut.importance, "__self__", None), SiteUnits):
        return cut.importance(h)
    n = h.shape[0]
    exact = _exact_gate(cut)
    if exact is not None:
        return None if z is None else exact.importance_of(z.reshape(n, z.shape[-1]))
    return None if x is None else cut.importance(x.reshape(n, x.shape[-1]))


def _rows_of(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()


class _Producer:
    """Forward of gate, up, or both in one: emits the first k units of each."""

    def __init__(self, call: _Calls, linear: nn.Module, *, gives_x: bool) -> None:
        self.call = call
        self.linear = linear
        self.gives_x = gives_x
        self.original = original_forward(linear)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.call.scratch.whole:
            return self.original(x, *args, **kwargs)
        cut = self.call.cut()
        if cut is not None and _rows_of(x) != cut.plan.n_tokens:
            cut = self.call.uneven(_rows_of(x))
        if cut is None:
            return self.original(x, *args, **kwargs)
        output = self._emit(x, cut, *args, **kwargs)
        if self.gives_x and cut.chooses:
            exact = _exact_gate(cut)
            if exact is None:
                self.call.scratch.x = x
            else:
                self.call.scratch.z = exact.gate_part(output)
        return output

    def _emit(self, x: Tensor, cut: SiteCut, *args: Any, **kwargs: Any) -> Any:
        f, k = self.call.site.intermediate_size, self.call.emitted(cut)
        if k >= f or args or kwargs:
            return self.original(x, *args, **kwargs)
        if self.call.site.shard is not None:
            x = self.call.site.shard.shared(x)
        if self.call.site.kind != "fused":
            return sliced(self.linear, x, 0, k)
        return torch.cat((sliced(self.linear, x, 0, k), sliced(self.linear, x, f, f + k)), dim=-1)


class _Consumer:
    """Forward of down: zeroes the units that each token does not use, accepts a k-wide input, compensates."""

    def __init__(self, call: _Calls, linear: nn.Module) -> None:
        self.call = call
        self.linear = linear
        self.original = original_forward(linear)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.call.scratch.whole:
            return self.original(h, *args, **kwargs)
        cut, f, k = self.call.cut(), self.call.site.intermediate_size, h.shape[-1]
        x, z = self.call.scratch.take()
        if cut is None:
            return self.original(h, *args, **kwargs)
        n = _rows_of(h)
        if n != cut.plan.n_tokens:
            uneven = self.call.uneven(n)
            if uneven is None:  # whose row is whose is unknown: nobody gets less than the widest token's units
                cut.record(engine="mismatch", tokens=n, needed=n * k, read=k, computed=n * k)
                return self.original(h, *args, **kwargs) if k == f else self._narrow(h)
            cut = uneven
        if n == 0:
            return self.original(h, *args, **kwargs) if k == f else self._narrow(h)
        flat = h.reshape(n, k)
        importance = _importance(cut, x, z, flat)
        used = None
        if importance is not None or cut.plan.uniform is None or widest(cut, f) < k:
            importance = None if importance is None else importance.to(h.device)
            used = used_units(cut, f, k, importance, h.device)
            flat = torch.where(used, flat, torch.zeros((), dtype=h.dtype, device=h.device))
        masked = flat.reshape(h.shape)
        if self.call.site.shard is not None:
            y = self._narrow(masked, cut)
            y = add_level_bias(y.reshape(n, y.shape[-1]), cut).reshape(y.shape)
        else:
            y = self.original(masked, *args, **kwargs) if k == f else self._narrow(masked)
            y = compensated(y.reshape(n, y.shape[-1]), flat, cut).reshape(y.shape)
        needed = units_by_width(cut, f) if importance is None or used is None else used.sum()
        cut.record(engine="coupled" if k < f else "mask", tokens=n, needed=needed, read=k, computed=n * k)
        return y

    def _narrow(self, h: Tensor, cut: SiteCut | None = None) -> Tensor:
        """Down for k-wide input. Of a sharded FFN the ranks' sum, each with its part of ``cut``'s low-rank maps."""
        weight, bias, shard = rows(self.linear)[:, : h.shape[-1]], bias_of(self.linear), self.call.site.shard
        if shard is None:
            return nn.functional.linear(h, weight, bias)
        y = nn.functional.linear(h, weight)
        if cut is not None:
            y = add_low_rank(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), cut).reshape(y.shape)
        y = shard.sum(y)
        return y if bias is None else y + bias


class _Owner:
    """Forward of a recognised FFN: the whole call goes to the engines of `sedac_hf.ops`."""

    def __init__(self, call: _Calls, decode: Decode | None) -> None:
        self.call = call
        self.decode = decode
        self.original = original_forward(call.site.owner)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.decode is not None and not args and not kwargs:
            y = self.decode(x)
            if y is not None:
                return y
        cut, site = self.call.cut(), self.call.site
        if cut is None:
            return self._whole(x, *args, **kwargs)
        unusual = (
            args
            or kwargs
            or site.owner.training  # dropout is the class's own affair
            or x.dtype != weight_of(site.down).dtype
            or weight_of(site.down).is_meta  # offloaded since: real inside the linears' own forwards
            or torch.is_autocast_enabled(x.device.type)
        )
        if _rows_of(x) != cut.plan.n_tokens:
            cut = self.call.uneven(_rows_of(x))
        if unusual or cut is None:
            return self.original(x, *args, **kwargs)
        # The kernel's views may have been made without gradients.
        kept = None if cut.kernel is None or torch.is_grad_enabled() else cut.kernel.weights
        y = cut_ffn(x.reshape(-1, x.shape[-1]), kept or site.weights(), cut)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _whole(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The owner's own forward, in which no linear asks again: with cold caches that takes time that shows."""
        scratch = self.call.scratch
        scratch.whole = True
        try:
            return self.original(x, *args, **kwargs)
        finally:
            scratch.whole = False
