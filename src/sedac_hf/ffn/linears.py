"""What counts as a linear map in a foreign model, and which of them can be sliced.

A linear is `nn.Linear`, transformers' `Conv1D`, or a stand-in for one (quantised, LoRA-wrapped, ...) that carries
``in_features`` and ``out_features``. A weight that is a tensor subclass (quantised, say) is not looked up in a list of
libraries: whether it can be sliced is tried on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sedac_hf.ffn.sharded import is_sharded, local_part
from sedac_hf.ops.contract import dense, is_ordinary


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) sizes of a linear map, from its weights where they show it; None for any other module."""
    if isinstance(module, nn.Embedding):
        return None
    weight = getattr(module, "weight", None)
    shape = weight.shape if isinstance(weight, Tensor) and weight.dim() == 2 and weight.is_floating_point() else None
    if isinstance(module, Conv1D):
        return None if shape is None else (shape[0], shape[1])
    if isinstance(weight, Tensor) and weight.dim() > 2:  # one linear for each of several experts
        return None
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    return (inputs, outputs) if shape is None else (shape[1], shape[0])


class Slices(NamedTuple):
    """How far the weight of a linear can be read in slices.

    prefix: any rows, and the first k columns, give what the whole weight gives where the rest is zeroed.
    readable: further, the product is linear in x: column ranges add up to the whole, and `dense` shows the numbers.
        (Weights whose class also rounds the activations have the first and not the second.)
    """

    prefix: bool
    readable: bool


_NONE, _ALL = Slices(False, False), Slices(True, True)
_TRIED: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Tensor], Slices]] = weakref.WeakKeyDictionary()
_TRIED_ROWS = 64
_NORM_CHUNK = 1 << 20  # weights that are made dense at a time


def slices_of(module: nn.Module) -> Slices:
    """How far the map is ``x W^T + b`` with a floating weight that may be read in slices; of a sharded one, as much as
    this process holds.

    Nothing for 4-bit and other packed weights, adapters, parametrizations, linears with hooks of others, and
    subclasses that hold more than a weight and a bias. Accelerate's offloading is no obstacle here: it makes the
    weight real inside the linear's own forward.
    """
    if not isinstance(module, nn.Linear | Conv1D) or any(True for _ in module.children()):
        return _NONE
    if not {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}:
        return _NONE
    weight = weight_of(module)
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return _NONE
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return _NONE
    if not is_ordinary(weight) and (isinstance(module, Conv1D) or not hasattr(weight, "__tensor_flatten__")):
        return _NONE
    if type(module) not in (nn.Linear, Conv1D) and not _computes_linear(module):
        return _NONE
    if is_ordinary(weight):
        return _ALL
    tried = _TRIED.get(module)
    if tried is None or tried[0]() is not weight:
        tried = _TRIED[module] = (weakref.ref(weight), _try_slices(weight))
    return tried[1]


def is_plain(module: nn.Module) -> bool:
    """Whether the map is ``x W^T + b`` with an ordinary floating weight, all of it in this process's reach."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and is_ordinary(weight) and slices_of(module).readable


def _try_slices(weight: Tensor) -> Slices:
    """Decide on numbers, in float32 where the class takes it: rounded activations show there."""
    if weight.is_meta:
        return _NONE
    for dtype in dict.fromkeys((torch.float32, weight.dtype)):
        try:
            with torch.no_grad():
                return _tried_in(weight, dtype)
        except Exception:  # whatever a foreign class raises, it has no slices
            continue
    return _NONE


def _tried_in(weight: Tensor, dtype: torch.dtype) -> Slices:
    linear, (n_out, n_in) = nn.functional.linear, weight.shape
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(2))
    x[0].abs_()  # activations that are rounded to their own range: one row's does not hold zero
    x = x.to(weight.device, dtype)
    k, m = max(1, n_in // 3), max(1, n_out // 3)
    kept = x.clone()
    kept[:, k:] = 0
    whole, masked = linear(x, weight), linear(kept, weight)
    prefix = (
        close(linear(x, weight[:m]), whole[:, :m])
        and close(linear(x, weight[m:]), whole[:, m:])
        and close(linear(x[:, :k].contiguous(), weight[:, :k]), masked)
    )
    if not prefix:
        return _NONE
    rest = linear(x[:, k:].contiguous(), weight[:, k:])
    shown, columns = dense(weight[:_TRIED_ROWS]).to(dtype), dense(weight[:, :_TRIED_ROWS]).to(dtype)
    own = weight.dtype  # to which the numbers that are shown are rounded
    readable = (
        close(masked + rest, whole)
        and close(linear(x, shown).to(own), whole[:, :_TRIED_ROWS].to(own))
        and close(columns[:_TRIED_ROWS], shown[:, :_TRIED_ROWS])
    )
    return Slices(True, readable)


def weight_of(module: nn.Module) -> Tensor:
    """The weight as the module keeps it; of one that is sharded, this process's part."""
    return local_part(cast(Tensor, module.weight))


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """What a replacement of a module's forward stands in for: behind accelerate's hook where there is one."""
    return cast("Callable[..., Any]", module._old_forward if hasattr(module, "_hf_hook") else module.forward)


