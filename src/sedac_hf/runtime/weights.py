"""What a policy makes of the base's weights: channel order and memory layout, put in place and taken back; shadows,
and the compiled kernels on the weights as they lie."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, can_reorder, undo_order
from sedac_hf.ffn.deciders import Decider, ExpertShadows, ExpertUnits, SiteUnits, decider
from sedac_hf.ffn.expert_calls import LayerKernels
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.layout import lay_out_as_usual, lay_out_by_units
from sedac_hf.ffn.linears import is_readable, stored_bytes
from sedac_hf.ffn.shadow import Shadow
from sedac_hf.ffn.sharded import local_part
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.compiled import available
from sedac_hf.ops.contract import DecodeKernel, dense
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.triton.engine import TritonFFN, kernel_device
from sedac_hf.runtime.stats import SiteCost

# A module's parameters, the name of one, and its address and bytes: what a kernel reads.
_Place = tuple[dict[str, Any], str, int, int]


class PreparedWeights:
    """Channel order, layout, shadows and kernels of a decoder's FFNs; `restore` gives every bit back.

    Args:
        kernels: names of the engines whose kernels may be used, of "rust" and "triton".

    Attributes:
        uses_kernels: the CPU kernels may be used, and weights on a CPU are laid out for them.
        moves: how often weights have been laid out otherwise.
    """

    def __init__(self, sites: Sequence[FFNSite], *, kernels: Collection[str]) -> None:
        self.sites = tuple(sites)
        places = {id(site): i for i, site in enumerate(self.sites)}
        # For each site, the one whose order, shadow and kernel it has: where weights are tied, the first with them.
        self._first = tuple(places[id(site.origin or site)] for site in self.sites)
        self.uses_kernels = "rust" in kernels and available()
        self._uses_triton = "triton" in kernels
        self.shadows: list[Decider | None] = [None] * len(self.sites)
        self._orders: tuple[Tensor | None, ...] | None = None
        self._by_units: dict[int, tuple[nn.Module, ...]] = {}  # of the FFNs that lie by units: the modules changed
        self.moves = 0
        self._kernels = self._no_kernels()
        self._of_experts: dict[int, LayerKernels] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kernels": self._no_kernels(), "_of_experts": {}}  # kernels are made of addresses

    def _no_kernels(self) -> list[tuple[list[_Place], DecodeKernel | None] | None]:
        return [None] * len(self.sites)

    @property
    def has_shadows(self) -> bool:
        return any(shadow is not None for shadow in self.shadows)

    @property
    def shadow_bytes(self) -> int:
        """Bytes that the deciders hold, on all ranks of a tensor-parallel base."""
        held = 0
        for site, shadow in zip(self.sites, self.shadows, strict=True):
            if site.origin is not None:
                continue
            held += 0 if shadow is None else shadow.held_bytes * (1 if site.shard is None else site.shard.ranks)
        return held

    def reorder(self, orders: Sequence[Tensor | None] | None) -> None:
        """Put the units of each FFN in a new order (None: leave); if one fails, those done are taken back. FFNs whose
        weights are tied to an earlier one's have its order."""
        if orders is None:
            return
        orders = [orders[first] for first in self._first]
        done: list[tuple[FFNSite, Tensor]] = []
        try:
            for site, order in zip(self.sites, orders, strict=True):
                if order is not None:
                    apply_order(site, order)
                    done.append((site, order))
        except BaseException:
            for site, order in reversed(done):
                undo_order(site, order)
            raise
        self._orders = tuple(orders)

    def lay_out(self, by_units: Collection[int]) -> bool:
        """Have these FFNs' weights lie so that single units can be read quickly, where kernels are used, and the
        others' as usual. Gives whether any have moved."""
        read_by_units = [*(["cpu"] if self.uses_kernels else []), *([kernel_device()] if self._uses_triton else [])]
        wanted = {self._first[i] for i in by_units} if read_by_units else set()
        if wanted == self._by_units.keys():
            return False
        self.moves += 1
        self._kernels, self._of_experts = self._no_kernels(), {}
        for i in [i for i in self._by_units if i not in wanted]:
            lay_out_as_usual(self._by_units.pop(i))
        for i in sorted(wanted - self._by_units.keys()):
            self._by_units[i] = lay_out_by_units(self.sites[i], read_by_units)
        return True

    def restore(self) -> None:
        """Natural order, the usual layout, no shadows.

        Raises:
            UnsupportedModelError: weights have been offloaded since; nothing has been changed.
        """
        self.check_restorable()
        self.lay_out(())
        self._undo()
        self.shadows = [None] * len(self.sites)
        self._kernels = self._no_kernels()

    def check_restorable(self) -> None:
        """Raise UnsupportedModelError where an order cannot be taken back, as weights have been offloaded since."""
        for site, order in zip(self.sites, self._orders or (), strict=False):
            if order is not None and not can_reorder(site):
                raise UnsupportedModelError(
                    f"the weights of {site.name!r} must be in memory for their order to be taken back, and they have "
                    "been offloaded since: bring them back first (`accelerate.hooks.remove_hook_from_submodules`)"
                )

    def _undo(self) -> tuple[Tensor | None, ...] | None:
        orders, self._orders = self._orders, None
        for site, order in zip(self.sites, orders or (), strict=False):
            if order is not None:
                undo_order(site, order)
        return orders

    @contextmanager
    def natural_order(self) -> Iterator[None]:
        """The base's weights as they came, order and layout, for the length of a ``with`` block. Not for concurrent
        use."""
        self.check_restorable()
        by_units = tuple(self._by_units)
        self.lay_out(())
        orders = self._undo()
        try:
            yield
        finally:
            self.reorder(orders)
            self.lay_out(by_units)

    def natural_down(self, site: int) -> Tensor:
        """A copy of an FFN's down matrix, float32 [d, f] on the CPU, units in natural order whatever is in place."""
        down = dense(self.sites[site].parts()[2].detach()).float().cpu()
        order = None if self._orders is None else self._orders[site]
        return down.clone() if order is None else down[:, torch.argsort(order)]

    def build_shadows(self, bits: int) -> None:
        """Make the shadows of all FFNs, from the weights as they are now; 0 bits: the exact gates decide.

        Weights that cannot be read here (4-bit, offloaded, wrapped) get no copy: their exact gate decides.
        """
        self._kernels = self._no_kernels()
        made = {i: decider(self.sites[i], bits) for i in sorted(set(self._first))}
        self.shadows = [made[first] for first in self._first]
        for shadow in made.values():
            # In place of the plain layout: a shadow has no second copy either.
            if isinstance(shadow, Shadow | ExpertShadows) and self.uses_kernels:
                shadow.interleave()

    def kernel(self, site: int) -> DecodeKernel | None:
        """The compiled kernel of an FFN on its weights as they lie now; None where the kernels can't run it."""
        if not (self.uses_kernels or self._uses_triton) or not self.sites[site].plain_forward:
            return None
        site = self._first[site]
        known = self._kernels[site]
        if known is not None:
            for held, name, address, size in known[0]:
                tensor = held.get(name)
                if tensor is None:
                    if address:
                        break
                elif address != tensor.data_ptr() or size != tensor.nbytes:
                    break
            else:
                return known[1]
        held_by: list[dict[str, Any]] = [linear._parameters for linear in self.sites[site].linears]
        places = [(held, name, *_memory(held.get(name))) for held in held_by for name in ("weight", "bias")]
        kernel = self._make_kernel(site)
        self._kernels[site] = (places, kernel)
        return kernel

    def _make_kernel(self, i: int) -> DecodeKernel | None:
        site, shadow = self.sites[i], self.shadows[i]
        if not site.plain_forward or not all(is_readable(linear) for linear in site.linears):
            return None
        weights = site.weights()
        if isinstance(shadow, Shadow):
            shadow.move(weights.up.device)  # the model may have been moved since the shadow was made
        if self.uses_kernels and CpuFFN.fits(weights):
            return CpuFFN(weights, shadow.tables() if isinstance(shadow, Shadow) else None)
        if self._uses_triton and isinstance(shadow, Shadow):
            tables = shadow.tables(interleaved=False)
            return TritonFFN(weights, tables) if tables is not None and TritonFFN.fits(weights, tables) else None
        return None

    def expert_kernels(self, site: int) -> Callable[[int], DecodeKernel | None] | None:
        """The compiled kernels of a site's experts, by expert; None where it has none."""
        experts, shadow = self.sites[site].experts, self.shadows[site]
        if experts is None or experts.activation is None or not self.uses_kernels or not experts.readable:
            return None
        places = tuple(_memory(p) for p in experts.parameters)
        known = self._of_experts.get(site)
        if known is None or known.places != places or known.shadow is not shadow:
            known = self._of_experts[site] = LayerKernels(experts, shadow, places)
        return known

    def importance(self, site: int) -> Callable[..., Tensor] | None:
        """What decides which units a token uses in this FFN, asked with x (and for experts with which one); None where
        there is no shadow."""
        shadow = self.shadows[site]
        return None if shadow is None else shadow.importance

    def costs(self) -> tuple[SiteCost, ...]:
        """Cost of each FFN, with its shadow where it has one."""
        return tuple(_cost(site, shadow) for site, shadow in zip(self.sites, self.shadows, strict=True))


