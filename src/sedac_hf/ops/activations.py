"""The activations that kernels know by name, and how a foreign callable is recognised as one of them.

A kernel cannot call Python, so it needs to know which function a module's activation is. Names are not trusted
(classes wrap, rename and parametrise their activations): the callable is compared with each known function on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def gelu_tanh(z: Tensor) -> Tensor:
    """GELU in its tanh form."""
    return functional.gelu(z, approximate="tanh")


def quick_gelu(z: Tensor) -> Tensor:
    """``z * sigmoid(1.702 z)``."""
    return z * torch.sigmoid(1.702 * z)


def relu_squared(z: Tensor) -> Tensor:
    """``relu(z) ** 2``."""
    return functional.relu(z).square()


KNOWN: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": gelu_tanh,
        "quick_gelu": quick_gelu,
        "relu": functional.relu,
        "relu_squared": relu_squared,
    }
)
"""Name -> function, elementwise; the names are those that every kernel uses."""

_GRID = torch.linspace(-12, 12, 961)  # the known functions differ by 1e-4 and more somewhere on it
_FAR = torch.tensor([-1e4, -500.0, -100.0, -50.0, -20.0, -14.0, 14.0, 20.0, 50.0, 100.0, 500.0, 1e4])  # clamps show
_ERROR = 2e-6  # of the largest value: what formulas of one function differ by in float32


def name_of(activation: Activation) -> str | None:
    """The name in `KNOWN` of the function that ``activation`` computes, or None where it is none of them."""
    with torch.no_grad():
        try:
            got, far = activation(_GRID.clone()), activation(_FAR.clone())
        except Exception:  # a foreign callable may raise anything; it is then no function that a kernel knows
            return None
        if not isinstance(got, Tensor) or got.shape != _GRID.shape or got.device.type != "cpu":
            return None
        for name, known in KNOWN.items():
            wanted = known(_GRID)
            near = float((got.float() - wanted).abs().max()) <= _ERROR * float(wanted.abs().max())
            if near and torch.allclose(far.float(), known(_FAR), rtol=1e-5, atol=_ERROR):
                return name
    return None
