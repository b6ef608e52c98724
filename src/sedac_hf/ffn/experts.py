"""The experts of a mixture-of-experts layer: many FFNs in a few 3-D parameters, of which a token uses some.

Found by what transformers' experts interface lays down (names of parameters, flags, the call ``(x, index, weights)``),
flags that are missing being read off the shapes, and checked on numbers: where a module's forward is something else,
it is no FFN of ours and runs whole.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.linears import close, norms
from sedac_hf.ffn.verify import activations_of, applied
from sedac_hf.ops.activations import Activation
from sedac_hf.ops.contract import FFNWeights, is_ordinary
from sedac_hf.ops.experts import cut_experts

_FLAGS = {"is_concatenated": True, "has_bias": False, "has_post_expert_norm": False}
_ROUTED = ("top_k", "num_experts_per_tok", "num_selected_experts")
_TRIED = 3  # rows, and experts


@dataclass(frozen=True, eq=False)
class Experts:
    """Views of all experts of one layer, live; each is an FFN of ``intermediate_size`` units.

    count: experts; top_k: of them, those that a token uses; gated: ``first`` holds gate and up; transposed: weights
    lie [in, out]; interleaved: gate and up rows take turns; activation: where ``h = act(gate x) * up x`` (or
    ``act(up x)``) was seen on numbers, else None; identity: further experts, without weights, give x itself.
    """

    module: nn.Module
    count: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    activation: Activation | None = None
    identity: bool = False

    @property
    def first_name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def first(self) -> nn.Parameter:
        """Gate and up of all experts, [E, 2f, d], or up alone, [E, f, d] (transposed: the other way round)."""
        return cast(nn.Parameter, getattr(self.module, self.first_name))

    @property
    def down(self) -> nn.Parameter:
        """[E, d, f] (transposed: [E, f, d])."""
        return cast(nn.Parameter, self.module.down_proj)

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def readable(self) -> bool:
        """Whether the weights are in memory here."""
        return not any(p.is_meta for p in (self.first, self.down)) and not hasattr(self.module, "_hf_hook")

    def _bias(self, name: str, expert: int) -> Tensor | None:
        return cast(Tensor, getattr(self.module, f"{name}_bias"))[expert] if self.biased else None

    def hidden(self, expert: int, x: Tensor, units: int | None = None) -> Tensor:
        """The first ``units`` hidden units (all of them by default) of an expert for x [m, d] -> [m, units]."""
        f = self.intermediate_size
        k = f if units is None else units
        rows, bias = self.first[expert], self._bias(self.first_name, expert)
        rows = rows.T if self.transposed else rows
        if k == f or not self.gated or self.interleaved:
            end = 2 * k if self.gated else k
            z = functional.linear(x, rows[:end], None if bias is None else bias[:end])
        else:
            parts = [slice(0, k), slice(f, f + k)]
            z = torch.cat([functional.linear(x, rows[p], None if bias is None else bias[p]) for p in parts], dim=-1)
        module: Any = self.module
        if not self.gated:
            return cast(Tensor, module.act_fn(z))
        if hasattr(module, "_apply_gate"):
            return cast(Tensor, module._apply_gate(z))
        gate, up = z.chunk(2, dim=-1)
        return cast(Tensor, module.act_fn(gate) * up)

    def project(self, expert: int, h: Tensor) -> Tensor:
        """Down of an expert for its first units h [m, k] -> [m, d], bias added."""
        return functional.linear(h, self.down_of(expert)[:, : h.shape[-1]], self._bias("down_proj", expert))

    def down_of(self, expert: int) -> Tensor:
        """Down of an expert, [d, f]; a view."""
        return self.down[expert].T if self.transposed else self.down[expert]

    def down_norms(self) -> Tensor:
        """float32 [E, f]: the Euclidean norm of each unit's column of down."""
        return torch.stack([norms(self.down_of(expert), dim=0) for expert in range(self.count)])

    @functools.cached_property
    def _argument_names(self) -> tuple[str, ...]:
        return tuple(inspect.signature(type(self.module).forward).parameters)[1:4]

    def routing(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor] | None:
        """(x [n, d], index [n, k], weights [n, k]) of a call of the module; None for a call of another kind."""
        names = self._argument_names
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, index, weights = (given.get(name) for name in names)
        if len(args) + len(kwargs) != 3 or not isinstance(x, Tensor) or x.dim() != 2:
            return None
        return (x, index, weights) if isinstance(index, Tensor) and isinstance(weights, Tensor) else None

    def weights(self, expert: int) -> FFNWeights:
        """One expert as an FFN.

        Raises:
            UnsupportedModelError: its formula is another one.
        """
        if self.activation is None:
            raise UnsupportedModelError(f"the experts of {type(self.module).__name__} compute another formula")
        f = self.intermediate_size
        rows, bias = self.first[expert], self._bias(self.first_name, expert)
        rows = rows.T if self.transposed else rows
        gate: Tensor | None = None
        gate_bias: Tensor | None = None
        up, up_bias = rows, bias
        if self.gated:
            gates, ups = (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(0, f), slice(f, 2 * f))
            gate, up = rows[gates], rows[ups]
            gate_bias, up_bias = (None, None) if bias is None else (bias[gates], bias[ups])
        return FFNWeights(
            gate, up, self.down_of(expert), gate_bias, up_bias, self._bias("down_proj", expert), self.activation
        )

    def unit_tensors(self, expert: int) -> list[tuple[Tensor, int, int]]:
        """(tensor, dimension of the units, entries per unit there: 1, or 2 side by side, or -2 in two halves) of all
        that has an entry per unit of an expert."""
        per_unit = 1 if not self.gated else 2 if self.interleaved else -2
        found = [
            (self.first[expert], int(self.transposed), per_unit),
            (self.down[expert], int(not self.transposed), 1),
        ]
        bias = self._bias(self.first_name, expert)
        return found if bias is None else [*found, (bias, 0, per_unit)]


