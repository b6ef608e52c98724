"""Quantised bases: what can be sliced is sliced, the rest is masked and says so; everything is undone bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig
from transformers.utils import logging

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import CalibrationError, UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, can_reorder
from sedac_hf.ffn.linears import norms, slices_of
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ops.contract import dense
from tests.policies import random_policy
from tests.quantised import quantised_model, stored, torchao_config
from tests.tiny_models import token_ids

WEIGHT_ONLY = ["int8", "float8"]
SLICED = [*WEIGHT_ONLY, "int8_dynamic"]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    ("kind", "prefix", "readable"),
    [("int8", True, True), ("float8", True, True), ("int8_dynamic", True, False), ("int8_groups", False, False)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_are_found_by_trying(kind, prefix, readable, dtype, tmp_path):
    for site in quantised_model("llama", kind, tmp_path, dtype).runtime.sites:
        assert {slices_of(linear) for linear in site.linears} == {(prefix, readable)}
        assert site.plain_forward == readable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", SLICED)
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
@torch.no_grad()
def test_truncating_equals_masking_and_saves(family, kind, dtype, tmp_path):
    model = quantised_model(family, kind, tmp_path, dtype)
    model.install(random_policy(model.runtime, "truncate"))
    ids = token_ids()
    points = [row[3] for row in model.runtime.policy.schedule.points]
    with model.runtime.forced(points):
        model.reset_stats()
        cut = model(ids).logits
        stats = model.stats()
        masked = _masked(model, ids, points)
    assert set(stats.engines) <= {"masked", "coupled"}
    units = sum(site.intermediate_size for site in model.runtime.sites)
    assert stats.saved_bytes_share == pytest.approx(1 - sum(point.width for point in points) / units)
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(cut, masked, rtol=tolerance, atol=tolerance)


def _masked(model, ids, points):
    """The definition: hidden units zeroed by a plain hook on each down, the model's own forwards otherwise."""
    model.runtime.detach()
    handles = []
    for site, point in zip(model.runtime.sites, points, strict=True):

        def zero(_, args, width=point.width):
            h = args[0].clone()
            h[..., width:] = 0
            return (h,)

        handles.append(site.down.register_forward_pre_hook(zero))
    try:
        return model.model(ids).logits
    finally:
        for handle in handles:
            handle.remove()
        model.runtime.attach()


@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("kind", SLICED)
@torch.no_grad()
def test_from_wrapping_to_unloading(kind, cut, tmp_path):
    model = quantised_model("llama", kind, tmp_path / "base")
    before, ids = stored(model.model), token_ids()
    reference = model(ids).logits
    model.install(random_policy(model.runtime, cut))
    logits = model(ids).logits
    assert (logits - reference).abs().max() > 1e-2
    stepwise = model.generate(ids, max_new_tokens=5, do_sample=False, consistent=True, prompt="cut")
    for length in range(ids.shape[1], stepwise.shape[1]):
        assert torch.equal(model(stepwise[:, :length]).logits[:, -1].argmax(-1), stepwise[:, length])
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    quantisation = TorchAoConfig(torchao_config(kind))
    again = SedacForCausalLM.from_pretrained(tmp_path / "adapter", quantization_config=quantisation)
    assert torch.equal(again(ids).logits, logits)
    base = model.unload()
    assert torch.equal(base(ids).logits, reference)
    after = stored(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
@torch.no_grad()
def test_a_full_save_is_in_natural_order(kind, tmp_path):
    model = quantised_model("llama", kind, tmp_path / "base")
    ids, before = token_ids(), stored(model.model)
    model.install(random_policy(model.runtime, "truncate"))
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(model(ids).logits, logits)
    again = SedacForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(again(ids).logits, logits)
    after = stored(again.unload())
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("kind", "decider"), [("int8", Shadow), ("float8", Shadow), ("int8_dynamic", ExactGate)])
def test_what_decides(kind, decider, tmp_path):
    model = quantised_model("llama", kind, tmp_path)
    model.install(random_policy(model.runtime, "select"))
    assert all(type(item) is decider for item in model.runtime.weights.shadows)


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_a_shadow_is_made_of_the_numbers_that_the_weights_stand_for(kind, tmp_path):
    site = quantised_model("llama", kind, tmp_path).runtime.sites[0]
    shadow = Shadow.build(site)
    gate, up, down = (dense(linear.weight) for linear in site.linears)
    torch.testing.assert_close(shadow.unit_norm, up.norm(dim=1) * down.norm(dim=0))
    error = (shadow.deciding.dequantized() - gate).norm() / gate.norm()
    assert 0.01 < float(error) < 0.15


@pytest.mark.parametrize("dim", [0, 1])
def test_norms_do_not_depend_on_the_part_made_dense(dim, monkeypatch):
    weight = torch.randn(37, 29, generator=torch.Generator().manual_seed(0))
    whole = norms(weight, dim)
    monkeypatch.setattr("sedac_hf.ffn.linears._NORM_CHUNK", 64)
    assert torch.equal(norms(weight, dim), whole)
    torch.testing.assert_close(whole, weight.norm(dim=dim))


def test_groups_along_the_units_are_not_permuted(tmp_path):
    model = quantised_model("llama", "int8_groups", tmp_path)
    site, before = model.runtime.sites[0], stored(model.model)
    assert not can_reorder(site)
    with pytest.raises(UnsupportedModelError, match=r"Int8Tensor.*latency"):
        apply_order(site, torch.arange(site.intermediate_size))
    with pytest.raises(UnsupportedModelError, match="latency"):
        model.install(random_policy(model.runtime, "truncate"))
    assert model.runtime.policy is None
    after = stored(model.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


@torch.no_grad()
def test_masking_says_once_that_nothing_is_saved(tmp_path, monkeypatch):
    logging.warning_once.cache_clear()
    said: list[str] = []
    model = quantised_model("llama", "int8_groups", tmp_path)
    monkeypatch.setattr(
        logging.get_logger("sedac_hf.ffn.coupled"), "warning", lambda text, *_, **__: said.append(text)
    )
    model.install(random_policy(model.runtime, "select"))
    model(token_ids())
    assert model.stats().engines.keys() == {"mask"}
    assert model.stats().saved_bytes_share <= 0
    model.uninstall()
    model.install(random_policy(model.runtime, "select"))
    assert len(said) == 1
    assert "saves nothing" in said[0]
    assert "Int8Tensor" in said[0]


def test_a_subclass_that_hides_another_map_is_no_slice(tmp_path):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert slices_of(nn.Linear(8, 8)) == (True, True)
    assert slices_of(Scaled(8, 8)) == (False, False)


def test_throughput_needs_weights_that_can_be_seen(tmp_path):
    from sedac_hf.calibration.importance import truncate_allocation

    model = quantised_model("llama", "int8_dynamic", tmp_path)
    with pytest.raises((UnsupportedModelError, CalibrationError), match="latency"):
        truncate_allocation(model.runtime, None, None, 8, 0, False)
