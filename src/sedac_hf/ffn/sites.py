"""Find the FFNs of a decoder by structure: shapes and containment, never a model's name or its config.

What a layer's FFN is, `sedac_hf.ffn.matching` says; here are the layers, and what only numbers tell.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.finding_experts import as_experts
from sedac_hf.ffn.linears import linear_shape
from sedac_hf.ffn.matching import layer_sites
from sedac_hf.ffn.registry import apart_from, registered_sites
from sedac_hf.ffn.sharded import shard_of
from sedac_hf.ffn.site import FFNSite, ModelSites
from sedac_hf.ffn.trials import holds_with_other_numbers
from sedac_hf.ffn.verify import named_activation, verified_formula
from sedac_hf.ops.activations import Activation

__all__ = ["FFNSite", "ModelSites", "find_sites"]

_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech", re.I)  # encoders that may be larger than the decoder


def find_sites(model: nn.Module) -> ModelSites:
    """The FFNs that can be cut.

    A module that several layers share is one site (of the first layer); modules whose weights are tied are one site
    each, the later ones with the first as their origin. All experts of a layer are one site.

    Raises:
        UnsupportedModelError: the decoder layers or an FFN in them can't be found; says what was looked for and seen.
    """
    layers = _decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[FFNSite] = []
    seen: set[int] = set()
    for layer_idx, layer in enumerate(layers):
        told = registered_sites(layer, layer_idx, names)
        matched = (*layer_sites(layer, layer_idx, names), *_expert_sites(layer, layer_idx, names))
        for site in (*told, *apart_from(told, matched)):
            if id(site.down) not in seen:
                seen.add(id(site.down))
                found.append(site)
    if not found:
        raise UnsupportedModelError(_nothing_found(model, layers))
    # Side branches (low-rank updates, per-layer embeddings) have other widths than the residual stream.
    parameters = Counter[int]()
    for site in found:
        count = 1 if site.experts is None else site.experts.count
        parameters[site.hidden_size] += count * site.hidden_size * site.intermediate_size
    hidden_size = parameters.most_common(1)[0][0]
    sites = _with_origins([_completed(site) for site in found if site.hidden_size == hidden_size])
    return ModelSites(layers, tuple(names[id(layer)] for layer in layers), hidden_size, sites)


def _expert_sites(layer: nn.Module, layer_idx: int, names: dict[int, str]) -> Iterator[FFNSite]:
    for parent in layer.modules():
        for module in parent.children():
            experts = as_experts(module, parent)
            if experts is not None:
                yield FFNSite(
                    layer_idx, names[id(module)], module, "experts", None, module, module, experts.hidden_size,
                    experts.intermediate_size, activation=experts.activation, experts=experts,
                )  # fmt: skip


def _with_origins(sites: list[FFNSite]) -> tuple[FFNSite, ...]:
    """The sites with what they share; one that shares its down and not the rest is left out: it has no order."""
    firsts: dict[int, FFNSite] = {}
    shared: set[int] = set()
    each = []
    for site in sites:
        key = _weights_of(site)[-1]
        first = firsts.setdefault(key, site)
        if first is not site:
            if _weights_of(first) != _weights_of(site):
                continue
            tied = frozenset(parameter.path for parameter in site.beside if id(parameter.value) in shared)
            site = replace(site, origin=first, tied=tied)
        shared |= {id(parameter.value) for parameter in site.beside}
        each.append(site)
    return tuple(each)


def _weights_of(site: FFNSite) -> list[int]:
    if site.experts is not None:
        return [id(parameter) for parameter in site.experts.parameters]
    weights = [getattr(linear, "weight", None) for linear in site.linears]
    return [
        id(weight if isinstance(weight, Tensor) else linear)
        for weight, linear in zip(weights, site.linears, strict=True)
    ]


def _decoder_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The largest list of modules directly in the decoder, or else anywhere under it, with those of its twins."""
    get_decoder = getattr(model, "get_decoder", None)
    try:
        decoder = get_decoder() if callable(get_decoder) else None
    except (AttributeError, NotImplementedError, TypeError):
        decoder = None
    for root in (decoder, model):
        if not isinstance(root, nn.Module) or linear_shape(root) is not None:
            continue
        direct = [child for child in root.children() if isinstance(child, nn.ModuleList) and _has_weights(child)]
        lists = direct or list(_outer_lists(root))
        if lists:
            largest = max(lists, key=lambda each: sum(p.numel() for p in each.parameters()))
            return tuple(layer for each in _with_twins(largest, root) for layer in each)
    raise UnsupportedModelError(
        f"{type(model).__name__} must have its decoder layers in a torch.nn.ModuleList under get_decoder(); none was "
        f"found. Its direct parts: {', '.join(name for name, _ in model.named_children()) or 'none'}. Pass a "
        "decoder-only model with a language-model head"
    )


