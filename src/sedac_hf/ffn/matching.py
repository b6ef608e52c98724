"""The FFNs of one decoder layer, by shapes and containment, in two passes.

Strict: the *owner* is the smallest module that holds exactly an FFN's linears: two (hidden -> f -> hidden, or
hidden -> 2f with gate and up in one, -> hidden) or three (gate and up: hidden -> f, down: f -> hidden), and no other
parameter of more than one number. Where the two or three linears are direct children of the decoder layer itself, the
layer is the owner.

Relaxed, only where the strict pass finds nothing: the smallest module that holds one such set among other linears and
parameters, wherever below it the linears are (in sibling modules, as in BERT). Parameters with an entry per unit may
lie beside them (a norm over the units, an adapter that adds to them); anything else that has a side of the units'
number makes it another thing: a state-space block or a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from sedac_hf.ffn.linears import linear_shape
from sedac_hf.ffn.site import FFNSite, Kind, UnitParameter

# Parts of a layer whose linears look like an FFN's by shape but are not one.
_FOREIGN_PART = re.compile(
    r"attn|attention|norm|router|adapter|altup|laurel|mamba|ssm|recurrent|rnn|conv|vision|audio|indexer|embed", re.I
)

# The same without what may be a part of an FFN.
_OTHER_BLOCK = re.compile(
    r"attn|attention|router|altup|laurel|mamba|ssm|recurrent|rnn|conv|vision|audio|indexer|embed", re.I
)
_ATTENTION = re.compile(r"att(ention|n)(?!.*(layer|block))", re.I)  # in a class's name; not a layer's
_OWN_NAME = re.compile(r"mlp|ffn|ff|feed|expert|fc|gate|up|down|h_to", re.I)


def layer_sites(layer: nn.Module, layer_idx: int, names: dict[int, str]) -> list[FFNSite]:
    sites: list[FFNSite] = []

    def walk(module: nn.Module) -> bool:
        """Visits children first, so that the smallest module that is an FFN becomes the owner; True if inside one."""
        inside = False
        for name, child in module.named_children():
            if linear_shape(child) is None and not _FOREIGN_PART.search(name):
                inside = walk(child) or inside
        if inside:
            return True
        linears = _only_linears(module)
        site = None if linears is None else _as_site(layer_idx, names[id(module)], module, linears)
        if site is not None:
            sites.append(site)
        return site is not None

    if not walk(layer) and not sites:
        direct = {name: child for name, child in layer.named_children() if linear_shape(child) is not None}
        site = _as_site(layer_idx, names[id(layer)], layer, direct)
        return list(_scattered(layer, layer_idx, names)) if site is None else [site]
    return sites


def _scattered(module: nn.Module, layer_idx: int, names: dict[int, str]) -> Iterator[FFNSite]:
    """The relaxed pass over a layer, or over a part of it."""
    found = False
    for name, child in module.named_children():
        if linear_shape(child) is None and not _is_foreign(name, child):
            for inner in _scattered(child, layer_idx, names):
                found = True
                yield inner
    if found:
        return
    linears = _one_set(dict(_linears_below(module)))
    site = None if linears is None else _as_site(layer_idx, names[id(module)], module, linears)
    if site is not None:
        beside = unit_parameters(site)
        if beside is not None:
            yield replace(site, beside=beside)


def _is_foreign(name: str, module: nn.Module, pattern: re.Pattern[str] = _FOREIGN_PART) -> bool:
    # Attention whose heads are wider than the stream looks like an FFN, under whatever name its layer keeps it.
    return pattern.search(name) is not None or _ATTENTION.search(type(module).__name__) is not None


def _linears_below(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if linear_shape(child) is not None:
            yield prefix + name, child
        elif not _is_foreign(name, child):
            yield from _linears_below(child, f"{prefix}{name}.")


def _one_set(linears: dict[str, nn.Module]) -> dict[str, nn.Module] | None:
    """The one set of an FFN's linears among others: a single one from f back to the stream, and those before it."""
    shapes = {path: shape for path, linear in linears.items() if (shape := linear_shape(linear)) is not None}
    downs = [path for path, (inputs, outputs) in shapes.items() if inputs > outputs]
    for down in downs:
        f, d = shapes[down]
        single = [path for path in shapes if shapes[path] == (d, f)]
        double = [path for path in shapes if shapes[path] == (d, 2 * f)]
        if (len(single), len(double)) in ((1, 0), (2, 0), (0, 1)):
            return {path: linears[path] for path in (*single, *double, down)}
    return None


