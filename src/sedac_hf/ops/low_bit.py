"""Low-bit copies of weight matrices, and the product of one with activations rounded to int8.

Weights: symmetric round to nearest in groups along the input, one bfloat16 scale a group, the best of a few clips
by squared error (as in AWQ, arXiv 2306.00978, without its scaling). Activations: per token, symmetric int8. The
product

    z[t, j] = s_x[t] * sum_g s_w[j, g] * sum_{i in g} code_w[j, i] * code_x[t, i]

has integers inside a group, so engines differ by the rounding of a few float additions only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sedac_hf.errors import ConfigError
from sedac_hf.ops.contract import dense
from sedac_hf.ops.packing import GROUP, group_bytes, pack, unpack

INTERLEAVED_ROWS = 16
_CLIPS = (1.0, 0.85, 0.7, 0.55)
_CHUNK = 1 << 19  # weights that are quantised or expanded to float32 at a time


class Int8Rows(NamedTuple):
    """Activations rounded to int8: codes float32 [n, d] with integers in -127..127, scale float32 [n, 1]."""

    codes: Tensor
    scale: Tensor


def int8_rows(x: Tensor) -> Int8Rows:
    """Round x [n, d] per token: ``scale = max|x| / 127``, half to even; a zero row gives zeros, a NaN or infinite
    row NaN."""
    x = x.detach().float()
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(x.shape[0], 1)
    scale = largest / 127
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return Int8Rows((x / safe).round().clamp(-127, 127), scale)


@dataclass(frozen=True, eq=False)
class LowBitMatrix:
    """A matrix [rows, columns] in ``bits`` bits (2..8).

    codes: [rows, groups * bytes of a group], as `sedac_hf.ops.packing` lays them out. The last group is padded with
    zeros. scales: bfloat16 [rows, groups].

    Interleaved (see `interleave`), 4-bit codes are uint8 [blocks, groups, 8, 16, 4], four bytes of each of 16 rows
    side by side, and scales [blocks, groups, 16]; rows are then padded with zeros to whole blocks.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    bits: int
    rows: int
    interleaved: bool = False

    @classmethod
    def quantize(cls, weight: Tensor, bits: int = 4) -> LowBitMatrix:
        """The low-bit copy of a floating weight [rows, columns]; deterministic.

        Raises:
            ConfigError: ``bits`` is not in 2..8.
        """
        if bits not in range(2, 9):
            raise ConfigError(f"`bits` of a low-bit copy must be in 2..8, got {bits!r}")
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        weight, groups = weight.detach(), -(-weight.shape[1] // GROUP)
        shape = weight.shape[0], groups * group_bytes(bits)
        codes = torch.empty(shape, dtype=torch.uint8 if bits <= 4 else torch.int8, device=weight.device)
        scales = torch.empty(weight.shape[0], groups, dtype=torch.bfloat16, device=weight.device)
        for lo in range(0, weight.shape[0], step):
            part = slice(lo, lo + step)
            codes[part], scales[part] = _quantized(dense(weight[part]), bits)
        return cls(codes, scales, weight.shape[1], bits, weight.shape[0])

    def interleave(self) -> LowBitMatrix:
        """The same matrix as the CPU kernels read it: a vector then holds codes of 16 rows.

        Raises:
            ConfigError: it has not 4 bits.
        """
        if self.interleaved:
            return self
        if self.bits != 4:
            raise ConfigError(f"only a 4-bit copy can be interleaved, this one has {self.bits} bits")
        padding = (0, 0, 0, -self.rows % INTERLEAVED_ROWS)
        blocks, groups = -(-self.rows // INTERLEAVED_ROWS), self.scales.shape[1]
        codes = functional.pad(self.codes, padding).view(blocks, INTERLEAVED_ROWS, groups, GROUP // 8, 4)
        scales = functional.pad(self.scales, padding).view(blocks, INTERLEAVED_ROWS, groups)
        return replace(
            self,
            codes=codes.permute(0, 2, 3, 1, 4).contiguous(),
            scales=scales.permute(0, 2, 1).contiguous(),
            interleaved=True,
        )

    def row_by_row(self) -> LowBitMatrix:
        """The same matrix in the plain layout, which everything but the CPU kernels reads."""
        if not self.interleaved:
            return self
        codes, scales = self._row_by_row(0, self.rows)
        return replace(self, codes=codes.contiguous(), scales=scales.contiguous(), interleaved=False)

    @staticmethod
    def bytes_of(rows: int, columns: int, bits: int) -> int:
        """Bytes that a copy of a matrix would take."""
        return rows * -(-columns // GROUP) * (group_bytes(bits) + 2)

    @property
    def bytes(self) -> int:
        """Bytes that a full read of the copy costs."""
        return self.codes.numel() + 2 * self.scales.numel()

    def dequantized(self, lo: int = 0, hi: int | None = None) -> Tensor:
        """Rows lo..hi as float32 [hi - lo, columns]: the exact products of scale and code."""
        codes, scales = self._row_by_row(lo, self.rows if hi is None else hi)
        scales = scales.float()
        values = unpack(codes, scales.shape[1], self.bits).float()
        return values.mul_(scales[..., None]).flatten(1)[:, : self.columns]

    def product(self, x: Int8Rows, lo: int = 0, hi: int | None = None) -> Tensor:
        """``x @ rows[lo:hi].T`` -> float32 [n, hi - lo]; expands a bounded number of rows at a time."""
        hi = self.rows if hi is None else hi
        step = max(1, _CHUNK // max(1, self.columns))
        out = torch.empty(x.codes.shape[0], hi - lo, dtype=torch.float32, device=x.codes.device)
        with torch.no_grad():
            for start in range(lo, hi, step):
                end = min(start + step, hi)
                out[:, start - lo : end - lo] = functional.linear(x.codes, self.dequantized(start, end))
            return out.mul_(x.scale)

    def to(self, device: torch.device) -> LowBitMatrix:
        return replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def _row_by_row(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of rows lo..hi in the plain layout."""
        if not self.interleaved:
            return self.codes[lo:hi], self.scales[lo:hi]
        first, last = lo // INTERLEAVED_ROWS, -(-hi // INTERLEAVED_ROWS)
        rows = (last - first) * INTERLEAVED_ROWS
        inside = slice(lo - first * INTERLEAVED_ROWS, hi - first * INTERLEAVED_ROWS)
        codes = self.codes[first:last].permute(0, 3, 1, 2, 4).reshape(rows, self.scales.shape[1] * GROUP // 2)
        scales = self.scales[first:last].permute(0, 2, 1).reshape(rows, self.scales.shape[1])
        return codes[inside], scales[inside]


def importance(
    x: Tensor,
    deciding: LowBitMatrix,
    bias: Tensor | None,
    unit_norm: Tensor,
    activation: Callable[[Tensor], Tensor],
    rows: range | None = None,
) -> Tensor:
    """Importance ``|act(z)| * unit_norm`` of each unit (or of the consecutive ``rows``), with z the product of the
    low-bit rows and the rounded activations, plus the bias: x [n, d] -> float32 [n, f]; no gradient."""
    lo, hi = (0, unit_norm.numel()) if rows is None else (rows.start, rows.stop)
    with torch.no_grad():
        z = deciding.product(int8_rows(x), lo, hi)
        if bias is not None:
            z += bias[lo:hi]
        return activation(z).abs() * unit_norm[lo:hi]


def _quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    groups = -(-columns // GROUP)
    values = functional.pad(weight.float(), (0, groups * GROUP - columns)).view(rows, groups, GROUP)
    top = 2 ** (bits - 1) - 1
    largest = values.abs().amax(dim=-1, keepdim=True)
    best_codes = torch.zeros_like(values)
    best_scale = torch.zeros_like(largest)
    least = torch.full_like(largest, float("inf"))
    for clip in _CLIPS:
        scale = (largest * clip / top).to(torch.bfloat16).float()  # codes are fitted to the scale that is kept
        codes = (values / torch.where(scale == 0, torch.ones_like(scale), scale)).round().clamp(-top, top)
        error = (codes * scale - values).square().sum(dim=-1, keepdim=True)
        better = error < least
        best_codes = torch.where(better, codes, best_codes)
        best_scale = torch.where(better, scale, best_scale)
        least = torch.where(better, error, least)
    scales = best_scale.squeeze(-1).to(torch.bfloat16)
    return pack(best_codes, bits), scales
