"""What counts as a linear map in a foreign model, and which of them can be sliced.

A linear is `nn.Linear`, transformers' `Conv1D`, or a stand-in for one (quantised, LoRA-wrapped, ...) that carries
``in_features`` and ``out_features``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) sizes of a linear map, from its weights where they show it; None for any other module."""
    if isinstance(module, nn.Embedding):
        return None
    weight = getattr(module, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None
    if isinstance(module, Conv1D):
        return None if shape is None else (shape[0], shape[1])
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    return (inputs, outputs) if shape is None else (shape[1], shape[0])


def is_plain(module: nn.Module) -> bool:
    """Whether the map is ``x W^T + b`` with an ordinary floating weight that may be read in slices.

    False for quantised and tensor-parallel weights, adapters, parametrizations, linears with hooks of others, and
    subclasses that hold more than a weight and a bias. Accelerate's offloading is no obstacle here: it makes the
    weight real inside the linear's own forward.
    """
    if not isinstance(module, nn.Linear | Conv1D) or any(True for _ in module.children()):
        return False
    if not {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}:
        return False
    weight = weight_of(module)
    if type(weight) not in (Tensor, nn.Parameter) or type(weight.data) is not Tensor or weight.dim() != 2:
        return False
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return type(module) in (nn.Linear, Conv1D) or _computes_linear(module)


def weight_of(module: nn.Module) -> Tensor:
    """The weight as the module keeps it."""
    return cast(Tensor, module.weight)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """What a replacement of a module's forward stands in for: behind accelerate's hook where there is one."""
    return cast("Callable[..., Any]", module._old_forward if hasattr(module, "_hf_hook") else module.forward)


def bias_of(module: nn.Module) -> Tensor | None:
    return cast("Tensor | None", module.bias)


def _computes_linear(module: nn.Module) -> bool:
    """Whether a subclass of `nn.Linear` computes what `nn.Linear` does (checked on numbers)."""
    weight = weight_of(module)
    if weight.is_meta or hasattr(module, "_hf_hook"):
        return False
    x = torch.linspace(-1, 1, 2 * weight.shape[1]).to(weight.device, weight.dtype).reshape(2, -1)
    with torch.no_grad():
        try:
            got = type(module).forward(module, x)
        except (RuntimeError, TypeError, ValueError):
            return False
        return close(got, nn.functional.linear(x, weight, bias_of(module)))


def is_readable(module: nn.Module) -> bool:
    """Whether a plain linear's weight may be read from outside its own forward, now and later."""
    return is_plain(module) and not weight_of(module).is_meta and not hasattr(module, "_hf_hook")


def rows(module: nn.Module) -> Tensor:
    """The weight of a plain linear in `nn.Linear` layout [out, in]; a view."""
    return weight_of(module).T if isinstance(module, Conv1D) else weight_of(module)


def sliced(module: nn.Module, x: Tensor, lo: int, hi: int) -> Tensor:
    """Outputs lo..hi of a plain linear for x [..., in] -> [..., hi - lo]."""
    bias = bias_of(module)
    return nn.functional.linear(x, rows(module)[lo:hi], None if bias is None else bias[lo:hi])


def close(got: object, wanted: Tensor) -> bool:
    """Whether a foreign result is the wanted one up to the rounding of its dtype."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    size = float(wanted.double().norm())
    error = float((got.double() - wanted.double()).norm())
    return size > 0 and error <= size * max(1e-5, float(torch.finfo(wanted.dtype).eps))
