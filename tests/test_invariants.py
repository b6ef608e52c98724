"""The invariants of the design, on several families and both cuts (tiny random decoders)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sedac_hf import SedacForCausalLM
from tests.policies import N_LEVELS, random_policy
from tests.tiny_models import FAMILIES, tiny_model, token_ids

CUTS = ["truncate", "select"]
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}


def wrapped(family: str, cut: str, **kwargs) -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model(family, **kwargs))
    model.install(random_policy(model.runtime, cut))
    return model


@pytest.fixture(params=[(family, cut) for family in FAMILIES for cut in CUTS], ids="-".join)
def model(request) -> SedacForCausalLM:
    return wrapped(*request.param)


@torch.no_grad()
def test_disabled_is_the_base_bit_for_bit(model):
    ids = token_ids()
    base = tiny_model(model.config.text_config.model_type)
    reference = base(ids).logits
    cut = model(ids).logits
    assert (cut - reference).abs().max() > 1e-2, "the policy cuts nothing that matters: the test would show nothing"
    with model.disable():
        assert torch.equal(model(ids).logits, reference)
    assert torch.equal(model(ids).logits, cut)


@torch.no_grad()
def test_full_width_is_the_base_to_rounding(model):
    ids = token_ids()
    base = tiny_model(model.config.text_config.model_type)
    with model.full_width():
        torch.testing.assert_close(model(ids).logits, base(ids).logits, **TOLERANCE)
        options = {"max_new_tokens": 8, "do_sample": False, "consistent": True}
        got = model.generate(ids, **options)
    options.pop("consistent")
    assert torch.equal(got, base.generate(ids, **options))


@torch.no_grad()
def test_the_cut_equals_masking_in_mixed_batches(model):
    ids = token_ids(4, 9)
    cut = model(ids).logits
    levels = levels_of(model, ids)
    assert len(set(levels.tolist())) > 2, "the batch must mix levels"
    model.runtime.engine = "reference"
    assert_same(model, ids, model(ids).logits, cut)


@torch.no_grad()
def test_the_cut_named_mask_is_the_reference_for_truncate():
    model, ids = wrapped("llama", "truncate"), token_ids(4, 9)
    expected = model(ids).logits
    model.install(replace(model.runtime.policy, cut="mask"))
    model.reset_stats()
    torch.testing.assert_close(model(ids).logits, expected, **TOLERANCE)
    assert set(model.stats().engines) == {"reference"}
    assert model.stats().saved_bytes_share <= 0


@torch.no_grad()
def test_adaptive_thresholds_follow_the_traffic_only_where_asked():
    model, ids = wrapped("llama", "truncate"), token_ids(4, 9)
    before = model.runtime.controller.thresholds
    model(ids)
    assert (model.runtime.controller.thresholds == before).all()
    model.runtime.adaptive_thresholds = True
    model(ids)
    assert (model.runtime.controller.thresholds != before).all()


@torch.no_grad()
def test_one_forward_equals_token_by_token_decoding(model):
    ids = token_ids(2, 10)
    whole = model(ids).logits
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert_same(model, ids, torch.cat(steps, dim=1), whole)


@torch.no_grad()
def test_a_left_padded_row_equals_the_row_alone(model):
    ids = token_ids(2, 8)
    padded = torch.cat((torch.zeros(2, 3, dtype=ids.dtype), ids), dim=1)
    mask = torch.cat((torch.zeros(2, 3, dtype=ids.dtype), torch.ones_like(ids)), dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kwargs = {} if model.config.text_config.model_type == "opt" else {"position_ids": positions}
    out = model(padded, attention_mask=mask, **kwargs).logits[:, 3:]
    for row in range(2):
        assert_same(model, ids, out[row], model(ids[row : row + 1]).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("adapter_only", [False, True])
def test_save_and_load_give_the_same_logits_and_levels(model, tmp_path, adapter_only):
    ids = token_ids()
    expected, expected_levels = model(ids).logits, levels_of(model, ids)
    family = model.config.text_config.model_type
    if adapter_only:
        tiny_model(family).save_pretrained(tmp_path / "base")
        model.model.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", adapter_only=adapter_only)
    assert torch.equal(model(ids).logits, expected), "saving changed the model"
    loaded = SedacForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=0)
    assert torch.equal(levels_of(loaded, ids), expected_levels)


@torch.no_grad()
def test_unload_gives_the_base_back(model):
    ids = token_ids()
    fresh = tiny_model(model.config.text_config.model_type)
    base = model.unload()
    assert type(base) is type(fresh)
    expected = fresh.state_dict()
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert nothing_left(base)
    assert torch.equal(base(ids).logits, fresh(ids).logits)


@torch.no_grad()
def test_an_exception_inside_the_forward_leaves_no_state(model):
    ids = token_ids()
    expected = model(ids).logits
    with pytest.raises(IndexError):
        model(torch.full_like(ids, 10**6))  # outside the vocabulary
    assert torch.equal(model(ids).logits, expected)
    assert nothing_left(model.unload())


@torch.no_grad()
def test_an_unusable_risk_runs_at_full_width_and_is_counted(model):
    ids = token_ids()
    for layer in model.runtime.checkpoint_layers:
        model.runtime.probes[layer].out.bias.fill_(float("nan"))
    model.reset_stats()
    assert set(levels_of(model, ids).tolist()) == {N_LEVELS}
    assert model.stats().fail_safe == ids.numel() * len(model.runtime.checkpoint_layers)


def assert_same(model: SedacForCausalLM, ids: torch.Tensor, got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to rounding; under `select` a unit at its threshold may fall on either side: a sliver of the effect."""
    if model.config.cut == "select":
        with model.full_width():
            full = model(ids).logits
        effect = (full - model(ids).logits).abs().mean()
        assert (got - expected).abs().mean() < 0.02 * effect
    else:
        torch.testing.assert_close(got, expected, **TOLERANCE)


def levels_of(model: SedacForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Levels [n_checkpoints x n_tokens] of one forward call, as the controller gave them."""
    controller, seen = model.runtime.controller, []
    plan = controller.plan

    class Watched:
        def __getattr__(self, name):
            return getattr(controller, name)

        def plan(self, levels):
            seen.append(torch.from_numpy(levels.copy()))
            return plan(levels)

    model.runtime._controller = Watched()
    try:
        model(ids)
    finally:
        model.runtime._controller = controller
    return torch.cat(seen)


def nothing_left(base: torch.nn.Module) -> bool:
    """Whether a model has no hooks and no replaced forwards."""
    return all(
        not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__
        for module in base.modules()
    )