def _with_twins(chosen: nn.ModuleList, root: nn.Module) -> list[nn.ModuleList]:
    """The list, and those in modules beside its own that are alike in class and shapes: stacks that take turns."""
    for parent in root.modules():
        for stack in parent.children():
            name = next((name for name, child in stack.named_children() if child is chosen), None)
            if name is not None:
                alike = [
                    twin
                    for beside, twin in parent.named_children()
                    if twin is stack or (not _OTHER_TOWER.search(beside) and _form(twin) == _form(stack))
                ]
                return [getattr(twin, name) for twin in alike]
    return [chosen]


def _form(module: nn.Module) -> tuple[type[nn.Module], list[tuple[str, tuple[int, ...]]]]:
    return type(module), [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _outer_lists(root: nn.Module) -> Iterator[nn.ModuleList]:
    for name, child in root.named_children():
        if isinstance(child, nn.ModuleList) and _has_weights(child):
            yield child
        elif not _OTHER_TOWER.search(name):
            yield from _outer_lists(child)


def _completed(site: FFNSite) -> FFNSite:
    """The site with its activation, and with gate and up as its owner's forward really uses them."""
    if site.experts is not None:
        return site
    named = site.activation or named_activation(site.owner)
    shard = shard_of(site.name, site.linears[:-1], site.down, site.intermediate_size)
    if shard is not None:  # no rank's weights alone give the owner's output: cut through its linears
        return replace(site, intermediate_size=shard.held, activation=named, shard=shard)
    if site.beside:  # an adapter that adds nothing yet, or a scale of ones, would pass for the formula
        return replace(site, activation=named)
    for variant in _variants(site):
        activation = _formula(variant)
        if activation is not None and holds_with_other_numbers(variant, _formula):
            return replace(variant, activation=activation, plain_forward=True)
    return replace(site, activation=named)


def _formula(site: FFNSite) -> Activation | None:
    return verified_formula(site.owner, site.linears, site.parts, site.activation)


def _variants(site: FFNSite) -> Iterator[FFNSite]:
    yield site
    if site.kind == "gated" and site.gate is not None:
        yield replace(site, gate=site.up, up=site.gate)
    elif site.kind == "fused":
        yield replace(site, fused_gate_first=False)


def _nothing_found(model: nn.Module, layers: tuple[nn.Module, ...]) -> str:
    parts = sorted({name for layer in layers for name, _ in layer.named_children()})
    experts = any(p.dim() == 3 for layer in layers for p in layer.parameters() if min(p.shape) > 1)
    seen = f"{len(layers)} layers ({type(layers[0]).__name__} with parts {', '.join(parts) or 'none'})"
    mixers = _mixers_alone(layers)
    if mixers:
        told = (
            f"this decoder has no FFN: its {seen} compute in {', '.join(mixers)} alone, recurrent blocks, not cut here"
        )
    else:
        told = f"none was found in its {seen}"
    return (
        f"{type(model).__name__} must have an FFN that can be cut; {told}. Looked for modules that hold exactly: "
        "gate, up (hidden -> f) and down (f -> hidden); a fused gate_up (hidden -> 2f) and down; a pair up and down "
        "(torch.nn.Linear or Conv1D), in one module, in siblings or directly in the layer; in all cases with no other "
        "matrix that has a side of f. Where they look otherwise, say which parts they are: sedac_hf.register_ffn_site"
        + (". Its experts have a forward of their own, which is not known here" if experts else "")
        + (". Pass a decoder with FFNs (attention or recurrent blocks with an FFN behind them)" if mixers else "")
    )


def _mixers_alone(layers: tuple[nn.Module, ...]) -> list[str]:
    """The classes of the modules that hold linears where each of them has a convolution beside them; else nothing."""
    holders = [
        module
        for layer in layers
        for module in layer.modules()
        if any(linear_shape(child) is not None for child in module.children())
    ]
    if not all(any(isinstance(child, nn.Conv1d) for child in module.children()) for module in holders):
        return []
    return sorted({type(module).__name__ for module in holders})
