"""Decoders of experts, wrapped: rows alone and in batches, kernels, graphs, figures, files, calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoTokenizer

from sedac_hf import SedacForCausalLM, demo_path
from sedac_hf.evaluation import stdlib_documents
from sedac_hf.ops.compiled import available
from tests.families import build
from tests.ffn.test_experts import OWN_FORWARD, SHARED
from tests.moe_demo import moe_of_demo
from tests.policies import random_policy
from tests.test_invariants import CUTS, nothing_left

TYPES = ["mixtral", "gpt_oss", "nemotron_h", "deepseek_v3", *OWN_FORWARD, *SHARED]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "consistent": True}


def wrapped(model_type: str, cut: str) -> tuple[SedacForCausalLM, dict[str, torch.Tensor]]:
    base, inputs = build(model_type)
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, cut))
    return model, inputs


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(model_type, cut):
    model, inputs = wrapped(model_type, cut)
    ids = inputs["input_ids"][:1, :7]
    alone = model(ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    padded = torch.cat((torch.zeros(1, 3, dtype=ids.dtype), ids), dim=1)
    batch = torch.cat((padded, inputs["input_ids"][1:, :10]))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    got = model(batch, attention_mask=mask).logits[0, -1]
    spread = alone.std()
    assert (got - alone).abs().mean() < 2e-3 * spread


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_decoding_goes_as_masking_does_and_full_width_as_the_base(model_type, cut):
    model, inputs = wrapped(model_type, cut)
    ids = inputs["input_ids"][:1]
    got = model.generate(ids, **GREEDY)
    model.runtime.engine = "reference"
    assert torch.equal(model.generate(ids, **GREEDY), got)
    model.runtime.engine = "auto"
    with model.full_width():
        whole = model.generate(ids, **GREEDY)
    with model.disable():
        assert torch.equal(model.generate(ids, **GREEDY), whole)
    again = copy.deepcopy(model)
    assert torch.equal(again.generate(ids, **GREEDY), got)


@pytest.mark.skipif(not available(), reason="the compiled module is not installed")
@torch.no_grad()
def test_a_decode_step_reads_what_its_experts_use():
    model, inputs = wrapped("mixtral", "select")
    past = model(inputs["input_ids"][:1], use_cache=True).past_key_values
    model.reset_stats()
    step = inputs["input_ids"][:1, :1]
    got = model(step, past_key_values=copy.deepcopy(past)).logits
    stats = model.stats()
    assert stats.saved_bytes_share == pytest.approx(1 - stats.needed_bytes_share, abs=0.1)
    model.runtime.engine = "reference"
    expected = model(step, past_key_values=copy.deepcopy(past)).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))


@torch.no_grad()
def test_shares_count_the_experts_of_each_token():
    model, inputs = wrapped("mixtral", "truncate")
    levels = []
    with model.runtime.observe(on_decision=lambda idx, ratio, chosen: levels.append(chosen.copy())):
        model(**inputs)
    runtime, n = model.runtime, inputs["input_ids"].numel()
    needed = whole = 0.0
    for i, (site, segment) in enumerate(zip(runtime.sites, runtime.segments, strict=True)):
        points = runtime.policy.schedule.points[i]
        used = [points[1].width] * n if segment < 0 else [points[level].width for level in levels[segment]]
        matrices, experts = 3 * site.hidden_size, site.experts.top_k
        compensation = runtime.policy.compensation[i]
        chosen = [1] * n if segment < 0 else levels[segment]
        needed += experts * matrices * sum(used) + sum(compensation.parameters(int(level)) for level in chosen)
        whole += experts * matrices * site.intermediate_size * n
    probes = len(runtime.checkpoint_layers) * runtime.probes.parameters_per_token * n
    assert model.stats().needed_bytes_share == pytest.approx((needed + probes) / whole, rel=1e-6)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", ["mixtral", *OWN_FORWARD, *SHARED])
@torch.no_grad()
def test_a_policy_of_experts_is_saved_and_loaded(model_type, cut, tmp_path):
    model, inputs = wrapped(model_type, cut)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "saved")
    again = SedacForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    torch.testing.assert_close(again(**inputs).logits, expected)
    base, _ = build(model_type)
    restored = again.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("model_type", ["mixtral", *OWN_FORWARD, *SHARED])
@torch.no_grad()
def test_an_observer_is_shown_each_token_with_each_of_its_experts(model_type):
    base, inputs = build(model_type)
    runtime = SedacForCausalLM.from_base(base).runtime
    sites = {i: site for i, site in enumerate(runtime.sites) if site.experts is not None}
    rows: dict[int, int] = {}
    got: dict[int, torch.Tensor] = {}
    expected: dict[int, torch.Tensor] = {}

    def on_expert(i: int, expert: int, x: torch.Tensor, h: torch.Tensor, weights: torch.Tensor) -> None:
        y = sites[i].experts.project(expert, h) * weights[:, None]
        got[i] = got.get(i, 0) + y.sum(0)
        rows[i] = rows.get(i, 0) + len(x)

    hooks = [
        site.owner.register_forward_hook(
            lambda _m, _a, y, i=i: expected.__setitem__(i, y.reshape(-1, y.shape[-1]).sum(0))
        )
        for i, site in sites.items()
    ]
    with runtime.observe(on_expert=on_expert):
        base(**inputs)
    for hook in hooks:
        hook.remove()
    assert rows == {i: site.experts.top_k * inputs["input_ids"].numel() for i, site in sites.items()}
    for i, site in sites.items():
        bias = getattr(site.owner, "bias", None)
        added = 0 if bias is None else inputs["input_ids"].numel() * bias
        torch.testing.assert_close(got[i] + added, expected[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", *SHARED])
@torch.no_grad()
def test_experts_that_are_offloaded_under_a_policy_are_cut_as_before(model_type):
    model, inputs = wrapped(model_type, "truncate")
    expected = model(**inputs).logits
    cpu_offload(model.model, torch.device("cpu"))
    assert (model(**inputs).logits - expected).abs().mean() < 1e-4 * expected.std()


@torch.no_grad()
def test_a_graph_runs_experts_whole():
    model, inputs = wrapped("qwen2_moe", "truncate")
    ids = inputs["input_ids"][:1]
    model.reset_stats()
    model.generate(ids, cache_implementation="static", **GREEDY)
    stats = model.stats()
    assert stats.fail_safe == 0
    assert 0 < stats.needed_bytes_share < 1


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_calibration_reaches_a_share(objective):
    model = SedacForCausalLM.from_base(moe_of_demo())
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    texts = [document.text for document in stdlib_documents("heldout")][:12]
    report = model.calibrate(
        tokenizer, texts, share=0.7, objective=objective, context=128, fit_tokens=2048, held_out_tokens=2048,
        progress=False,
    )  # fmt: skip
    assert report.needed_bytes == pytest.approx(0.7, abs=0.02)
    assert report.ppl_increase < 0.05, "cutting by worth must harm little"
    base = model.unload()
    assert nothing_left(base)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