def unit_parameters(site: FFNSite, *, passing_over: bool = False) -> tuple[UnitParameter, ...] | None:
    """The parameters beside a site's linears that have an entry per unit; None where one is no vector and no producer
    of units: then units depend on each other in ways that this is not made for. passing_over: leave such ones out."""
    f = site.intermediate_size
    sizes = (f, 2 * f) if site.kind == "fused" else (f,)
    found = []
    for prefix, module in _parts(site.owner, site.linears):
        shape = linear_shape(module)
        for name, tensor in module.named_parameters(recurse=False):
            sides = [dim for dim, size in enumerate(tensor.shape) if size in sizes]
            if not sides:
                continue
            vector = tensor.numel() == tensor.shape[sides[0]]
            produces = shape is not None and shape[1] in sizes and shape[0] not in sizes
            if len(sides) == 1 and (vector or produces):
                found.append(UnitParameter(prefix + name, module, sides[0]))
            elif not passing_over:
                return None
        if not passing_over and any(
            buffer.is_floating_point() and set(sizes) & set(buffer.shape) for buffer in module.buffers(False)
        ):
            return None
    return tuple(found)


def _parts(module: nn.Module, without: tuple[nn.Module, ...], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and what is below it, other blocks and given modules left out."""
    yield prefix, module
    for name, child in module.named_children():
        if not any(child is each for each in without) and not _is_foreign(name, child, _OTHER_BLOCK):
            yield from _parts(child, without, f"{prefix}{name}.")


def _only_linears(module: nn.Module) -> dict[str, nn.Module] | None:
    """The linears at and below ``module`` by path, or None where it holds other parameters of size."""
    if any(p.numel() > 1 for p in module.parameters(recurse=False)):
        return None
    linears: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if linear_shape(child) is not None:
            linears[name] = child
            continue
        inner = _only_linears(child)
        if inner is None:
            return None
        linears.update({f"{name}.{path}": linear for path, linear in inner.items()})
    return linears


def _as_site(layer_idx: int, name: str, owner: nn.Module, linears: dict[str, nn.Module]) -> FFNSite | None:
    """A site when the shapes are an FFN's; gate and up are told apart by name here and by numbers later."""
    shapes = {path: linear_shape(linear) for path, linear in linears.items()}
    for down_path, down_shape in reversed(shapes.items()):  # down is defined last; a pair's shapes do not tell it
        others = [path for path in shapes if path != down_path]
        if down_shape is None or len(others) not in (1, 2) or len({shapes[path] for path in others}) != 1:
            continue
        f, d = down_shape
        first = shapes[others[0]]
        if first is None or first[0] != d:
            continue
        kind: Kind
        if len(others) == 2 and first[1] == f:
            kind = "gated"
        elif len(others) == 1 and first[1] in (f, 2 * f):
            kind = "plain" if first[1] == f else "fused"
        else:
            continue
        # Attention under an unusual name and low-rank side branches do not widen the stream; a pair that does not
        # is taken for an FFN only when it calls itself one.
        if f <= d and not _OWN_NAME.search(f"{name} {' '.join(linears)}"):
            continue
        gate, up = None, linears[others[-1]]
        if kind == "gated":
            gate_path = next((p for p in others if re.search(r"gate|w1$|w_0$", p) and "up" not in p), None)
            gate_path = gate_path or next((p for p in others if re.search(r"gate", p)), others[0])
            gate = linears[gate_path]
            up = next(linears[path] for path in others if path != gate_path)
        return FFNSite(layer_idx, name, owner, kind, gate, up, linears[down_path], d, f)
    return None
