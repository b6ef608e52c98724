"""FFNs that a user says are FFNs: which attributes of a module class are its up, gate and down.

Declared classes are taken before the structural rules (`sedac_hf.ffn.matching`); all the rest, the formula and its
activation, what can be sliced, kernels and order, follows from the numbers as for other sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import cast

from torch import nn

from sedac_hf.errors import ConfigError, UnsupportedModelError
from sedac_hf.ffn.channel_order import can_reorder
from sedac_hf.ffn.linears import is_here, linear_shape, slices_of, weight_of
from sedac_hf.ffn.matching import unit_parameters
from sedac_hf.ffn.site import FFNSite, Kind, UnitParameter
from sedac_hf.ffn.trials import has_others, order_is_lossless
from sedac_hf.ffn.verify import applied, probe_for, run_alone
from sedac_hf.ops.activations import Activation

_MOST_BESIDE = 3  # norms, scales and maps over the units in one FFN
_SIDE = "has a side as long as it has units"
_REGISTERED: dict[type[nn.Module] | str, RegisteredSite] = {}


@dataclass(frozen=True)
class RegisteredSite:
    """What `register_ffn_site` was told; leaving it as a context manager takes it back."""

    owner: type[nn.Module] | str
    up: str
    down: str
    gate: str | None
    fused: bool
    activation: str | Activation | None
    subclasses: bool

    def __enter__(self) -> RegisteredSite:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _REGISTERED.get(self.owner) is self:
            unregister_ffn_site(self.owner)


def register_ffn_site(
    owner: type[nn.Module] | str,
    *,
    up: str,
    down: str,
    gate: str | None = None,
    fused: bool = False,
    activation: str | Activation | None = None,
    subclasses: bool = True,
    exist_ok: bool = False,
) -> RegisteredSite:
    """Say which parts of a module class are an FFN's, for a decoder whose FFNs are not found by their structure.

    It holds for this process and for models that are wrapped, or loaded, from then on. Parts are named as seen from
    the owner ("fc_in", "inner.fc_in") and are linear maps: `torch.nn.Linear`, transformers' `Conv1D`, or a stand-in
    with ``in_features`` and ``out_features``. Whether they fit is seen when a model is wrapped.

    Args:
        owner: the class of the module that computes the FFN, or its name with or without its module
            (``trust_remote_code`` makes the class while it loads).
        up: maps the hidden states to the units, hidden -> f.
        down: maps the units back, f -> hidden.
        gate: hidden -> f, where units are ``act(gate x) * up x``.
        fused: ``up`` holds gate and up one behind the other, hidden -> 2f.
        activation: the owner's attribute, or a callable that keeps a tensor's shape; None: looked for, and tried.
        subclasses: classes made of the owner count too, unless they are registered themselves.
        exist_ok: replace what was registered for this owner.

    Returns:
        What was registered; as a context manager it is for the length of the block.

    Raises:
        ConfigError: an argument is none of these, or the owner is registered.

    Example:
        >>> register_ffn_site("MyFeedForward", up="fc_in", down="fc_out", activation="act")  # doctest: +SKIP
        >>> model = SedacForCausalLM.from_pretrained(folder, trust_remote_code=True)  # doctest: +SKIP
    """
    if not (isinstance(owner, str) and owner) and not (isinstance(owner, type) and issubclass(owner, nn.Module)):
        raise ConfigError(f"`owner` must be a class of modules or the name of one, got {owner!r}")
    for argument, name in (("up", up), ("down", down), ("gate", gate)):
        if not (isinstance(name, str) and name) and not (argument == "gate" and name is None):
            raise ConfigError(f"`{argument}` must name an attribute of the owner, got {name!r}")
    if gate is not None and fused:
        raise ConfigError(f"`gate` must be None where gate and up are one linear (fused=True), got {gate!r}")
    if activation is not None and not isinstance(activation, str) and not _keeps_shape(activation):
        raise ConfigError(
            f"`activation` must be an attribute's name or map a tensor to one of its shape, got {activation!r}"
        )
    if owner in _REGISTERED and not exist_ok:
        raise ConfigError(f"{owner!r} is registered already: `unregister_ffn_site` it first, or use exist_ok=True")
    _REGISTERED[owner] = RegisteredSite(owner, up, down, gate, fused, activation, subclasses)
    return _REGISTERED[owner]


def unregister_ffn_site(owner: type[nn.Module] | str) -> None:
    """Take `register_ffn_site` of the same ``owner`` back; models that are wrapped stay as they are.

    Raises:
        ConfigError: it is not registered.
    """
    if _REGISTERED.pop(owner, None) is None:
        raise ConfigError(f"`owner` must be registered, got {owner!r}; registered: {list(_REGISTERED) or 'none'}")


def registered_sites(layer: nn.Module, layer_idx: int, names: dict[int, str]) -> list[FFNSite]:
    """The FFNs of a decoder layer that were registered; of one inside another the outer.

    Raises:
        UnsupportedModelError: a part does not exist, is no linear map, or does not fit the others.
    """
    sites: list[FFNSite] = []
    inside: set[int] = set()
    for module in layer.modules() if _REGISTERED else ():
        told = None if id(module) in inside else _told(type(module))
        if told is not None:
            inside |= {id(inner) for inner in module.modules()}
            sites.append(_as_site(told, module, layer_idx, names[id(module)]))
    return sites


def apart_from(registered: list[FFNSite], found: Iterable[FFNSite]) -> Iterator[FFNSite]:
    """Those of the sites that were found which are neither inside a registered one's owner nor around it."""
    owners = {id(site.owner) for site in registered}
    inside = {id(inner) for site in registered for inner in site.owner.modules()}
    for site in found:
        if id(site.owner) not in inside and not any(id(inner) in owners for inner in site.owner.modules()):
            yield site


