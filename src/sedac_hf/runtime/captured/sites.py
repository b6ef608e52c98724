"""One FFN inside a captured graph: levels are a tensor on the device, so nothing here may depend on their values.

What a level means at a site lies in small tables, one entry per level; a token's entries are looked up by its level.
Recognised FFNs run as one of the operators of `sedac_hf.ops.library`, which skip what is not needed on CUDA.
Everything else computes every unit and zeroes what a token does not use: right, and nothing is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sedac_hf.ffn.deciders import Decider, SiteUnits
from sedac_hf.ffn.linears import is_plain, is_readable
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.activations import name_of
from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.contract import Compensation, OperatingPoint
from sedac_hf.ops.library import Handle, selected_ffn, truncated_ffn
from sedac_hf.ops.rust_cpu import CpuFFN
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS


class CapturedSite(nn.Module):
    """The tables of one site, and its cut FFN as tensor operations.

    Args:
        site: the FFN; its weights stay where they are.
        points: one operating point per level 0..n_levels.
        shadow: what decides, where a point chooses by importance.
        compensation: what stands in for the units left out.
        handle: of the compiled kernel of the weights, for graphs on a CPU.

    Attributes:
        cuts: whether some level runs less than the whole FFN.
        selects: whether some level chooses units by importance.
        whole_call: the owner's forward can be replaced whole (`run`); otherwise `mask` goes in front of down.
        operator: name of the operator that runs a whole call, "" where plain torch masks.
    """

    widths: Tensor
    least: Tensor
    whole: Tensor
    bias: Tensor | None

    def __init__(
        self,
        site: FFNSite,
        points: tuple[OperatingPoint, ...],
        shadow: Decider | None,
        compensation: Compensation | None,
        handle: Handle | None = None,
    ) -> None:
        super().__init__()
        self.site = site
        self.shadow = shadow if isinstance(shadow, Shadow | ExactGate | SiteUnits) else None
        parameters = list(site.down.parameters())
        floating = next((p for p in parameters if p.is_floating_point()), None)
        like = torch.zeros(0, device=parameters[0].device) if floating is None else floating
        if site.experts is not None:  # left whole in a graph
            points = (OperatingPoint(site.intermediate_size),) * len(points)
        f = site.intermediate_size
        widths = [0, *(min(max(point.width, 0), f) for point in points[1:])]
        least = [point.importance_min for point in points]
        self.cuts = any(width < f for width in widths[1:]) or any(value > 0 for value in least)
        self.selects = any(value > 0 for value in least)
        self.whole_call = site.plain_forward and all(is_readable(linear) for linear in site.linears)
        self.register_buffer("widths", torch.tensor(widths, dtype=torch.int32, device=like.device), persistent=False)
        self.register_buffer("least", torch.tensor(least, dtype=torch.float32, device=like.device), persistent=False)
        whole = torch.full((1,), f, dtype=torch.int32, device=like.device)
        self.register_buffer("whole", whole, persistent=False)
        bias = None if compensation is None else compensation.bias(like)
        self.register_buffer("bias", bias, persistent=False)
        maps = [
            (level, compensation.low_rank(level, like)) for level in range(len(points) - 1) if compensation is not None
        ]
        self.low_rank = [(level, *factors) for level, factors in maps if factors is not None]
        plain = self.whole_call and all(is_plain(linear) for linear in site.linears)
        self.activation = name_of(site.activation) if plain and site.activation is not None else None
        self.operator = self._operator()
        self._handle = handle if self.operator else None
        self._number = 0 if self._handle is None else self._handle.number

    def _operator(self) -> str:
        # A low-rank map reads the hidden units, which the operators keep to themselves.
        if self.activation is None or self.low_rank:
            return ""
        if not self.selects:
            return "truncated_ffn"
        return "selected_ffn" if isinstance(self.shadow, Shadow) and self.shadow.deciding.bits == 4 else ""

    def skips(self, rows: int, device_type: str) -> bool:
        """Whether a call of so many rows leaves out what is not needed on such a device; else it masks."""
        if device_type == "cpu" and self._handle is not None and rows <= MAX_ROWS:
            kernel = self._handle.kernel()
            return isinstance(kernel, CpuFFN) and (kernel.selects or not self.selects)
        if device_type != "cuda" or not self.operator:
            return False
        return self.operator == "truncated_ffn" or rows <= MOST_SELECTING_ROWS

    def run(self, x: Tensor, levels: Tensor) -> Tensor:
        """The whole FFN for x [n, d], each token cut to its level (int32 [n]): -> [n, d]."""
        if self.operator:
            y = self._operated(x, levels)
            return y if self.bias is None else y + self.bias[levels]
        weights = self.site.weights()
        h = self.mask(weights.hidden(x), levels, x if self.selects else None, None)
        return self.compensated(nn.functional.linear(h, weights.down, weights.down_bias), h, levels)

    def run_whole(self, x: Tensor) -> Tensor:
        """The whole FFN by its operator, where it has one, for x [n, d]: -> [n, d]."""
        gate, up, down, *biases = self.site.parts()
        widths = self.whole.expand(x.shape[0])
        y: Tensor = truncated_ffn(x, widths, gate, up, down, *biases, self.activation, self._number)
        return y

    def _operated(self, x: Tensor, levels: Tensor) -> Tensor:
        gate, up, down, *biases = self.site.parts()
        y: Tensor
        if self.operator == "truncated_ffn":
            y = truncated_ffn(x, self.widths[levels], gate, up, down, *biases, self.activation, self._number)
            return y
        shadow = self.shadow
        assert isinstance(shadow, Shadow)
        deciding = (shadow.deciding.codes, shadow.deciding.scales, shadow.bias, shadow.unit_norm)
        chosen = (self.widths[levels], self.least[levels], *deciding)
        y = selected_ffn(x, *chosen, gate, up, down, *biases, self.activation, self._number)
        return y

    def mask(self, h: Tensor, levels: Tensor, x: Tensor | None, z: Tensor | None) -> Tensor:
        """Hidden units h [n, f] with those zeroed that a token does not use.

        x: the FFN's input [n, d], which a shadow reads; z: the gate's output, where the gate itself decides. With
        neither, a token uses all units of its width.
        """
        units = torch.arange(h.shape[-1], dtype=torch.int32, device=h.device)
        used = units < self.widths[levels].unsqueeze(-1)
        importance = self._importance(x, z, h)
        if importance is not None:
            # A NaN importance keeps its unit: a token that is already broken must not look healthy.
            used = used & ~(importance < self.least[levels].unsqueeze(-1))
        # A product with 0 would let an inf or NaN of an unused unit through.
        return torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))

    def gate_part(self, output: Tensor) -> Tensor | None:
        """Of the first linear's output, what decides by itself; None where a shadow does."""
        return self.shadow.gate_part(output) if isinstance(self.shadow, ExactGate) else None

    def _importance(self, x: Tensor | None, z: Tensor | None, h: Tensor) -> Tensor | None:
        if not self.selects or self.shadow is None:
            return None
        if isinstance(self.shadow, SiteUnits):
            return self.shadow.importance(h)
        if isinstance(self.shadow, ExactGate) and z is not None:
            return self.shadow.importance_of(z)
        return None if x is None else self.shadow.importance(x)

    def compensated(self, y: Tensor, h: Tensor, levels: Tensor) -> Tensor:
        """y [n, d] plus what stands in for the units left out; h [n, f] holds the units used, zeros elsewhere.

        Every level's map runs for every token, because which levels occur is data.
        """
        if self.bias is not None:
            y = y + self.bias[levels].to(y.dtype)
        for level, u, v in self.low_rank:
            added = (h[:, : v.shape[1]] @ v.T.to(h.dtype)) @ u.T.to(h.dtype)
            y = torch.where((levels == level).unsqueeze(-1), y + added, y)
        return y

    def static_tensors(self) -> list[Tensor]:
        """Tensors that graphs read at one address, beyond the model's own parameters."""
        tensors: list[Any] = [self.widths, self.least, self.whole, self.bias]
        tensors += [factor for _, *factors in self.low_rank for factor in factors]
        if isinstance(self.shadow, Shadow):
            deciding = self.shadow.deciding
            tensors += [deciding.codes, deciding.scales, self.shadow.unit_norm, self.shadow.bias]
        return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
