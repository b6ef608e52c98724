"""What decides which units a token needs: the importance of each unit, from a low-bit shadow of the gate.

    importance_j = |act(z_j)| * ||up_j|| * ||down_j||     (plain MLP: |act(z_j)| * ||down_j||)
    z            = shadow(gate) int8(x) + gate_bias       (plain MLP: up in the gate's place)

A shadow is made from the weights when a policy that selects is calibrated or loaded; it is deterministic and never
saved. Int8 and float8 weights are read as the numbers they stand for. Where the weights are low-bit or odd
themselves, `ExactGate` decides by the gate itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.linears import bias_of, describe, norms, sliced, slices_of, weight_of
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.contract import FFNWeights, ShadowTables
from sedac_hf.ops.low_bit import LowBitMatrix, importance

_PROBE_ROWS = 256  # rows of the identity that reveal the weights of an opaque linear at a time


class Shadow:
    """A low-bit copy of the rows that decide, in the units' order at the time of making.

    Attributes:
        deciding: the copy of gate's rows (plain MLP: up's), [f, d].
        unit_norm: float32 [f], ||up_j|| * ||down_j|| (plain MLP: ||down_j||).
        multiply_adds: of one token's importances.
    """

    def __init__(
        self, deciding: LowBitMatrix, bias: Tensor | None, unit_norm: Tensor, activation: Callable[[Tensor], Tensor]
    ) -> None:
        self.deciding = deciding
        self.bias = bias
        self.unit_norm = unit_norm
        self.activation = activation
        self._for_cpu_kernels = False

    @classmethod
    def build(cls, site: FFNSite, bits: int = 4) -> Shadow:
        """The shadow of a site's live weights.

        Raises:
            UnsupportedModelError: the weights or the activation can't be read here; use `ExactGate`, or truncate.
        """
        return cls.of(_readable_weights(site), bits)

    @classmethod
    def of(cls, weights: FFNWeights, bits: int = 4) -> Shadow:
        """The shadow of weights that can be read."""
        deciding, bias = (weights.up, weights.up_bias) if weights.gate is None else (weights.gate, weights.gate_bias)
        bias = None if bias is None else bias.detach().float().clone()
        return cls(LowBitMatrix.quantize(deciding, bits), bias, unit_norms(weights), weights.activation)

    @staticmethod
    def bytes_for(site: FFNSite, bits: int) -> int:
        """Bytes that a shadow of the site would hold; 0 where none can be made."""
        f = site.intermediate_size
        if site.activation is None or not can_be_read(site):
            return 0
        biased = bias_of(site.up if site.gate is None else site.gate) is not None
        return Shadow.bytes_of(f, site.hidden_size, bits, biased=biased)

    @staticmethod
    def bytes_of(units: int, hidden_size: int, bits: int, *, biased: bool) -> int:
        """Bytes of the shadow of an FFN of this size."""
        return LowBitMatrix.bytes_of(units, hidden_size, bits) + (8 if biased else 4) * units

    @property
    def held_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self.bytes

    @property
    def bytes(self) -> int:
        """Bytes read for one call: packed codes, scales, norms and the bias."""
        return self.deciding.bytes + 4 * self.unit_norm.numel() + (0 if self.bias is None else 4 * self.bias.numel())

    @property
    def multiply_adds(self) -> int:
        return self.deciding.columns * self.unit_norm.numel()

    def importance(self, x: Tensor, rows: range | None = None) -> Tensor:
        """Importance of each unit (or of the consecutive ``rows``) for x [n, d] -> float32 [n, f]; no gradient."""
        if self.unit_norm.device != x.device:
            self.move(x.device)
        return importance(x, self.deciding, self.bias, self.unit_norm, self.activation, rows)

    def interleave(self) -> None:
        """Lay the codes out as the CPU kernels read them, now and whenever they come to a CPU; bits other than 4 are
        left as they are."""
        self._for_cpu_kernels = self.deciding.bits == 4
        self.move(self.unit_norm.device)

    def move(self, device: torch.device) -> None:
        """Bring the tables to a device, in the layout that is read there: on CUDA kernels take rows."""
        interleaved = self._for_cpu_kernels and device.type == "cpu"
        deciding = self.deciding if interleaved else self.deciding.row_by_row()
        deciding = deciding.to(device)
        self.deciding = deciding.interleave() if interleaved else deciding
        self.bias = None if self.bias is None else self.bias.to(device)
        self.unit_norm = self.unit_norm.to(device)

    def tables(self, *, interleaved: bool = True) -> ShadowTables | None:
        """What a kernel reads, interleaved (on a CPU) or row by row; None where the shadow does not lie so, or has not
        4 bits."""
        if self.deciding.bits != 4 or self.deciding.interleaved != interleaved:
            return None
        return ShadowTables(self.deciding.codes, self.deciding.scales, self.bias, self.unit_norm)


class ExactGate:
    """The gate itself decides (plain MLP: up): for bases whose weights are low-bit, adapter-wrapped or offloaded.

    Build it before the site's forwards are replaced. It reads the whole gate, so it saves up and down only.
    """

    def __init__(self, site: FFNSite) -> None:
        if site.activation is None:
            raise UnsupportedModelError(
                f"the FFN {site.name!r} has no activation that can be read, so the importance of its units is "
                "unknown: cut it by width (objective 'throughput') instead"
            )
        self.site = site
        self.linear = site.up if site.gate is None else site.gate
        self.activation = site.activation
        self._original: Callable[[Tensor], Tensor] = self.linear.forward
        self.unit_norm = unit_norms(site.weights()) if can_be_read(site) else _probed_unit_norms(site)
        self.multiply_adds = site.hidden_size * site.intermediate_size
        self.bytes = 2 * self.multiply_adds  # read; as a bf16 base holds it, like all of the needed share
        self.held_bytes = 4 * self.unit_norm.numel()

    def importance(self, x: Tensor) -> Tensor:
        """Importance of each unit for x [n, d] -> float32 [n, f]; no gradient."""
        with torch.no_grad():
            if slices_of(self.linear).prefix and not weight_of(self.linear).is_meta:
                f = self.site.intermediate_size
                lo = f if self.site.kind == "fused" and not self.site.fused_gate_first else 0
                return self.importance_of(sliced(self.linear, x, lo, lo + f))
            return self.importance_of(self.gate_part(self._original(x)))

    def gate_part(self, output: Tensor) -> Tensor:
        """The gate's half of the output of a fused linear; all of it otherwise."""
        if self.site.kind != "fused":
            return output
        return output.chunk(2, dim=-1)[0 if self.site.fused_gate_first else 1]

    def importance_of(self, z: Tensor) -> Tensor:
        """Importance of the first k units from the gate's own output z [n, k] -> float32 [n, k]; no gradient."""
        with torch.no_grad():
            magnitude: Tensor = self.activation(z.detach()).float().abs()
            return magnitude * self.unit_norm.to(z.device)[: z.shape[-1]]


