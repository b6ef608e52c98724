"""Products with one column per token are as exact as those in the usual order, whole and cut alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.ops import cut_ffn, onednn
from sedac_hf.ops.activations import KNOWN
from sedac_hf.ops.strips import columns
from tests.cut_cases import N_LEVELS, Recorder, assert_as_good_as_plain, even_points, random_weights, site_cut
from tests.kernel_cases import laid_out

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def products_of_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has them on every machine, if slow ones on some: results are the same in kind."""
    monkeypatch.setattr(onednn, "has_products", lambda dtype: True)


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 2 * columns.PIECE + 3),
    level=st.integers(1, N_LEVELS),
    gated=st.booleans(),
    bias=st.booleans(),
    layout=st.sampled_from(["rows", "columns"]),
    activation=st.sampled_from(["silu", "gelu", "relu"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("dtype", LOW)
def test_an_ffn_of_one_width_is_what_masking_gives(dtype, rows, level, gated, bias, layout, activation, seed):
    weights = replace(
        laid_out(random_weights(24, 40, gated=gated, bias=bias, dtype=dtype, seed=seed), layout),
        activation=KNOWN[activation],
    )
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cut = site_cut([level] * rows, even_points(40))
    width = cut.points[level].width
    h = columns.hidden_by_columns(x, weights, width)
    y = columns.down_by_columns(h, weights)
    assert y.is_contiguous()
    assert h.shape == (rows, width)
    assert_as_good_as_plain(y, x, weights, cut)


@torch.no_grad()
@pytest.mark.parametrize("rows", [columns.LEAST_TOKENS - 1, columns.LEAST_TOKENS, columns.TILE, 512, 513])
@pytest.mark.parametrize("mixed", [False, True])
def test_strips_take_the_order_where_it_may_be_quicker(rows, mixed, monkeypatch):
    """Of one level up to so many tokens, mixed up to a tile of them, which run as wide as the widest."""
    ran: list[int] = []
    down = columns.down_by_columns
    monkeypatch.setattr("sedac_hf.ops.strips.engine.by_columns", lambda tokens, w: columns.may_pay(tokens, w.up))
    monkeypatch.setattr(
        "sedac_hf.ops.strips.engine.down_by_columns", lambda h, w: (ran.append(h.shape[1]), down(h, w))[1]
    )
    weights = random_weights(24, 40, dtype=torch.bfloat16)
    x = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    record = Recorder()
    cut = site_cut([4, 2, 4] * (rows // 3) + [4] * (rows % 3) if mixed else [4] * rows, even_points(40), record=record)
    y = cut_ffn(x, weights, cut)
    most = columns.TILE if mixed else columns.MOST_TOKENS
    assert ran == ([20] if columns.LEAST_TOKENS <= rows <= most else [])
    assert [call["engine"] for call in record.calls] == ["strips"]
    assert_as_good_as_plain(y, x, weights, cut)


def test_gradients_go_the_usual_way():
    weights = random_weights(24, 40, dtype=torch.bfloat16)
    x = torch.randn(columns.TILE, 24, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    cut_ffn(x, weights, site_cut([4] * columns.TILE, even_points(40))).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.abs().sum() > 0)
