"""The interleaved form of a 4-bit copy: the same matrix, in the order that the CPU kernels read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.errors import ConfigError
from sedac_hf.ops.low_bit import LowBitMatrix, int8_rows

SIZES = {"rows": st.integers(1, 50), "columns": st.integers(1, 200), "seed": st.integers(0, 9)}


def copy_of(rows: int, columns: int, seed: int, bits: int = 4) -> LowBitMatrix:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return LowBitMatrix.quantize(weight, bits)


@settings(max_examples=60, deadline=None)
@given(**SIZES, ends=st.tuples(st.integers(0, 50), st.integers(0, 50)))
def test_interleaving_changes_the_order_alone(rows, columns, seed, ends):
    plain = copy_of(rows, columns, seed)
    other = plain.interleave()
    assert other.codes.shape == (-(-rows // 16), -(-columns // 64), 8, 16, 4)
    assert other.scales.shape == (-(-rows // 16), -(-columns // 64), 16)
    assert other.codes.is_contiguous()
    assert other.scales.is_contiguous()
    assert other.interleave() is other
    assert (other.rows, other.columns) == (rows, columns)
    assert torch.equal(other.dequantized(), plain.dequantized())
    lo, hi = sorted(min(end, rows) for end in ends)
    assert torch.equal(other.dequantized(lo, hi), plain.dequantized(lo, hi))
    x = int8_rows(torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(other.product(x), plain.product(x))
    assert torch.equal(other.product(x, lo, hi), plain.product(x, lo, hi))


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_the_documented_places(rows, columns, seed):
    """Byte i of quad q of a group holds element 4q + i low and 32 + 4q + i high, 16 rows side by side."""
    plain = copy_of(rows, columns, seed)
    other = plain.interleave()
    codes = plain.codes.view(rows, -1, 32)
    for row in {0, rows // 2, rows - 1}:
        block, lane = divmod(row, 16)
        for group in range(codes.shape[1]):
            held = torch.stack([other.codes[block, group, q, lane] for q in range(8)]).flatten()
            assert torch.equal(held, codes[row, group])
            assert other.scales[block, group, lane] == plain.scales[row, group]
    padding = slice(rows % 16, 16) if rows % 16 else slice(0, 0)
    assert not other.scales[-1, :, padding].any(), "rows that fill up a block weigh nothing"


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"has {bits} bits"):
        copy_of(16, 64, 0, bits).interleave()
