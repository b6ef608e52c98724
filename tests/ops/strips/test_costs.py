"""The table of costs: measured once per kind of FFN, monotone, off by a flag, and never part of the result."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from sedac_hf import _rust
from sedac_hf.errors import ConfigError
from sedac_hf.ops import cut_ffn
from sedac_hf.ops.strips import cold_clock, costs
from sedac_hf.ops.strips.costs import cost_table, forget_tables, known_tables
from sedac_hf.ops.strips.plan import PythonStripPlanner, Strip
from tests.cut_cases import assert_as_good_as_plain, even_points, random_weights, site_cut


@pytest.fixture(autouse=True)
def fresh_tables(monkeypatch):
    monkeypatch.delenv("SEDAC_MEASURE_COSTS", raising=False)
    monkeypatch.setattr(costs, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(cold_clock, "FLUSH_BYTES", 1 << 12)  # no need of true times here
    forget_tables()
    yield
    forget_tables()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_times_are_complete_and_monotone(gated, dtype):
    table = cost_table(random_weights(24, 80, gated=gated, dtype=dtype))
    assert (table.key.dtype, table.key.hidden_size, table.key.matrices) == (dtype, 24, 3 if gated else 2)
    for times in (table.prior, table.measured):
        for part in times:
            assert part.shape == (len(costs.TOKENS), len(costs.UNITS))
            assert np.isfinite(part).all()
            assert (part > 0).all()
            assert (np.diff(part, axis=0) >= 0).all()
            assert (np.diff(part, axis=1) >= 0).all()
        np.testing.assert_array_equal(times.of("whole"), times.hidden + times.down)


def test_a_kind_of_ffn_is_measured_once(monkeypatch, caplog):
    ones = np.ones((len(costs.TOKENS), len(costs.UNITS)))
    monkeypatch.setattr(costs, "_measure", lambda *_: costs.Times(ones, ones))
    caplog.set_level(logging.INFO, logger="sedac_hf.ops.strips.costs")
    first = cost_table(random_weights(24, 80))
    assert "measured what FFNs of hidden size 24 (torch.float32, cpu" in caplog.text
    assert cost_table(random_weights(24, 96, seed=1)) is first  # another layer, another width
    others = [
        random_weights(16, 80),
        random_weights(24, 80, gated=False),
        random_weights(24, 80, dtype=torch.bfloat16),
    ]
    assert len({id(cost_table(weights)) for weights in others} | {id(first)}) == 4
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert cost_table(random_weights(24, 80)) is not first
    finally:
        torch.set_num_threads(threads)
    assert len(known_tables()) == 5
    assert first.planner("whole", PythonStripPlanner) is first.planner("whole", PythonStripPlanner)
    assert first.planner("whole", _rust.StripPlanner).seconds(7, 80) == pytest.approx(
        first.planner("whole", PythonStripPlanner).seconds(7, 80), rel=1e-12
    )


def test_measuring_can_be_switched_off(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="sedac_hf.ops.strips.costs")
    monkeypatch.setenv("SEDAC_MEASURE_COSTS", "off")
    monkeypatch.setattr(costs, "_measure", None)  # would fail
    first = cost_table(random_weights(24, 80))
    assert first.measured is None
    forget_tables()
    again = cost_table(random_weights(24, 80))
    for a, b in zip(first.prior, again.prior, strict=True):
        np.testing.assert_array_equal(a, b)
    assert caplog.text == ""


def test_a_flag_that_cannot_be_read_is_named(monkeypatch):
    monkeypatch.setenv("SEDAC_MEASURE_COSTS", "perhaps")
    with pytest.raises(ConfigError, match=r"SEDAC_MEASURE_COSTS must be one of .* got 'perhaps'"):
        cost_table(random_weights(24, 80))


def test_small_ffns_are_not_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.delenv("SEDAC_MEASURE_COSTS", raising=False)
    monkeypatch.setattr(costs, "_measure", None)  # would fail
    assert cost_table(random_weights(24, 80)).measured is None


def test_rates_stand_in_where_measuring_fails(monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(costs, "_measure", fail)
    assert cost_table(random_weights(24, 80)).measured is None
    assert "stated rates are used: no memory" in caplog.text


def test_no_time_left_gives_a_whole_table_all_the_same(monkeypatch):
    monkeypatch.setattr(costs, "LONGEST_S", 0.0)  # only the first cell is timed
    table = cost_table(random_weights(24, 80))
    seconds = table.measured.hidden
    np.testing.assert_allclose(seconds, seconds[0, 0] * np.outer(costs.TOKENS, costs.UNITS))


def test_measuring_leaves_random_numbers_and_weights_alone():
    weights = random_weights(24, 80)
    kept = [tensor.clone() for tensor in (weights.gate, weights.up, weights.down)]
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    cost_table(weights)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    for tensor, before in zip((weights.gate, weights.up, weights.down), kept, strict=True):
        torch.testing.assert_close(tensor, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_measured_changes_rounding_alone(dtype, monkeypatch):
    """Other times lead to other cuts, never to another result; the same times to the same bits."""
    weights, points = random_weights(24, 80, dtype=dtype), even_points(80)
    levels = torch.randint(0, 9, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    x = torch.randn(60, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    cuts_seen, tokens, units = set(), np.array(costs.TOKENS)[:, None], np.array(costs.UNITS)[None, :]
    for by_tokens, by_units in itertools.product((0.0, 0.6, 1.0, 1.6), (0.4, 1.0, 2.5)):
        times = [1e-6 * tokens**by_tokens * units**by_units for _ in range(2)]
        monkeypatch.setattr(costs, "_measure", lambda *_, times=times: costs.Times(*times))
        forget_tables()
        cut = replace(site_cut(levels, points), strip_planner=_rust.StripPlanner)
        y = cut_ffn(x, weights, cut)
        assert_as_good_as_plain(y, x, weights, cut)
        torch.testing.assert_close(cut_ffn(x, weights, cut), y, rtol=0, atol=0)
        cuts_seen.add(str(cut.plan.__dict__["_remembered"]))
    assert len(cuts_seen) > 3


def test_small_mixed_batches_get_one_strip(monkeypatch):
    monkeypatch.setenv("SEDAC_MEASURE_COSTS", "0")
    planner = cost_table(random_weights(1024, 8)).planner("whole", PythonStripPlanner)
    ends = [(4096, 2), (2048, 4), (1024, 6), (512, 8)]
    assert planner.strips(ends) == [Strip(0, 4096, 8, 2)]
    assert len(planner.strips([(width, 64 * row) for width, row in ends])) > 1