def unit_norms(weights: FFNWeights) -> Tensor:
    """float32 [f]: ||up_j|| * ||down_j||, for a plain MLP ||down_j||."""
    down = norms(weights.down, dim=0)
    return down if weights.gate is None else down * norms(weights.up, dim=1)


def _readable_weights(site: FFNSite) -> FFNWeights:
    if not can_be_read(site):
        raise UnsupportedModelError(
            f"a shadow of {site.name!r} needs weights that are in memory and can be read in slices, got "
            f"{', '.join(dict.fromkeys(describe(linear) for linear in site.linears))}: let the exact gate decide "
            "(ExactGate), or cut by width"
        )
    return site.weights()


def can_be_read(site: FFNSite) -> bool:
    return all(slices_of(linear).readable and not weight_of(linear).is_meta for linear in site.linears)


def _probed_unit_norms(site: FFNSite) -> Tensor:
    """Unit norms of linears that may be opaque: a linear map of the identity shows its weights."""
    f, d = site.intermediate_size, site.hidden_size
    down = probed_down_norms(site)
    if site.kind == "plain":
        return down
    squares: Any = sum((rows.float() ** 2).sum(dim=0) for rows in _images(site.up, d))
    if site.kind == "fused":
        squares = squares[f:] if site.fused_gate_first else squares[:f]
    norms: Tensor = down * squares.sqrt()
    return norms


def probed_down_norms(site: FFNSite) -> Tensor:
    """float32 [f]: ||down_j||, of a down that may be opaque."""
    images = _images(site.down, site.intermediate_size)
    return torch.cat([(rows.float() ** 2).sum(dim=1) for rows in images]).sqrt()


def _images(linear: nn.Module, inputs: int) -> Any:
    """``W^T`` in pieces [<=256, out], by the linear's own forward (hooks included), its bias taken off."""
    like = next((p for p in linear.parameters() if p.is_floating_point()), None)
    dtype = torch.float32 if like is None else like.dtype
    device = torch.device("cpu") if like is None or like.is_meta else like.device
    with torch.no_grad():
        zero = linear(torch.zeros(1, inputs, dtype=dtype, device=device))
        for start in range(0, inputs, _PROBE_ROWS):
            rows = torch.arange(start, min(start + _PROBE_ROWS, inputs), device=device)
            x = torch.zeros(rows.numel(), inputs, dtype=dtype, device=device)
            x[torch.arange(rows.numel(), device=device), rows] = 1
            yield linear(x) - zero
