"""One FFN as a graph runs it against the masking reference, for every level in one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sedac_hf.ops import SiteCut, cut_ffn
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.captured.sites import CapturedSite
from tests.policies import N_LEVELS, random_policy
from tests.tiny_models import tiny_model


def setting(family, cut, compensate):
    runtime = SedacRuntime(tiny_model(family))
    policy = random_policy(runtime, cut, compensate=compensate)
    if cut == "select":
        runtime.build_shadows()
    i = next(i for i, segment in enumerate(runtime.segments) if segment >= 0)
    compensation = policy.compensation[i] if compensate else None
    captured = CapturedSite(runtime.sites[i], policy.schedule.points[i], runtime.weights.shadows[i], compensation)
    levels = np.random.default_rng(0).permutation(np.arange(3 * (N_LEVELS + 1)) % (N_LEVELS + 1)).astype(np.uint8)
    x = torch.randn(levels.size, runtime.hidden_size, generator=torch.Generator().manual_seed(1))
    reference = SiteCut(
        points=policy.schedule.points[i],
        plan=LevelPlan.of(levels, N_LEVELS),
        importance=runtime.weights.importance(i),
        compensation=compensation,
        engine="reference",
        record=lambda **_: None,
    )
    return runtime.sites[i], captured, x, torch.from_numpy(levels.astype(np.int32)), reference


@torch.no_grad()
@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_whole_call_is_the_reference(family, cut, compensate):
    site, captured, x, levels, reference = setting(family, cut, compensate)
    expected_operator = "" if compensate else {"truncate": "truncated_ffn", "select": "selected_ffn"}[cut]
    assert captured.operator == expected_operator
    assert (captured.cuts, captured.selects) == (True, cut == "select")
    skips = [captured.skips(rows, "cuda") for rows in (1, 4, 5)]
    assert skips == [not compensate, not compensate, not compensate and cut == "truncate"]
    assert not captured.skips(1, "cpu")
    expected = cut_ffn(x, site.weights(), reference)
    torch.testing.assert_close(captured.run(x, levels), expected, rtol=1e-5, atol=1e-5)
    assert (expected - site.owner(x)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("cut", ["truncate", "select"])
def test_masking_in_front_of_down_is_the_reference(cut):
    site, captured, x, levels, reference = setting("llama", cut, True)
    h = captured.mask(site.weights().hidden(x), levels, x, None)
    got = captured.compensated(site.down(h), h, levels)
    torch.testing.assert_close(got, cut_ffn(x, site.weights(), reference), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("cut", ["truncate", "select"])
def test_a_whole_ffn_by_its_operator(cut, rows):
    """Also of more rows than kernels take: a model may hand an FFN other rows than a call has tokens."""
    site, captured, _, _, _ = setting("llama", cut, False)
    x = torch.randn(rows, site.hidden_size)
    torch.testing.assert_close(captured.run_whole(x), site.owner(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_whole_ffn_is_neither_masked_nor_compensated():
    site, captured, x, _, _ = setting("llama", "truncate", True)
    whole = torch.full((x.shape[0],), N_LEVELS, dtype=torch.int32)
    torch.testing.assert_close(captured.run(x, whole), site.owner(x), rtol=1e-5, atol=1e-5)
