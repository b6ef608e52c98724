"""Which modules hold a mixture's experts: found by shapes, flags and the signature, checked on numbers.

Where a module's own forward gives something else than what was made of it, it is no FFN of ours and runs whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from sedac_hf.ffn.expert_routing import AllUsed, OwnRouter, Reading, Routed, Weighted
from sedac_hf.ffn.experts import Experts, argument_names
from sedac_hf.ffn.linears import close
from sedac_hf.ffn.verify import activations_of, applied, named_activation
from sedac_hf.ops.activations import Activation
from sedac_hf.ops.contract import is_ordinary

_ROUTED = ("top_k", "num_experts_per_tok", "num_selected_experts")
_TRIED = 3  # rows, and experts

Stacks = dict[str, Tensor]


def as_experts(module: nn.Module, parent: nn.Module | None) -> Experts | None:
    """The experts that a module holds; None where it holds none that can be cut.

    parent: the block around it, which knows how many of them a token uses.
    """
    if getattr(module, "_is_expert_parallel", False) or getattr(module, "has_post_expert_norm", False):
        return None
    stacks, readings = _stacks(module)
    if len(stacks) not in (2, 3) or not all(
        is_ordinary(p) and p.dtype.is_floating_point and p.dtype.itemsize > 1 for p in stacks.values()
    ):
        return None
    for reading, experts in itertools.product(readings, _candidates(module, stacks)):
        used = experts.count if isinstance(reading, AllUsed) else _top_k(module, parent, experts.count)
        tried = replace(experts, reading=reading, top_k=used)
        if not tried.readable:  # only what lays down its names and flags is believed untried
            return tried if type(reading) is Routed and tried.down_name == "down_proj" else None
        if _as_said(tried):
            return replace(tried, activation=_formula(tried))
    return None


def _stacks(module: nn.Module) -> tuple[Stacks, list[Reading]]:
    """The parameters in which all experts may be, down last, and how the module may be called then."""
    direct: Stacks = {name: p for name, p in module.named_parameters(recurse=False) if _is_stack(p)}
    if direct:
        takes = len(argument_names(module))
        readings: list[Reading] = [Routed()] if takes > 2 else [AllUsed(rank=3)] if takes == 2 else [Weighted()]
        return dict(sorted(direct.items(), key=lambda item: item[0] == "down_proj")), readings
    linears: Stacks = {
        f"{name}.weight": p
        for name, child in module.named_children()
        if (p := _only_weight(child)) is not None and _is_stack(p)
    }
    if linears:
        others = [name for name, _ in module.named_children() if f"{name}.weight" not in linears]
        return linears, [OwnRouter(router=name) for name in others] if len(argument_names(module)) == 1 else []
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or count < 2 or len(argument_names(module)) != 3:
        return {}, []
    flat: Stacks = {
        f"{name}.{inner}": p
        for name, child in module.named_children()
        for inner, p in child.named_parameters(recurse=False)
        if p.dim() == 2 and p.shape[0] % count == 0
    }
    return flat if len({p.shape for p in flat.values()}) == 1 else {}, [Routed(rank=3)]


def _only_weight(module: nn.Module) -> Tensor | None:
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.get("weight") if len(parameters) == 1 else None


def _is_stack(tensor: Tensor) -> bool:
    return tensor.dim() == 3 and min(tensor.shape[1:]) > 1


def _candidates(module: nn.Module, stacks: Stacks) -> Iterator[Experts]:
    """What the shapes allow: which of the parameters is the gate, and which of them lie [in, out]."""
    shapes = {name: _shape(module, p) for name, p in stacks.items()}
    *firsts, down_name = stacks
    count, *sides = shapes[down_name]
    said = getattr(module, "is_transposed", None)
    for transposed in ((False, False), (True, True), (False, True), (True, False)):
        if said is not None and transposed != (said, said):
            continue
        d, f = reversed(sides) if transposed[1] else sides
        for names in itertools.permutations(firsts):
            rows = [shapes[name][2 if transposed[0] else 1] for name in names]
            inputs = {shapes[name][1 if transposed[0] else 2] for name in names}
            if inputs != {d} or rows not in ([f], [2 * f], [f, f]) or any(shapes[name][0] < count for name in names):
                continue
            gated = rows != [f]
            yield Experts(
                module, names, down_name, Routed(), count, count, d, f, gated, *transposed,
                interleaved=gated and not getattr(module, "is_concatenated", True),
                biased=bool(getattr(module, "has_bias", False)),
                act=named_activation(module),
                identity=shapes[names[0]][0] > count,
            )  # fmt: skip


def _shape(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    if parameter.dim() == 3:
        return tuple(parameter.shape)
    count = int(module.num_experts)  # type: ignore[arg-type]
    return count, parameter.shape[0] // count, parameter.shape[1]


def _top_k(module: nn.Module, parent: nn.Module | None, count: int) -> int:
    """How many experts a token uses, as the module, its block or a router says; all of them where none does."""
    around = () if parent is None else (parent, *parent.children())
    for holder in (module, *module.children(), *around):
        for name in _ROUTED:
            value = getattr(holder, name, None)
            if isinstance(value, int) and 0 < value <= count:
                return value
    return count


def _as_said(experts: Experts) -> bool:
    """Whether the module's own forward gives what was made of its weights and of its call."""
    n, k = _TRIED, max(1, min(2, experts.count - 1))
    generator = torch.Generator().manual_seed(0)
    like = experts.down
    x = torch.randn(n, experts.hidden_size, generator=generator).to(like.device, like.dtype)
    index = torch.stack([(torch.arange(k) - row) % experts.count for row in range(n)]).to(like.device)
    if experts.identity:
        index[0, 0] = experts.count
    weights = torch.rand(n, k, generator=generator).to(like.device, like.dtype)
    # Biases of zeros and scales of ones would hide themselves.
    others = {
        name: torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        for name, p in experts.module.named_parameters(recurse=False)
        if p.dim() == 1
    }
    with torch.no_grad():
        try:
            given = experts.reading.arguments(experts.count, x, index, weights)
            got = functional_call(experts.module, others, given)
            routing = experts.routing(given)
            if routing is None:
                return False
            if routing.added is not None:
                got = got - others["bias"] + routing.added
            wanted = experts.output(given, None)
        except Exception:  # a foreign module that was called out of its context may raise anything
            return False
        return wanted is not None and close(got, wanted)


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