def bias_of(module: nn.Module) -> Tensor | None:
    bias = cast("Tensor | None", module.bias)
    return None if bias is None else local_part(bias)


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


def is_here(module: nn.Module, *, part: bool = False) -> bool:
    """Whether the first units of a linear may be computed from outside its own forward, now and later.

    part: also where they are this process's units of a sharded linear, whose own forward joins the parts.
    """
    if not slices_of(module).prefix or hasattr(module, "_hf_hook") or weight_of(module).is_meta:
        return False
    return part or not is_sharded(cast(Tensor, module.weight))


def is_readable(module: nn.Module) -> bool:
    """Whether also any range of them may, and the weight's numbers be seen."""
    return is_here(module) and slices_of(module).readable


def inner_tensors(weight: Tensor) -> Iterator[Tensor]:
    """The ordinary tensors that a weight is kept in."""
    names = None if is_ordinary(weight) else getattr(weight, "__tensor_flatten__", None)
    if names is None:
        yield weight
        return
    for name in names()[0]:
        yield from inner_tensors(getattr(weight, name))


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in this process, whatever its class."""
    return sum(part.numel() * part.element_size() for part in inner_tensors(local_part(tensor)))


def norms(weight: Tensor, dim: int) -> Tensor:
    """float32: the Euclidean norm of each row (``dim`` 1) or column (``dim`` 0); a bounded part is made dense at a
    time."""
    weight, along = weight.detach(), 1 - dim
    step = max(1, _NORM_CHUNK // max(1, weight.shape[dim]))
    parts = []
    for lo in range(0, weight.shape[along], step):
        part = weight[lo : lo + step] if along == 0 else weight[:, lo : lo + step]
        parts.append(torch.linalg.vector_norm(dense(part), dim=dim, dtype=torch.float32))
    return torch.cat(parts)


def describe(module: nn.Module) -> str:
    """What a linear is, for messages: its class and its weight's."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return f"{type(module).__name__} without a weight of its own"
    kind = "" if is_ordinary(weight) else f"{type(weight.data).__name__}, "
    return f"{type(module).__name__} with a weight of {kind}{str(weight.dtype).removeprefix('torch.')}"


def rows(module: nn.Module) -> Tensor:
    """The weight of a sliceable linear in `nn.Linear` layout [out, in]; a view."""
    return weight_of(module).T if isinstance(module, Conv1D) else weight_of(module)


def sliced(module: nn.Module, x: Tensor, lo: int, hi: int) -> Tensor:
    """Outputs lo..hi of a sliceable linear for x [..., in] -> [..., hi - lo]."""
    bias = bias_of(module)
    return nn.functional.linear(x, rows(module)[lo:hi], None if bias is None else bias[lo:hi])


def close(got: object, wanted: Tensor) -> bool:
    """Whether a foreign result is the wanted one up to the rounding of its dtype."""
    if not isinstance(got, Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    size = float(wanted.double().norm())
    error = float((got.double() - wanted.double()).norm())
    return size > 0 and error <= size * max(1e-5, float(torch.finfo(wanted.dtype).eps))
