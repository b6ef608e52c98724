"""One row or one column per token: what was measured on this machine decides, and the result is the same."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.ops import cut_ffn, onednn
from sedac_hf.ops.strips import cold_clock, columns, costs, orders
from sedac_hf.ops.strips.orders import STATED_LEAST, by_columns, forget_orders
from tests.cut_cases import assert_as_good_as_plain, even_points, random_weights, site_cut


@pytest.fixture(autouse=True)
def fresh_orders(monkeypatch):
    monkeypatch.delenv("SEDAC_MEASURE_COSTS", raising=False)
    monkeypatch.setattr(costs, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(cold_clock, "FLUSH_BYTES", 1 << 12)  # no need of true times here
    monkeypatch.setattr(onednn, "has_products", lambda dtype: True)
    forget_orders()
    yield
    forget_orders()


def low(**kwargs):
    return random_weights(24, 40, dtype=torch.bfloat16, **kwargs)


def clock_of(ratio, asked=None):
    """A clock by which columns take so many times as long as rows."""

    class Clock:
        def __init__(self, device):
            pass

        def seconds(self, *calls):
            for call in calls:
                call()
            if asked is not None:
                asked.append(len(calls))
            return [ratio, 1.0]

    return Clock


@pytest.mark.parametrize(
    ("ratio", "few", "many"), [(0.5, True, True), (0.97, False, True), (1.03, False, True), (1.5, False, False)]
)
def test_the_quicker_order_is_taken_and_what_is_stated_where_neither_clearly_is(ratio, few, many, monkeypatch):
    monkeypatch.setattr(orders, "ColdClock", clock_of(ratio))
    assert by_columns(STATED_LEAST - 1, low()) is few
    assert by_columns(STATED_LEAST, low()) is many
    assert not by_columns(columns.LEAST_TOKENS - 1, low())
    assert not by_columns(columns.MOST_TOKENS + 1, low())
    assert not by_columns(STATED_LEAST, random_weights(24, 40))


def test_each_kind_of_ffn_and_size_of_batch_is_measured_once(monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(orders, "ColdClock", clock_of(0.5, asked))
    for tokens in (5, 16, 7, 16):
        by_columns(tokens, low(seed=tokens))
    assert asked == [2]
    by_columns(17, low())
    by_columns(64, low())
    assert asked == [2, 2]
    by_columns(64, low(gated=False))
    by_columns(512, low())
    assert asked == [2] * 4


@pytest.mark.parametrize("reason", ["flag", "small", "failure"])
def test_what_is_stated_stands_where_nothing_is_measured(reason, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr(orders, "ColdClock", fail)
    if reason == "flag":
        monkeypatch.setenv("SEDAC_MEASURE_COSTS", "0")
    elif reason == "small":
        monkeypatch.setattr(costs, "LEAST_WEIGHTS", 1 << 20)
    assert not by_columns(STATED_LEAST - 1, low())
    assert by_columns(STATED_LEAST, low())
    assert ("could not be measured: no memory" in caplog.text) == (reason == "failure")


@torch.no_grad()
@pytest.mark.parametrize("tokens", [5, 33, 200])
def test_a_true_measurement_changes_rounding_alone(tokens):
    weights = low(bias=True)
    x = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    cut = site_cut([4] * tokens, even_points(40))
    y = cut_ffn(x, weights, cut)
    torch.testing.assert_close(torch.rand(3), wanted, rtol=0, atol=0)
    assert_as_good_as_plain(y, x, weights, cut)
    torch.testing.assert_close(cut_ffn(x, weights, cut), y, rtol=0, atol=0)
