"""What a policy makes of the base's weights: the channel order, put in place and taken back, and the shadows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, undo_order
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.runtime.stats import SiteCost


class PreparedWeights:
    """Channel order and shadows of a decoder's FFNs; `restore` gives every bit back."""

    def __init__(self, sites: Sequence[FFNSite]) -> None:
        self.sites = tuple(sites)
        self.shadows: list[Shadow | ExactGate | None] = [None] * len(self.sites)
        self._orders: tuple[Tensor | None, ...] | None = None

    @property
    def has_shadows(self) -> bool:
        return any(shadow is not None for shadow in self.shadows)

    def reorder(self, orders: Sequence[Tensor | None] | None) -> None:
        """Put the units of each FFN in a new order (None: leave); if one fails, those done are taken back."""
        if orders is None:
            return
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

    def restore(self) -> None:
        """Natural order, no shadows."""
        self._undo()
        self.shadows = [None] * len(self.sites)

    def _undo(self) -> tuple[Tensor | None, ...] | None:
        orders, self._orders = self._orders, None
        for site, order in zip(self.sites, orders or (), strict=False):
            if order is not None:
                undo_order(site, order)
        return orders

    @contextmanager
    def natural_order(self) -> Iterator[None]:
        """The base's weights in the order they came in, for the length of a ``with`` block. Not for concurrent use."""
        orders = self._undo()
        try:
            yield
        finally:
            self.reorder(orders)

    def build_shadows(self) -> None:
        """Make the shadows of all FFNs, from the weights as they are now.

        Weights that cannot be read here (4-bit, offloaded, wrapped) get no copy: their exact gate decides.
        """
        self.shadows = [_deciding(site) for site in self.sites]

    def importance(self, site: int) -> Callable[[Tensor], Tensor] | None:
        """What decides which units a token uses in this FFN; None where there is no shadow."""
        shadow = self.shadows[site]
        return None if shadow is None else shadow.importance

    def costs(self) -> tuple[SiteCost, ...]:
        """Cost of each FFN, with its shadow where it has one."""
        return tuple(_cost(site, shadow) for site, shadow in zip(self.sites, self.shadows, strict=True))


def _deciding(site: FFNSite) -> Shadow | ExactGate:
    try:
        return Shadow.build(site)
    except UnsupportedModelError:
        return ExactGate(site)


def _cost(site: FFNSite, shadow: Shadow | ExactGate | None) -> SiteCost:
    matrices = 2 if site.kind == "plain" else 3
    weight = next(iter(site.down.parameters()), None)
    return SiteCost(
        units=site.intermediate_size,
        unit_parameters=matrices * site.hidden_size,
        element_bytes=4 if weight is None else weight.element_size(),
        shadow_bytes=0 if shadow is None else shadow.bytes,
        shadow_multiply_adds=0 if shadow is None else shadow.multiply_adds,
    )
