"""Packed codes come back as they were, in the bytes that were promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.ops.packing import GROUP, group_bytes, pack, unpack


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 5), groups=st.integers(1, 3), bits=st.integers(2, 8), seed=st.integers(0, 2**31))
def test_round_trip(rows: int, groups: int, bits: int, seed: int) -> None:
    top = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-top, top + 1, (rows, groups, GROUP), generator=generator)
    packed = pack(codes.float(), bits)
    assert packed.shape == (rows, groups * group_bytes(bits))
    assert packed.element_size() == 1
    assert torch.equal(unpack(packed, groups, bits).long(), codes)


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 24), (4, 32), (5, 64), (8, 64)])
def test_bytes_of_a_group(bits: int, size: int) -> None:
    assert group_bytes(bits) == size


@pytest.mark.parametrize(("bits", "element", "byte", "value"), [(4, 33, 1, 16), (2, 49, 1, 64), (3, 9, 17, 2)])
def test_where_an_element_lies(bits: int, element: int, byte: int, value: int) -> None:
    low = -(2 ** (bits - 1))
    codes = torch.full((1, 1, GROUP), low)  # kept as 0
    codes[0, 0, element] = low + (4 if bits == 3 else 1)
    packed = pack(codes, bits)[0].tolist()
    assert packed[byte] == value
    assert sum(packed) == value
