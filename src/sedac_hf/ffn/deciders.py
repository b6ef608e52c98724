"""What decides which units a token needs in an FFN: a shadow, the exact gate, or the hidden values themselves; for
experts one of these for each."""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.linears import norms
from sedac_hf.ffn.shadow import ExactGate, Shadow, can_be_read, probed_down_norms
from sedac_hf.ffn.site import FFNSite


class ExpertShadows:
    """A shadow for each expert. Figures are of what one token's experts read and compute.

    Attributes:
        chosen_matrices: matrices of which a token needs its units alone, beside what deciding costs.
    """

    def __init__(self, experts: Experts, bits: int) -> None:
        self.shadows = [Shadow.of(experts.weights(expert), bits) for expert in range(experts.count)]
        self.bytes = experts.top_k * self.shadows[0].bytes
        self.multiply_adds = experts.top_k * self.shadows[0].multiply_adds
        self.chosen_matrices = experts.matrices

    @staticmethod
    def bytes_for(experts: Experts, bits: int) -> int:
        """Bytes that the shadows of all experts would hold; 0 where none can be made."""
        if experts.activation is None:
            return 0
        sizes = experts.intermediate_size, experts.hidden_size, bits
        return experts.count * Shadow.bytes_of(*sizes, biased=experts.biased)

    @property
    def held_bytes(self) -> int:
        """Bytes that they take in memory."""
        return sum(shadow.bytes for shadow in self.shadows)

    def importance(self, x: Tensor, expert: int, h: Tensor | None = None) -> Tensor:
        """Importance of an expert's units for x [m, d] -> float32 [m, f]; no gradient."""
        return self.shadows[expert].importance(x)

    def interleave(self) -> None:
        """See `Shadow.interleave`."""
        for shadow in self.shadows:
            shadow.interleave()


class ExpertUnits:
    """The hidden values decide themselves: importance_j = |h_j| * ||down_j||. Gate and up are computed whole, so it
    saves down alone; for experts of which no low-bit copy is wanted or can be made."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.unit_norm = experts.down_norms()
        self.held_bytes = 4 * self.unit_norm.numel()
        self.multiply_adds = experts.top_k * (experts.matrices - 1) * experts.hidden_size * experts.intermediate_size
        self.bytes = 2 * self.multiply_adds  # read; as a bf16 base holds it, like all of the needed share
        self.chosen_matrices = 1

    def importance(self, x: Tensor, expert: int, h: Tensor | None = None) -> Tensor:
        """Importance of an expert's units for x [m, d] -> float32 [m, f], or of those in h [m, k]; no gradient."""
        with torch.no_grad():
            h = self._experts.hidden(expert, x) if h is None else h.detach()
            self.unit_norm = self.unit_norm.to(h.device)
            return h.float().abs() * self.unit_norm[expert, : h.shape[-1]]


class SiteUnits:
    """The same for an FFN whose activation cannot be read: it is asked in front of down, with the values there."""

    chosen_matrices = 1

    def __init__(self, site: FFNSite) -> None:
        self.unit_norm = norms(site.parts()[2], dim=0) if can_be_read(site) else probed_down_norms(site)
        self.held_bytes = 4 * self.unit_norm.numel()
        self.multiply_adds = (1 if site.kind == "plain" else 2) * site.hidden_size * site.intermediate_size
        self.bytes = 2 * self.multiply_adds  # as in `ExpertUnits`

    def importance(self, h: Tensor) -> Tensor:
        """Importance of the first k units from their values h [n, k] -> float32 [n, k]; no gradient."""
        with torch.no_grad():
            return h.detach().float().abs() * self.unit_norm.to(h.device)[: h.shape[-1]]


Decider = Shadow | ExactGate | SiteUnits | ExpertShadows | ExpertUnits


def decider(site: FFNSite, bits: int) -> Decider:
    """A shadow where one is wanted and can be made, else what the weights decide themselves.

    bits: of the shadow; 0: none is wanted.
    """
    experts = site.experts
    if experts is not None:
        if not experts.readable:
            raise UnsupportedModelError(
                f"the experts {site.name!r} must be in memory for their units to be chosen, got offloaded ones: keep "
                "them on a device, or cut by width after calibrating elsewhere"
            )
        return ExpertUnits(experts) if bits == 0 or experts.activation is None else ExpertShadows(experts, bits)
    if site.activation is None:
        return SiteUnits(site)
    if bits == 0:
        return ExactGate(site)
    try:
        return Shadow.build(site, bits)
    except UnsupportedModelError:
        return ExactGate(site)


def importance_of(deciding: Shadow | ExactGate | SiteUnits, x: Tensor, h: Tensor) -> Tensor:
    """Importance of an FFN's units, float32 [n, f], for its input x [n, d] and its hidden values h [n, f]."""
    return deciding.importance(h if isinstance(deciding, SiteUnits) else x)


def bytes_for(site: FFNSite, bits: int) -> int:
    """Bytes that the shadow of a site would hold; 0 where none can be made."""
    return Shadow.bytes_for(site, bits) if site.experts is None else ExpertShadows.bytes_for(site.experts, bits)
