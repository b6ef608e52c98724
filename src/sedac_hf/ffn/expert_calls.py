"""What runs in place of a layer's experts, and the compiled kernels that it uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from sedac_hf.ffn.deciders import Decider, ExpertShadows
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.linears import original_forward
from sedac_hf.ffn.site import FFNSite
from sedac_hf.ops.contract import DecodeKernel, SiteCut
from sedac_hf.ops.experts import ExpertKernels
from sedac_hf.ops.rust_cpu import CpuFFN


class Call(Protocol):
    """Where a forward's cut comes from: see `sedac_hf.ffn.coupled`."""

    site: FFNSite

    def cut(self) -> SiteCut | None: ...
    def uneven(self, n: int) -> SiteCut | None: ...


class ExpertsOwner:
    """Forward of a layer's experts, called as their `sedac_hf.ffn.expert_routing.Reading` says."""

    def __init__(self, call: Call, experts: Experts, kernels: Callable[[], ExpertKernels | None] | None) -> None:
        self.call = call
        self.experts = experts
        self.kernels = kernels
        self.original = original_forward(call.site.owner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cut, experts = self.call.cut(), self.experts
        given = None if cut is None else experts.given(args, kwargs)
        if cut is None or given is None:
            return self.original(*args, **kwargs)
        x, down = given[0], experts.down
        if x.dtype != down.dtype or torch.is_autocast_enabled(x.device.type):
            return self.original(*args, **kwargs)
        n = experts.tokens(given)
        if n != cut.plan.n_tokens:
            cut = self.call.uneven(n)
        if cut is None:
            return self.original(*args, **kwargs)
        learns = torch.is_grad_enabled() and (x.requires_grad or down.requires_grad)
        kernels = None if self.kernels is None or learns else self.kernels()
        y = experts.output(given, cut, kernels)
        return self.original(*args, **kwargs) if y is None else y


class LayerKernels:
    """The compiled kernels of one layer's experts, each made when it is first asked for."""

    def __init__(self, experts: Experts, shadow: Decider | None, places: tuple[tuple[int, int], ...]) -> None:
        self.places = places
        self.shadow = shadow
        self._experts = experts
        self._made: dict[int, CpuFFN | None] = {}

    def __call__(self, expert: int) -> DecodeKernel | None:
        if expert not in self._made:
            with torch.no_grad():
                weights = self._experts.weights(expert)
            shadows = self.shadow.shadows if isinstance(self.shadow, ExpertShadows) else None
            tables = None if shadows is None else shadows[expert].tables()
            self._made[expert] = CpuFFN(weights, tables) if CpuFFN.fits(weights) else None
        return self._made[expert]
