"""What describes one FFN of a decoder, and all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.linears import bias_of, rows, weight_of
from sedac_hf.ffn.sharded import Shard
from sedac_hf.ffn.verify import Parts
from sedac_hf.ops.contract import FFNWeights

Kind = Literal["gated", "fused", "plain", "experts"]


class UnitParameter(NamedTuple):
    """A parameter beside an FFN's linears, with an entry per hidden unit (or one in each of two halves) in ``dim``: of
    a norm over the units, of an adapter that adds to them.

    path: its name as seen from the site's owner.
    """

    path: str
    module: nn.Module
    dim: int

    @property
    def value(self) -> Tensor:
        """The live parameter."""
        return cast(Tensor, getattr(self.module, self.path.rpartition(".")[2]))


@dataclass(frozen=True, eq=False)
class FFNSite:
    """One FFN of a decoder.

    kind "gated": gate, up and down; "fused": ``up`` is the one linear of gate and up, ``gate`` is None; "plain": up
    and down; "experts": many FFNs in one module, which stands for ``up`` and ``down`` too and has no linears, see
    ``experts``. Sizes come from the weights; ``intermediate_size`` is that of one expert. ``activation`` is None when
    it can't be read. ``plain_forward``: the owner's forward was seen to be ``down(act(gate x) * up x)`` (plain:
    ``down(act(up x))``) on numbers, and its weights may be read directly. ``beside``: the owner's other parameters
    that have an entry per unit. ``origin``: the first site with the same weights, where they are tied to another
    module's; ``tied``: paths of those of ``beside`` that an earlier site has too. ``shard``: how a tensor-parallel FFN
    is dealt out; its linears then count as what this process holds of them.
    """

    layer_idx: int
    name: str
    owner: nn.Module
    kind: Kind
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    hidden_size: int
    intermediate_size: int
    activation: Callable[[Tensor], Tensor] | None = None
    plain_forward: bool = False
    fused_gate_first: bool = field(default=True, repr=False)
    beside: tuple[UnitParameter, ...] = field(default=(), repr=False)
    origin: FFNSite | None = field(default=None, repr=False)
    tied: frozenset[str] = field(default=frozenset(), repr=False)
    shard: Shard | None = field(default=None, repr=False)
    experts: Experts | None = field(default=None, repr=False)

    @property
    def total_units(self) -> int:
        """Units over all tensor-parallel ranks; ``intermediate_size`` counts those that this process holds."""
        return self.intermediate_size if self.shard is None else self.shard.units

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The site's linears, gate first, down last; experts have none."""
        if self.experts is not None:
            return ()
        return tuple(linear for linear in (self.gate, self.up, self.down) if linear is not None)

    @property
    def weight(self) -> Tensor:
        """The live weight of down (of all experts' downs), or as much of it as this process holds."""
        return weight_of(self.down) if self.experts is None else self.experts.down

    @property
    def like(self) -> Tensor:
        """A live tensor of the device and the dtype that this FFN computes in: the weight, or where down has none that
        can be seen the first floating tensor that it holds (an empty one, if it holds no such)."""
        if self.experts is not None or isinstance(getattr(self.down, "weight", None), Tensor):
            return self.weight
        held = [*self.down.parameters(), *self.down.buffers()]
        floating = next((tensor for tensor in held if tensor.is_floating_point()), None)
        return torch.empty(0, device=held[0].device if held else None) if floating is None else floating

    def weights(self) -> FFNWeights:
        """Views of the live weights, as they are now.

        Raises:
            UnsupportedModelError: the activation can't be read.
        """
        if self.activation is None:
            raise UnsupportedModelError(
                f"the FFN {self.name!r} has no activation that can be read: looked for a callable attribute of "
                f"{type(self.owner).__name__} that reproduces its output; cut it through its linears instead"
            )
        gate, up, down, gate_bias, up_bias, down_bias = self.parts()
        return FFNWeights(gate, up, down, gate_bias, up_bias, down_bias, self.activation)

    def parts(self) -> Parts:
        """Views of gate, up, down and their biases, as in `FFNWeights`."""
        up, bias, f = rows(self.up), bias_of(self.up), self.intermediate_size
        if self.kind == "fused":
            first, second = slice(0, f), slice(f, 2 * f)
            gate, rest = (first, second) if self.fused_gate_first else (second, first)
            biases: tuple[Tensor | None, Tensor | None] = (None, None)
            if bias is not None:
                biases = bias[gate], bias[rest]
            return up[gate], up[rest], rows(self.down), *biases, bias_of(self.down)
        if self.gate is None:
            return None, up, rows(self.down), None, bias, bias_of(self.down)
        return rows(self.gate), up, rows(self.down), bias_of(self.gate), bias, bias_of(self.down)


@dataclass(frozen=True, eq=False)
class ModelSites:
    """The decoder layers of a model and their FFNs, in layer order. Layers without an FFN have no site."""

    decoder_layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    hidden_size: int
    sites: tuple[FFNSite, ...]
