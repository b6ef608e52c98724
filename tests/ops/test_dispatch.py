"""Which engine runs, what is refused, and that all engines give what the definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.errors import ConfigError
from sedac_hf.ops import ENGINES, OperatingPoint, cut_ffn
from tests.cut_cases import (
    Recorder,
    assert_as_good_as_plain,
    even_points,
    masked,
    random_weights,
    relative_error,
    site_cut,
)

D, F = 16, 40


def importance(x):
    """Any function of the token alone."""
    return (x.float() @ torch.linspace(-1, 1, D * F).view(D, F)).abs()


@pytest.mark.parametrize(
    ("levels", "chooses", "engine", "expected"),
    [
        ([3, 5], False, "auto", "strips"),
        ([3, 5], True, "auto", "masked"),
        ([3], True, "auto", "gather"),
        ([3], False, "auto", "strips"),
        ([8, 8], True, "auto", "strips"),  # the whole FFN chooses nothing
        ([3], True, "reference", "reference"),
        ([3, 5], True, "gather", "masked"),  # an engine that can't give the result is not forced
        ([3, 5], True, "strips", "masked"),
        ([3, 5], False, "masked", "masked"),
    ],
)
def test_engine(levels, chooses, engine, expected):
    record = Recorder()
    points = even_points(F, 2.0 if chooses else 0.0)
    cut = site_cut(levels, points, importance=importance, engine=engine, record=record)
    x = torch.randn(len(levels), D, generator=torch.Generator().manual_seed(0))
    weights = random_weights(D, F)
    assert relative_error(cut_ffn(x, weights, cut), masked(x, weights, cut)) < 1e-5
    assert [call["engine"] for call in record.calls] == [expected]


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.integers(0, 8), min_size=0, max_size=20),
    widths=st.lists(st.integers(0, F), min_size=9, max_size=9),
    mins=st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=9, max_size=9),
    engine=st.sampled_from(["auto", *ENGINES]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    gated=st.booleans(),
)
def test_every_engine_follows_the_definition(levels, widths, mins, engine, dtype, gated):
    """Widths need not even be monotone in the level."""
    points = tuple(OperatingPoint(w, m) for w, m in zip(widths, mins, strict=True))
    record = Recorder()
    cut = site_cut(levels, points, importance=importance, engine=engine, record=record)
    x = torch.randn(len(levels), D, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = random_weights(D, F, gated=gated, dtype=dtype)
    assert_as_good_as_plain(cut_ffn(x, weights, cut), x, weights, cut)
    used = 0
    for token, level in enumerate(levels):
        width, least = points[level] if level else (0, 0.0)
        used += int((importance(x)[token, :width] >= torch.tensor(least)).sum())
    (call,) = record.calls
    assert call["tokens"] == len(levels)
    assert call["needed"] == used
    assert call["needed"] <= call["computed"] <= len(levels) * F
    assert call["read"] <= F


def test_level_zero_is_the_bias_alone():
    weights = random_weights(D, F)
    x = torch.randn(2, D)
    for levels in ([0, 0], [0, 8]):
        y = cut_ffn(x, weights, site_cut(levels, even_points(F)))
        torch.testing.assert_close(y[0], weights.down_bias)
    y = cut_ffn(x, random_weights(D, F, bias=False), site_cut([0, 0], even_points(F)))
    assert torch.equal(y, torch.zeros(2, D))


def test_a_broken_token_stays_visible():
    """NaN in x must give NaN out where units are chosen by importance, and touch nobody else."""
    weights = random_weights(D, F)
    x = torch.randn(3, D)
    x[1] = float("nan")
    for levels in ([4, 4, 4], [4, 2, 8]):
        y = cut_ffn(x, weights, site_cut(levels, even_points(F, 2.0), importance=importance))
        assert y[1].isnan().all()
        assert not y[[0, 2]].isnan().any()


def test_refusals_say_what_was_got():
    weights, x = random_weights(D, F), torch.ones(2, D)
    with pytest.raises(ConfigError, match=r"\[3, hidden\].*\[2, 16\]"):
        cut_ffn(x, weights, site_cut([1, 1, 1], even_points(F)))
    with pytest.raises(ConfigError, match="no `importance`"):
        cut_ffn(x, weights, site_cut([1, 1], even_points(F, 1.0)))
    with pytest.raises(ConfigError, match="'warp'"):
        cut_ffn(x, weights, site_cut([1, 1], even_points(F), engine="warp"))
    cut = site_cut([1, 1], even_points(F))
    with pytest.raises(ConfigError, match="got 3 points"):
        cut_ffn(x, weights, type(cut)(cut.points[:3], cut.plan, None, None, "auto", Recorder()))
