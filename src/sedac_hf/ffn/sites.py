"""Find the FFNs of a decoder by structure: shapes and containment, never a model's name or its config.

An FFN's *owner* is the smallest module that holds exactly its linears: two (hidden -> f -> hidden, or hidden -> 2f
with gate and up in one, -> hidden) or three (gate and up: hidden -> f, down: f -> hidden), and no other parameter
of more than one number (that is what tells it from recurrent blocks, convolutions and FFNs with a norm inside).
Where the two or three linears are direct children of the decoder layer itself, the layer is the owner.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.linears import bias_of, linear_shape, rows
from sedac_hf.ffn.sharded import Shard, shard_of
from sedac_hf.ffn.verify import Parts, named_activation, verified_formula
from sedac_hf.ops.contract import FFNWeights

Kind = Literal["gated", "fused", "plain"]

# Parts of a layer whose linears look like an FFN's by shape but are not one.
_FOREIGN_PART = re.compile(
    r"attn|attention|norm|router|adapter|altup|laurel|mamba|ssm|recurrent|rnn|conv|vision|audio|indexer|embed", re.I
)

_OTHER_TOWER = re.compile(r"vision|visual|image|audio|speech", re.I)  # encoders that may be larger than the decoder
_OWN_NAME = re.compile(r"mlp|ffn|ff|feed|expert|fc|gate|up|down|h_to", re.I)


@dataclass(frozen=True, eq=False)
class FFNSite:
    """One FFN of a decoder.

    kind "gated": gate, up and down; "fused": ``up`` is the one linear of gate and up, ``gate`` is None; "plain": up
    and down. Sizes come from the weights. ``activation`` is None when it can't be read. ``plain_forward``: the
    owner's forward was seen to be ``down(act(gate x) * up x)`` (plain: ``down(act(up x))``) on numbers, and
    its weights may be read directly. ``shard``: how a tensor-parallel FFN is dealt out; its linears then count as what
    this process holds of them.
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
    shard: Shard | None = field(default=None, repr=False)

    @property
    def total_units(self) -> int:
        """Units over all tensor-parallel ranks; ``intermediate_size`` counts those that this process holds."""
        return self.intermediate_size if self.shard is None else self.shard.units

    @property
    def linears(self) -> tuple[nn.Module, ...]:
        """The site's linears, gate first, down last."""
        return tuple(linear for linear in (self.gate, self.up, self.down) if linear is not None)

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


def find_sites(model: nn.Module) -> ModelSites:
    """The FFNs that can be cut.

    An FFN that several layers share is one site (of the first layer). Mixture-of-experts parameters are none.

    Raises:
        UnsupportedModelError: the decoder layers or an FFN in them can't be found; says what was looked for and seen.
    """
    layers = _decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[FFNSite] = []
    seen: set[int] = set()
    for layer_idx, layer in enumerate(layers):
        for site in _layer_sites(layer, layer_idx, names):
            # Modules may be shared, and so may the weights of different modules.
            weight = getattr(site.down, "weight", None)
            key = id(weight if isinstance(weight, Tensor) else site.down)
            if key not in seen:
                seen.add(key)
                found.append(site)
    if not found:
        raise UnsupportedModelError(_nothing_found(model, layers))
    # Side branches (low-rank updates, per-layer embeddings) have other widths than the residual stream.
    parameters = Counter[int]()
    for site in found:
        parameters[site.hidden_size] += site.hidden_size * site.intermediate_size
    hidden_size = parameters.most_common(1)[0][0]
    sites = tuple(_completed(site) for site in found if site.hidden_size == hidden_size)
    return ModelSites(layers, tuple(names[id(layer)] for layer in layers), hidden_size, sites)


def _decoder_layers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The largest list of modules directly in the decoder, or else anywhere under it."""
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
            return tuple(largest)
    raise UnsupportedModelError(
        f"{type(model).__name__} must have its decoder layers in a torch.nn.ModuleList under get_decoder(); none was "
        f"found. Its direct parts: {', '.join(name for name, _ in model.named_children()) or 'none'}. Pass a "
        "decoder-only model with a language-model head"
    )


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _outer_lists(root: nn.Module) -> Iterator[nn.ModuleList]:
    for name, child in root.named_children():
        if isinstance(child, nn.ModuleList) and _has_weights(child):
            yield child
        elif not _OTHER_TOWER.search(name):
            yield from _outer_lists(child)


def _layer_sites(layer: nn.Module, layer_idx: int, names: dict[int, str]) -> list[FFNSite]:
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
        return [] if site is None else [site]
    return sites


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


def _completed(site: FFNSite) -> FFNSite:
    """The site with its activation, and with gate and up as its owner's forward really uses them."""
    shard = shard_of(site.name, site.linears[:-1], site.down, site.intermediate_size)
    if shard is not None:  # no rank's weights alone give the owner's output: cut through its linears
        activation = named_activation(site.owner)
        return replace(site, intermediate_size=shard.held, activation=activation, shard=shard)
    for variant in _variants(site):
        activation = verified_formula(variant.owner, variant.linears, variant.parts)
        if activation is not None:
            return replace(variant, activation=activation, plain_forward=True)
    return replace(site, activation=named_activation(site.owner))


def _variants(site: FFNSite) -> Iterator[FFNSite]:
    yield site
    if site.kind == "gated" and site.gate is not None:
        yield replace(site, gate=site.up, up=site.gate)
    elif site.kind == "fused":
        yield replace(site, fused_gate_first=False)


def _nothing_found(model: nn.Module, layers: tuple[nn.Module, ...]) -> str:
    parts = sorted({name for layer in layers for name, _ in layer.named_children()})
    experts = any(p.dim() == 3 for layer in layers for p in layer.parameters())
    return (
        f"{type(model).__name__} must have an FFN that can be cut; none was found in its {len(layers)} layers "
        f"({type(layers[0]).__name__} with parts {', '.join(parts) or 'none'}). Looked for modules that hold exactly: "
        "gate, up (hidden -> f) and down (f -> hidden); a fused gate_up (hidden -> 2f) and down; a pair up and down "
        "(torch.nn.Linear or Conv1D); fc1/fc2 directly in the layer; in all cases with no parameters between them"
        + (". Its experts are 3-D parameters, which are not supported" if experts else "")
    )
