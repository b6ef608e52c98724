"""Schedules: monotone, aligned, and their way through JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sedac_hf.errors import ConfigError
from sedac_hf.ffn.schedule import WidthSchedule, align_width
from sedac_hf.ops.contract import OperatingPoint


@given(f=st.integers(1, 20000), share=st.floats(0, 1), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_widths_are_rounded_up_to_what_kernels_load(f: int, share: float, dtype: torch.dtype) -> None:
    width = align_width(share * f, f, dtype)
    step = 64 if f >= 1024 else 16 // dtype.itemsize
    assert share * f <= width + 1e-9 <= f + 1e-9
    assert width == f or width % step == 0
    assert width - share * f < step + 1e-9


@given(
    n_levels=st.integers(2, 16),
    f=st.integers(8, 4096),
    widths=st.lists(st.integers(0, 4096), min_size=15, max_size=15),
    thresholds=st.lists(st.floats(0, 100), min_size=15, max_size=15),
)
def test_any_monotone_rows_make_a_schedule_that_json_keeps(
    n_levels: int, f: int, widths: list[int], thresholds: list[float]
) -> None:
    rising = sorted(min(w, f) for w in widths[: n_levels - 1])
    falling = sorted(thresholds[: n_levels - 1], reverse=True)
    row = (OperatingPoint(0), *map(OperatingPoint, rising, falling), OperatingPoint(f))
    schedule = WidthSchedule(n_levels, (row, row))
    schedule.check([f, f])
    assert schedule.selects == any(t > 0 for t in falling)
    assert WidthSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


W = OperatingPoint


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((W(0), W(8), W(16)), "needs 4 operating points"),
        ((W(8), W(8), W(8), W(16)), "level 0 must have width 0"),
        ((W(0), W(8), W(8), W(16, 0.5)), "no threshold"),
        ((W(0), W(16), W(8), W(16)), "must not use less"),
        ((W(0), W(8, 0.1), W(8, 0.2), W(16)), "must not use less"),
        ((W(0), W(8, float("inf")), W(8, 0.2), W(16)), "finite"),
    ],
)
def test_rows_that_are_not_monotone_are_refused(row: tuple[OperatingPoint, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WidthSchedule(3, (row,))


def test_a_schedule_for_another_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"FFNs of \[16\] units, the model has \[32\]"):
        WidthSchedule(2, ((W(0), W(8), W(16)),)).check([32])


@pytest.mark.parametrize("values", [{}, {"n_levels": 2, "widths": [[0, 8, 16]]}, {"n_levels": 2, "widths": 3}])
def test_damaged_json_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        WidthSchedule.from_dict(values)
