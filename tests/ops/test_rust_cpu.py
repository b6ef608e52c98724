"""The compiled kernels on torch's memory: what masking gives, the same bits for any threads and neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.ops import OperatingPoint, cut_ffn
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.compiled import MAX_ROWS, available
from tests.cut_cases import Recorder, assert_as_good_as_plain
from tests.kernel_cases import DTYPES, LAYOUTS, case, threads

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")

if available():
    from sedac_hf import _rust

CASES = {
    "d": st.integers(1, 100),
    "f": st.integers(1, 150),
    "selects": st.booleans(),
    "narrows": st.booleans(),
    "gated": st.booleans(),
    "bias": st.booleans(),
    "dtype": st.sampled_from(DTYPES),
    "activation": st.sampled_from(sorted(KNOWN)),
    "layout": st.sampled_from(LAYOUTS),
    "share": st.floats(0.1, 1.0),
    "isa": st.sampled_from(_rust.instruction_sets() if available() else [""]),
    "seed": st.integers(0, 99),
}
LEVELS = st.lists(st.integers(0, 8), min_size=1, max_size=MAX_ROWS)


@settings(max_examples=60, deadline=None)
@given(levels=LEVELS, compensates=st.booleans(), options=st.fixed_dictionaries(CASES))
def test_cut_rows_equal_masking(levels, compensates, options):
    c = case(rows=len(levels), compensates=compensates, **options)
    record = Recorder()
    cut = c.cut(levels, record)
    assert_as_good_as_plain(cut_ffn(c.x, c.weights, cut), c.x, c.weights, cut)
    f = c.weights.intermediate_size
    used = torch.zeros(len(levels), f, dtype=torch.bool)
    for row, level in enumerate(levels):
        point = c.points[level]
        used[row, : point.width if level else 0] = True
        if c.shadow is not None and point.importance_min > 0:
            used[row] &= c.shadow.importance(c.x[row : row + 1])[0] >= torch.tensor(point.importance_min)
    (call,) = record.calls
    assert call == {
        "engine": "rust",
        "tokens": len(levels),
        "needed": int(used.sum()),
        "read": int(used.any(dim=0).sum()),
        "computed": int(used.sum()),
    }


@settings(max_examples=40, deadline=None)
@given(levels=st.lists(st.integers(0, 8), min_size=2, max_size=MAX_ROWS), options=st.fixed_dictionaries(CASES))
def test_a_row_has_the_bits_that_it_has_alone(levels, options):
    c = case(rows=len(levels), **options)
    together = c.run(levels)
    for row in range(len(levels)):
        assert torch.equal(c.run(levels, slice(row, row + 1))[0], together[row])


@settings(max_examples=40, deadline=None)
@given(levels=LEVELS, options=st.fixed_dictionaries(CASES))
def test_threads_and_repetition_do_not_change_a_bit(levels, options):
    options = {**options, "f": options["f"] * 9, "d": options["d"] * 3}  # enough for several tasks
    c = case(rows=len(levels), **options)
    runs = []
    for count in (1, 2, 3, 2):
        with threads(count):
            runs.append(c.run(levels))
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_values_are_those_of_the_units_in_use(layout, dtype):
    c = case(24, 100, 2, layout=layout, dtype=dtype, selects=False)
    points = [OperatingPoint(37), OperatingPoint(0)]
    hidden = torch.full((2, 100), torch.nan)
    y, needed, read = c.kernel.run(c.x, points, hidden)
    assert (needed, read) == (37, 37)
    assert not hidden[0, 37:].any()
    assert not hidden[1].any()
    wanted = c.weights.hidden(c.x[:1].float(), 0, 37) if dtype == torch.float32 else c.weights.hidden(c.x[:1], 0, 37)
    torch.testing.assert_close(
        hidden[:1, :37], wanted.float(), rtol=0.05 if dtype != torch.float32 else 1e-5, atol=0.02
    )
    assert torch.equal(y[1], c.weights.down_bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_unused_units_have_no_say(layout, dtype):
    """Infinite and NaN weights of units that nobody uses, and NaN in memory that a result does not own."""
    c = case(40, 120, 3, layout=layout, dtype=dtype)
    levels = [2, 5, 3]
    used = (c.shadow.importance(c.x) >= torch.tensor([[c.points[level].importance_min] for level in levels])).any(0)
    assert 10 < int(used.sum()) < 110
    expected = c.run(levels)
    with torch.no_grad():
        for tensor in (c.weights.gate, c.weights.up, c.weights.gate_bias, c.weights.up_bias):
            tensor[~used] = torch.nan
        if layout == "columns":  # else down's rows are read whole
            c.weights.down[:, ~used] = torch.inf
    assert torch.equal(c.run(levels), expected)


def test_a_strided_input_gives_what_its_copy_gives():
    c = case(32, 64, 3)
    wide = torch.full((3, 64), torch.nan)
    wide[:, ::2] = c.x
    for strided in (wide[:, ::2], c.x.T.contiguous().T, c.x[:1].expand(3, -1)):
        copy = strided.contiguous()
        assert torch.equal(c.kernel.whole(strided), c.kernel.whole(copy))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_row_stays_visible_and_alone(broken):
    c = case(40, 80, 3)
    levels = [4, 4, 8]
    healthy = c.run(levels)
    c.x[1, 7] = broken
    y = c.run(levels)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 2]], healthy[[0, 2]])