def as_experts(module: nn.Module, parent: nn.Module | None) -> Experts | None:
    """The experts that a module holds; None where it holds none that can be cut.

    parent: the block around it, which knows how many of them a token uses.
    """
    gated = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    first, down = getattr(module, "gate_up_proj" if gated else "up_proj", None), getattr(module, "down_proj", None)
    if not all(isinstance(p, nn.Parameter) and p.dim() == 3 and is_ordinary(p) for p in (first, down)):
        return None
    assert isinstance(first, nn.Parameter)
    assert isinstance(down, nn.Parameter)
    if not down.dtype.is_floating_point or down.dtype.itemsize < 2 or getattr(module, "_is_expert_parallel", False):
        return None
    flags = {name: getattr(module, name, default) for name, default in _FLAGS.items()}
    flags["is_transposed"] = getattr(module, "is_transposed", first.shape[2] != down.shape[1])
    if flags["has_post_expert_norm"]:
        return None
    transposed = bool(flags["is_transposed"])
    count, d, f = down.shape if not transposed else (down.shape[0], down.shape[2], down.shape[1])
    if tuple(first.shape[1:]) != ((d, (1 + gated) * f) if transposed else ((1 + gated) * f, d)):
        return None
    if first.shape[0] < count:
        return None
    experts = Experts(
        module=module,
        count=count,
        top_k=_top_k(parent, count),
        hidden_size=d,
        intermediate_size=f,
        gated=gated,
        transposed=transposed,
        interleaved=gated and not flags["is_concatenated"],
        biased=bool(flags["has_bias"]),
        identity=first.shape[0] > count,
    )
    if not experts.readable:
        return experts
    return replace(experts, activation=_formula(experts)) if _as_said(experts) else None


def _top_k(parent: nn.Module | None, count: int) -> int:
    """How many experts a token uses, as the block or its router says; all of them where neither does."""
    for holder in () if parent is None else (parent, *parent.children()):
        for name in _ROUTED:
            value = getattr(holder, name, None)
            if isinstance(value, int) and 0 < value <= count:
                return value
    return count


def _as_said(experts: Experts) -> bool:
    """Whether the module's own forward gives what its flags make of the weights."""
    n, k = _TRIED, min(2, experts.count)
    generator = torch.Generator().manual_seed(0)
    like = experts.down
    x = torch.randn(n, experts.hidden_size, generator=generator).to(like.device, like.dtype)
    index = torch.stack([(torch.arange(k) - row) % experts.count for row in range(n)]).to(like.device)
    if experts.identity:
        index[0, 0] = experts.count
    weights = torch.rand(n, k, generator=generator).to(like.device, like.dtype)
    with torch.no_grad():
        try:
            got = experts.module(x, index, weights)
        except Exception:  # a foreign module that was called out of its context may raise anything
            return False
        return close(got, cut_experts(x, index, weights, experts, None))


def _formula(experts: Experts) -> Activation | None:
    """The activation for which an expert's hidden units are ``act(gate x) * up x``, or ``act(up x)``."""
    like = experts.down
    x = torch.randn(_TRIED, experts.hidden_size, generator=torch.Generator().manual_seed(1)).to(
        like.device, like.dtype
    )
    x = 4 * x  # clamps must show
    with torch.no_grad():
        wanted = experts.hidden(0, x)
        for activation in activations_of(experts.module):
            weights = replace(experts, activation=activation).weights(0)
            deciding = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
            if applied(activation, functional.linear(x, *deciding)) is not None and close(weights.hidden(x), wanted):
                return activation
    return None