def _told(kind: type) -> RegisteredSite | None:
    """What is registered for a class: its own, else its nearest base's that is for subclasses too."""
    for base in kind.__mro__:
        for key in (base, base.__name__, f"{base.__module__}.{base.__qualname__}"):
            told = _REGISTERED.get(key)
            if told is not None and (told.subclasses or base is kind):
                return told
    return None


def _as_site(told: RegisteredSite, owner: nn.Module, layer_idx: int, name: str) -> FFNSite:
    parts = {part: _linear(told, owner, name, part) for part in ("gate", "up", "down") if getattr(told, part)}
    shapes = {part: cast("tuple[int, int]", linear_shape(linear)) for part, linear in parts.items()}
    f, d = shapes["down"]
    wanted = (d, 2 * f if told.fused else f)
    if any(shapes[part] != wanted for part in parts if part != "down"):
        got = ", ".join(
            f"{part} {getattr(told, part)!r} {inputs} -> {outputs}" for part, (inputs, outputs) in shapes.items()
        )
        raise _unfit(
            told, owner, name, f"map hidden -> {'2f' if told.fused else 'f'} and, with `down`, f -> hidden; got {got}"
        )
    if f != d and is_here(parts["down"]):
        takes = [size for size in (d, f) if run_alone(owner, weight_of(parts["down"]).new_zeros(1, size)) is not None]
        if takes == [f]:
            raise _unfit(
                told, owner, name, f"take hidden states of {d} as its parts say, and takes {f}: exchange them"
            )
    kind: Kind = "fused" if told.fused else "plain" if told.gate is None else "gated"
    activation = _attribute(owner, told.activation) if isinstance(told.activation, str) else told.activation
    if not (callable(activation) or told.activation is None):
        raise _unfit(told, owner, name, f"have a callable {told.activation!r} for its activation, got {activation!r}")
    site = FFNSite(
        layer_idx, name, owner, kind, parts.get("gate"), parts["up"], parts["down"], d, f,
        activation=cast("Activation | None", activation),
    )  # fmt: skip
    return replace(site, beside=_beside(told, site))


def _linear(told: RegisteredSite, owner: nn.Module, name: str, part: str) -> nn.Module:
    path = getattr(told, part)
    linear = _attribute(owner, path)
    if not isinstance(linear, nn.Module):
        has = ", ".join(name for name, _ in owner.named_children()) or "none"
        raise _unfit(told, owner, name, f"have a module {path!r} for `{part}`, got {linear!r}; its modules: {has}")
    if linear_shape(linear) is None:
        kinds = "torch.nn.Linear, Conv1D, or a module with `in_features` and `out_features`"
        got = type(linear).__name__
        raise _unfit(told, owner, name, f"have a linear map in {path!r} for `{part}` ({kinds}), got {got}")
    return linear


def _attribute(owner: nn.Module, path: str) -> object:
    value: object = owner
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _unfit(told: RegisteredSite, owner: nn.Module, name: str, must: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name!r}, a {type(owner).__name__} that is registered as an FFN ({told.owner!r}), must {must}; correct it "
        "by `register_ffn_site(..., exist_ok=True)`"
    )


def _keeps_shape(activation: object) -> bool:
    return callable(activation) and applied(activation, probe_for(activation)) is not None


def _beside(told: RegisteredSite, site: FFNSite) -> tuple[UnitParameter, ...]:
    """Those of the owner's other parameters that go with its units, told by what an order of the units does.

    No names are believed here: a matrix of the same size may be a part of the FFN's or another thing.
    """
    if not has_others(site, (site.intermediate_size, 2 * site.intermediate_size)):
        return ()
    if not can_reorder(site):  # then it never is, and what is no slice is cut by zeroing
        if all(slices_of(linear).prefix for linear in site.linears):
            raise _unfit(told, site.owner, site.name, f"be in memory: it holds more than these parts that {_SIDE}")
        return ()
    found = unit_parameters(site, passing_over=True) or ()
    modules = list({id(parameter.module): parameter.module for parameter in found}.values())
    for size in range(min(len(modules), _MOST_BESIDE) + 1):
        for chosen in itertools.combinations(modules, size):
            beside = tuple(each for each in found if any(each.module is module for module in chosen))
            if order_is_lossless(site, beside):
                return beside
    must = (
        "give the same for hidden states alone when its units, with norms, scales and maps over them, are put in "
        f"another order; it holds more than these parts that {_SIDE}, and does not"
    )
    raise _unfit(told, site.owner, site.name, must)
