"""FFNs whose weights are tied between modules: each use is cut, the weights are prepared once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.sites import find_sites
from sedac_hf.runtime.memory import shadow_bytes
from tests.families import build
from tests.policies import random_policy


@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
def test_every_use_is_a_site(model_type: str) -> None:
    model = build(model_type)[0]
    uses = [name for name, module in model.named_modules() if name.endswith("feed_forward")]
    sites = find_sites(model).sites
    assert [site.name for site in sites] == uses
    assert len(uses) > 1
    assert all(site.origin in (None, *sites) for site in sites)
    assert any(site.origin is not None for site in sites)


@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("model_type", ["zamba", "zamba2"])
@torch.no_grad()
def test_cut_in_every_use_and_undone(model_type: str, cut: str) -> None:
    base, inputs = build(model_type)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    dense = base(**inputs).logits
    model = SedacForCausalLM.from_base(base)
    runtime = model.runtime
    model.install(random_policy(runtime, cut, compensate=False))
    model.reset_stats()
    cut_logits = model(**inputs).logits
    assert sum(model.stats().engines.values()) == len(runtime.sites)
    with model.full_width():
        torch.testing.assert_close(model(**inputs).logits, dense, rtol=1e-4, atol=2e-4)
    runtime.engine = "reference"
    effect = (cut_logits - dense).abs().mean()
    assert effect > 0
    assert (model(**inputs).logits - cut_logits).abs().mean() < 0.02 * effect
    with model.disable():
        assert torch.equal(model(**inputs).logits, dense)
    restored = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.state_dict().items())
    assert torch.equal(restored(**inputs).logits, dense)


def test_tables_are_made_once() -> None:
    runtime = SedacForCausalLM.from_base(build("zamba")[0]).runtime
    distinct = {id(site.origin or site) for site in runtime.sites}
    runtime.build_shadows(4)
    assert len({id(shadow) for shadow in runtime.weights.shadows}) == len(distinct) < len(runtime.sites)
    assert runtime.weights.shadow_bytes == shadow_bytes(runtime.sites, 4)
    kernels = [runtime.weights.kernel(i) for i in range(len(runtime.sites))]
    assert len({id(kernel) for kernel in kernels}) <= len(distinct)


def test_an_order_of_its_own_is_refused() -> None:
    runtime = SedacForCausalLM.from_base(build("zamba")[0]).runtime
    policy = random_policy(runtime, "truncate")
    orders = tuple(torch.arange(site.intermediate_size) for site in runtime.sites)
    with pytest.raises(ConfigError, match="must be None"):
        runtime.install(replace(policy, channel_order=orders))
    assert not runtime.attached
