"""Codes of 2, 3 and 4 bits in bytes, a group of 64 at a time.

A code c in ``-(2^(bits-1) - 1) .. 2^(bits-1) - 1`` is kept as ``c + 2^(bits-1)``. 4 bits: byte i of a group's 32 holds
element i (low half) and i + 32. 2 bits: byte i of 16 holds elements i, i + 16, i + 32, i + 48 from the lowest pair up.
3 bits: the two low bits as above, then 8 bytes of high bits, byte i holding those of elements i, i + 8, ..., i + 56.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64


def group_bytes(bits: int) -> int:
    """Bytes that a group takes; codes of more than 4 bits take a byte each."""
    return GROUP * bits // 8 if bits <= 4 else GROUP


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers [rows, groups, 64] of any dtype -> uint8 (above 4 bits int8) [rows, groups * bytes]."""
    if bits > 4:
        return codes.to(torch.int8).flatten(1)
    shifted = (codes + 2 ** (bits - 1)).to(torch.uint8)
    if bits == 4:
        return _together(shifted, 4).flatten(1)
    low = _together(shifted & 3, 2)
    return (low if bits == 2 else torch.cat((low, _together(shifted >> 2, 1)), dim=-1)).flatten(1)


def unpack(codes: Tensor, groups: int, bits: int) -> Tensor:
    """`pack` undone: int8 [rows, groups, 64]."""
    codes = codes.view(codes.shape[0], groups, group_bytes(bits))
    if bits > 4:
        return codes
    if bits == 4:
        values = _apart(codes, 4)
    else:
        values = _apart(codes[..., : GROUP // 4], 2)
        if bits == 3:
            values |= _apart(codes[..., GROUP // 4 :], 1) << 2
    # The offset goes while a code is a byte: a fraction of the memory traffic of subtracting it from floats.
    return values.view(torch.int8).sub_(2 ** (bits - 1))


def _together(values: Tensor, bits: int) -> Tensor:
    """Fields of ``bits`` bits side by side in bytes: element i of each of the 8 / bits equal parts into byte i."""
    parts = values.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * place)
    return packed


def _apart(packed: Tensor, bits: int) -> Tensor:
    mask = 2**bits - 1
    fields = [packed & mask, *((packed >> (bits * place)) & mask for place in range(1, 8 // bits))]
    return torch.cat(fields, dim=-1)
