"""The experts of a mixture-of-experts layer: many FFNs in a few stacked parameters, of which a token uses some.

Which modules hold such, `sedac_hf.ffn.finding_experts` says.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.expert_routing import Reading, Routing
from sedac_hf.ffn.linears import norms
from sedac_hf.ops.activations import Activation
from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.experts import ExpertKernels, cut_experts


@dataclass(frozen=True, eq=False)
class Experts:
    """Views of all experts of one layer, live; each is an FFN of ``intermediate_size`` units.

    first_names: paths of the parameters of gate and up, of both in one, or of up alone, [E, units, d] each; down_name:
    that of down, [E, d, f]; 2-D parameters hold one expert below the other. first_transposed, down_transposed: these
    lie the other way round. count: experts; top_k: of them, those that a token uses; gated: there is a gate;
    interleaved: gate and up rows take turns; reading: how the module is called; act: its activation, where it has no
    formula of its own; activation: where ``h = act(gate x) * up x`` (or ``act(up x)``) was seen on numbers, else None;
    identity: further experts, without weights, give x itself.
    """

    module: nn.Module
    first_names: tuple[str, ...]
    down_name: str
    reading: Reading
    count: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    gated: bool
    first_transposed: bool
    down_transposed: bool
    interleaved: bool = False
    biased: bool = False
    act: Activation | None = None
    activation: Activation | None = None
    identity: bool = False

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The live parameters of all experts, down last."""
        return tuple(parameter_at(self.module, name) for name in (*self.first_names, self.down_name))

    @property
    def down(self) -> nn.Parameter:
        return parameter_at(self.module, self.down_name)

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def readable(self) -> bool:
        """Whether the weights are in memory here."""
        hooked = any(hasattr(module, "_hf_hook") for module in (self.module, *self.module.children()))
        return not hooked and not any(p.is_meta for p in self.parameters)

    @property
    def spread_out(self) -> list[tuple[nn.Module, nn.Parameter]]:
        """The parameters in which a unit's numbers are not side by side, each with the module that holds it."""
        found = [
            *(self.first_names if self.first_transposed else ()),
            *(() if self.down_transposed else [self.down_name]),
        ]
        return [(_holder(self.module, name), parameter_at(self.module, name)) for name in found]

    def _of(self, name: str, expert: int) -> Tensor:
        """One expert's matrix as it is kept; a view."""
        stack = parameter_at(self.module, name)
        return (stack if stack.dim() == 3 else stack.unflatten(0, (self.count, -1)))[expert]

    def _bias(self, name: str, expert: int) -> Tensor | None:
        return cast(Tensor, getattr(self.module, f"{name}_bias"))[expert] if self.biased else None

    def first_of(self, expert: int, name: str, units: slice) -> tuple[Tensor, Tensor | None]:
        """Rows of gate or up, [.., d], and their bias."""
        rows, bias = self._of(name, expert), self._bias(name, expert)
        rows = rows.T if self.first_transposed else rows
        return rows[units], None if bias is None else bias[units]

    def hidden(self, expert: int, x: Tensor, units: int | None = None) -> Tensor:
        """The first ``units`` hidden units (all of them by default) of an expert for x [m, d] -> [m, units]."""
        f, names = self.intermediate_size, self.first_names
        k = f if units is None else units
        if len(names) > 1 or not self.gated:
            parts = [(name, slice(0, k)) for name in names]
        elif k == f or self.interleaved:
            parts = [(names[0], slice(0, 2 * k))]
        else:
            parts = [(names[0], slice(0, k)), (names[0], slice(f, f + k))]
        z = [functional.linear(x, *self.first_of(expert, name, units)) for name, units in parts]
        values = z[0] if len(z) == 1 else torch.cat(z, dim=-1)
        own: Any = getattr(self.module, "_apply_gate", None) if self.gated else None
        if own is not None:
            return cast(Tensor, own(values))
        assert self.act is not None
        if not self.gated:
            return self.act(values)
        gate, up = values.chunk(2, dim=-1)
        return self.act(gate) * up

    def project(self, expert: int, h: Tensor) -> Tensor:
        """Down of an expert for its first units h [m, k] -> [m, d], bias added."""
        return functional.linear(h, self.down_of(expert)[:, : h.shape[-1]], self._bias(self.down_name, expert))

    def down_of(self, expert: int) -> Tensor:
        """Down of an expert, [d, f]; a view."""
        down = self._of(self.down_name, expert)
        return down.T if self.down_transposed else down

    def down_norms(self) -> Tensor:
        """float32 [E, f]: the Euclidean norm of each unit's column of down."""
        return torch.stack([norms(self.down_of(expert), dim=0) for expert in range(self.count)])

    @functools.cached_property
    def _argument_names(self) -> tuple[str, ...]:
        return argument_names(self.module)[: self.reading.takes]

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
        """The arguments of a call of the module, in order, hidden states first; None for a call of another kind."""
        values = {**dict(zip(self._argument_names, args, strict=False)), **kwargs}
        found = tuple(values.get(name) for name in self._argument_names)
        if len(args) + len(kwargs) != len(found) or not all(isinstance(value, Tensor) for value in found):
            return None
        return cast("tuple[Tensor, ...]", found) if cast(Tensor, found[0]).dim() == self.reading.rank else None

    def routing(self, given: tuple[Tensor, ...]) -> Routing | None:
        """What a call asks of which expert; None where its arguments do not fit each other."""
        return self.reading.routing(self.module, self.count, *given)

    def tokens(self, given: tuple[Tensor, ...]) -> int:
        """How many tokens a call has."""
        return self.reading.tokens(self.count, given[0])

    def output(
        self, given: tuple[Tensor, ...], cut: SiteCut | None, kernels: ExpertKernels | None = None
    ) -> Tensor | None:
        """The module's output for a call, cut (None: whole); None where `routing` gives none."""
        routing = self.routing(given)
        if routing is None:
            return None
        x, index, weights, copies, added = routing
        y = cut_experts(x, index, weights, self, cut, kernels, copies=copies)
        return (y if added is None else y + added).view(given[0].shape)

    def weights(self, expert: int) -> FFNWeights:
        """One expert as an FFN.

        Raises:
            UnsupportedModelError: its formula is another one.
        """
        if self.activation is None:
            raise UnsupportedModelError(f"the experts of {type(self.module).__name__} compute another formula")
        f, names, all_units = self.intermediate_size, self.first_names, slice(None)
        gate: tuple[Tensor | None, Tensor | None] = None, None
        if len(names) > 1:
            gate, up = (self.first_of(expert, name, all_units) for name in names)
        elif not self.gated:
            up = self.first_of(expert, names[0], all_units)
        else:
            of_gate, of_up = (
                (slice(0, None, 2), slice(1, None, 2)) if self.interleaved else (slice(f), slice(f, 2 * f))
            )
            gate, up = self.first_of(expert, names[0], of_gate), self.first_of(expert, names[0], of_up)
        down, bias = self.down_of(expert), self._bias(self.down_name, expert)
        return FFNWeights(gate[0], up[0], down, gate[1], up[1], bias, self.activation)

    def unit_tensors(self, expert: int) -> list[tuple[Tensor, int, int]]:
        """(tensor, dimension of the units, entries per unit there: 1, or 2 side by side, or -2 in two halves) of all
        that has an entry per unit of an expert."""
        per_unit = 1 if len(self.first_names) > 1 or not self.gated else 2 if self.interleaved else -2
        found = [(self._of(self.down_name, expert), int(not self.down_transposed), 1)]
        for name in self.first_names:
            found.append((self._of(name, expert), int(self.first_transposed), per_unit))
            bias = self._bias(name, expert)
            found += [] if bias is None else [(bias, 0, per_unit)]
        return found


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def parameter_at(module: nn.Module, path: str) -> nn.Parameter:
    return cast(nn.Parameter, getattr(_holder(module, path), path.rpartition(".")[2]))


def _holder(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path.rpartition(".")[0])
