"""Is an FFN's forward really ``down(act(gate x) * up x)``? Decided on numbers, and its activation read on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.ffn.linears import close, is_readable, linear_shape
from sedac_hf.ops.activations import KNOWN, Activation

# gate, up, down and their biases
Parts = tuple["Tensor | None", Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]


_ACTIVATION_NAME = re.compile(r"act|gelu|silu|swish|relu|nonlin|non_lin", re.I)


def verified_formula(
    owner: nn.Module, linears: tuple[nn.Module, ...], parts: Callable[[], Parts], activation: Activation | None = None
) -> Activation | None:
    """The activation for which ``owner(x)`` equals the formula on random x, or None where none does.

    ``parts`` gives gate, up, down and their biases; ``activation`` is the only one tried where it is given. None too
    where the weights can't be read directly (meta, offloaded, quantised, hooked) or the owner needs more than x. The
    model's training mode is left as it was.
    """
    if not all(is_readable(linear) for linear in linears) or hasattr(owner, "_hf_hook"):
        return None
    gate, up, down, gate_bias, up_bias, down_bias = parts()
    x = torch.randn(3, up.shape[1], generator=torch.Generator().manual_seed(0)).to(up.device, up.dtype)
    with torch.no_grad():
        got = run_alone(owner, x)
        if got is None:
            return None
        z_up = functional.linear(x, up, up_bias)
        z = z_up if gate is None else functional.linear(x, gate, gate_bias)
        for candidate in activations_of(owner) if activation is None else (activation,):
            h = applied(candidate, z)
            if h is None:
                continue
            if close(got, functional.linear(h if gate is None else h * z_up, down, down_bias)):
                return candidate
    return None


def run_alone(owner: nn.Module, x: Tensor, extra: int = 0) -> Tensor | None:
    """``owner(x, 0, ...)`` in eval mode with ``extra`` zero tensors, or None where the owner can't be called so.

    x [n, d] goes in as a batch of one sequence, as most classes expect it, or else flat.
    """
    got = _called(owner, x[None], extra)
    return got[0] if got is not None and got.dim() == 3 and got.shape[0] == 1 else _called(owner, x, extra)


def _called(owner: nn.Module, x: Tensor, extra: int) -> Tensor | None:
    modes = [(module, module.training) for module in owner.modules()]
    try:
        for module, _ in modes:
            module.training = False
        got = owner(x, *(torch.zeros_like(x) for _ in range(extra)))
    except Exception:  # a foreign module that was called out of its context may raise anything
        return None
    finally:
        for module, training in modes:
            module.training = training
    return got if isinstance(got, Tensor) else None


def activations_of(owner: nn.Module) -> tuple[Activation, ...]:
    """What an owner's activation may be, likeliest first; known functions for classes that name none come last."""
    return (*_callables(owner), *KNOWN.values())


def named_activation(owner: nn.Module) -> Activation | None:
    """The activation that the owner names (act_fn, activation_fn, gelu_impl, ...), unverified; or None."""
    return next(_callables(owner, named_only=True), None)


def _callables(owner: nn.Module, *, named_only: bool = False) -> Iterator[Activation]:
    named: list[Activation] = []
    others: list[Activation] = []
    for name, value in (*owner.named_modules(), *vars(owner).items()):
        if value is owner or not callable(value) or isinstance(value, type) or name.startswith("_"):
            continue
        if isinstance(value, nn.Module) and (linear_shape(value) is not None or isinstance(value, nn.Dropout)):
            continue
        is_named = _ACTIVATION_NAME.search(name.rpartition(".")[2]) is not None
        sample = applied(value, probe_for(value)) if is_named else None
        if is_named and sample is not None and bool(sample.isfinite().all()):
            named.append(value)
        elif not is_named and isinstance(value, nn.Module) and not any(True for _ in value.children()):
            others.append(value)
    yield from named
    if not named_only:
        yield from others


def probe_for(value: object) -> Tensor:
    """A few numbers [1, 3] for an activation, on its device and in its dtype where it has one."""
    like = next(iter(value.parameters()), None) if isinstance(value, nn.Module) else None
    probe = torch.tensor([[-1.0, 0.0, 2.0]])
    return probe if like is None else probe.to(like.device, like.dtype)


def applied(activation: Activation, z: Tensor) -> Tensor | None:
    """``activation(z)``, or None where that is no tensor of z's shape."""
    with torch.no_grad():
        try:
            got = activation(z)
        except Exception:  # whatever a foreign callable raises, it is not the activation
            return None
    return got if isinstance(got, Tensor) and got.shape == z.shape else None
