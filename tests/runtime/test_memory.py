"""The cap on what lies beside the base: counted right, kept at calibration, enforced on loading."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.calibration.importance import Compensator, _rank
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.memory import base_bytes, shadow_bits_within, shadow_bytes
from tests.policies import N_LEVELS, random_policy
from tests.tiny_models import tiny_model, token_ids

FAMILIES = ["llama", "gpt2", "opt"]


def wrapped(family: str, share: float, dtype: torch.dtype = torch.float32) -> SedacForCausalLM:
    return SedacForCausalLM.from_base(tiny_model(family, dtype=dtype), SedacConfig(extra_memory=share))


@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_held_is_what_is_counted(family, dtype, cut):
    model = wrapped(family, 1.0, dtype)
    policy = random_policy(model.runtime, cut)
    model.install(policy)
    model(token_ids())
    use = model.runtime.memory()
    assert use.base == base_bytes(model.model) == sum({p.data_ptr(): p.nbytes for p in _held(model.model)}.values())
    shadows = [item for item in model.runtime.weights.shadows if item is not None]
    tensors = [[s.deciding.codes, s.deciding.scales, s.unit_norm, s.bias] for s in shadows]
    assert use.shadow == sum(t.nbytes for row in tensors for t in row if t is not None)
    like = torch.zeros(1, dtype=dtype)
    assert use.compensation == sum(_compensation_bytes(item, like) for item in policy.compensation)
    assert use.probes == sum(p.nbytes for p in policy.probes.parameters())
    assert use.channel_order == (0 if policy.channel_order is None else sum(o.nbytes for o in policy.channel_order))
    assert use.extra == use.shadow + use.compensation + use.probes + use.channel_order
    assert model.stats().memory == use.to_dict()
    model.uninstall()
    assert model.runtime.memory().extra == 0


def _held(model):
    return [*model.parameters(), *model.buffers()]


def _compensation_bytes(item: LevelCompensation, like: torch.Tensor) -> int:
    """Each tensor that the object refers to, once, after every level was used."""
    item.bias(like)
    for level in range(N_LEVELS):
        item.low_rank(level, like)
    placed = [t for value in item._placed.values() for t in (value if isinstance(value, tuple) else (value,))]
    pairs = [t for pair in item._low_rank.values() for t in pair]
    return sum({t.data_ptr(): t.nbytes for t in [item._bias, *pairs, *placed]}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_are_held_once_and_saved_as_they_came(dtype):
    pair = torch.randn(6, 2).bfloat16(), torch.randn(2, 8).bfloat16()
    compensation = LevelCompensation(None, {1: pair}, 2)
    u, v = compensation.low_rank(1, torch.zeros(1, dtype=dtype))
    assert u.dtype == v.dtype == dtype
    assert compensation.low_rank(1, torch.zeros(1, dtype=dtype))[0] is u
    assert not compensation._placed
    assert compensation.bytes_in(dtype) == u.nbytes + v.nbytes
    saved = compensation.to_tensors("")
    assert torch.equal(saved["1.u"], pair[0])
    assert torch.equal(saved["1.v"], pair[1])
    assert saved["1.u"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_most_bits_that_fit(family):
    sites = SedacRuntime(tiny_model(family)).sites
    sizes = {bits: shadow_bytes(sites, bits) for bits in (4, 3, 2)}
    assert sizes[4] > sizes[3] > sizes[2]
    for bits, size in sizes.items():
        assert sum(Shadow.build(site, bits).held_bytes for site in sites) == size
        assert shadow_bits_within(sites, size) == bits
        assert shadow_bits_within(sites, size - 1) == (bits - 1 if bits > 2 else 0)


@pytest.mark.parametrize("bits", [4, 3, 2, 0])
@torch.no_grad()
def test_a_policy_keeps_the_bits_it_was_made_with(bits, tmp_path):
    model = wrapped("llama", 1.0)
    model.model.save_pretrained(tmp_path / "base")
    model = SedacForCausalLM.from_pretrained(tmp_path / "base", sedac_config=SedacConfig(extra_memory=1.0))
    model.install(replace(random_policy(model.runtime, "select"), shadow_bits=bits))
    logits = model(token_ids()).logits
    assert {type(item) for item in model.runtime.weights.shadows} == {Shadow if bits else ExactGate}
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    again = SedacForCausalLM.from_pretrained(tmp_path / "adapter")
    assert again.config.shadow_bits == bits
    assert torch.equal(again(token_ids()).logits, logits)


@torch.no_grad()
def test_a_shadow_without_room_gives_way_to_the_exact_gate(monkeypatch):
    logging.warning_once.cache_clear()
    said: list[str] = []
    logger = logging.get_logger("sedac_hf.runtime.memory")
    monkeypatch.setattr(logger, "warning", lambda text, *_, **__: said.append(text))
    roomy = wrapped("llama", 1.0)
    policy = random_policy(roomy.runtime, "select", compensate=False)
    tables = ProbeBank.bytes_of(64, 8, 3) / base_bytes(roomy.model)
    tight = wrapped("llama", tables + 0.001)
    tight.install(policy)
    assert {type(item) for item in tight.runtime.weights.shadows} == {ExactGate}
    assert tight.runtime.memory().extra <= tight.runtime.memory().cap
    assert len(said) == 1
    assert "exact gates decide" in said[0]
    assert "extra_memory" in said[0]
    roomy.install(replace(policy, shadow_bits=0))
    assert torch.equal(tight(token_ids()).logits, roomy(token_ids()).logits)


def test_tables_without_room_are_refused_and_nothing_moves():
    model = wrapped("llama", 0.01)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"must fit into 0\.01 of the base's .* raise `extra_memory`"):
        model.install(random_policy(model.runtime, "truncate"))
    assert model.runtime.policy is None
    assert not model.runtime.attached
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_rank_fits_whatever_the_widths(share, dtype):
    runtime = SedacRuntime(tiny_model("llama", dtype=dtype), extra_memory=share)
    sizes = [site.intermediate_size for site in runtime.sites]
    identity = [torch.eye(f) for f in sizes]
    statistics = SimpleNamespace(mean=[torch.ones(f) for f in sizes], moment=[2 * eye + 1 for eye in identity])
    reserved = ProbeBank.bytes_of(64, 8, 3)
    rank = _rank(runtime, statistics, N_LEVELS, reserved)
    assert 0 <= rank <= 4
    assert (rank > 0) == (share > 0.05)
    compensator = Compensator(runtime, statistics, tuple(torch.arange(f) for f in sizes), rank)
    widths = dict(zip(range(1, N_LEVELS), range(sizes[0] - 7, sizes[0]), strict=True))
    held = [compensator(i, widths, N_LEVELS).bytes_in(dtype) for i in range(len(sizes))]
    if rank:
        assert sum(held) + 8 * sum(sizes) + reserved <= runtime.memory().cap


@torch.no_grad()
def test_down_is_read_in_natural_order_whatever_is_in_place():
    runtime = SedacRuntime(tiny_model("gpt2", dtype=torch.bfloat16))
    before = runtime.weights.natural_down(2)
    assert torch.equal(before, runtime.sites[2].parts()[2].float())
    generator = torch.Generator().manual_seed(0)
    runtime.weights.reorder([torch.randperm(site.intermediate_size, generator=generator) for site in runtime.sites])
    assert not torch.equal(runtime.sites[2].parts()[2].float(), before)
    assert torch.equal(runtime.weights.natural_down(2), before)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "0.1", True])
def test_a_share_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"extra_memory.*0\.1"):
        SedacConfig(extra_memory=value)
    with pytest.raises(ConfigError, match="extra_memory"):
        SedacRuntime(tiny_model("llama"), extra_memory=value)


def test_the_summary_names_the_bytes(capsys):
    model = wrapped("llama", 1.0)
    model.install(random_policy(model.runtime, "select"))
    model.print_summary()
    out = " ".join(capsys.readouterr().out.split())
    for part in ("base", "shadow", "compensation", "probes", "channel orders"):
        assert part in out
    assert "MiB" in out