def _memory(tensor: Tensor | None) -> tuple[int, int]:
    """Address and bytes."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def _cost(site: FFNSite, shadow: Decider | None) -> SiteCost:
    if site.experts is not None:
        return _experts_cost(site.experts, shadow)
    matrices = 2 if site.kind == "plain" else 3
    weight = next(map(local_part, site.down.parameters()), None)
    return SiteCost(
        units=site.intermediate_size,
        unit_parameters=matrices * site.hidden_size,
        element_bytes=4 if weight is None else stored_bytes(weight) / max(weight.numel(), 1),
        shadow_bytes=0 if shadow is None else shadow.bytes,
        shadow_multiply_adds=0 if shadow is None else shadow.multiply_adds,
        chosen_parameters=shadow.chosen_matrices * site.hidden_size if isinstance(shadow, SiteUnits) else 0,
    )


def _experts_cost(experts: Experts, shadow: Decider | None) -> SiteCost:
    chosen = shadow.chosen_matrices if isinstance(shadow, ExpertShadows | ExpertUnits) else experts.matrices
    return SiteCost(
        units=experts.top_k * experts.intermediate_size,
        unit_parameters=experts.matrices * experts.hidden_size,
        element_bytes=experts.down.element_size(),
        shadow_bytes=0 if shadow is None else shadow.bytes,
        shadow_multiply_adds=0 if shadow is None else shadow.multiply_adds,
        chosen_parameters=chosen * experts.hidden_size,
        all_units=experts.count * experts.intermediate_size,
    )
