"""Attaching and letting go: on plain modules, beside the hooks of others, and under accelerate's offloading."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from sedac_hf import SedacForCausalLM
from sedac_hf.ffn.shadow import ExactGate
from sedac_hf.runtime.forward_pass import closing_passes, current_pass
from sedac_hf.runtime.hooks import Attachment
from tests.policies import random_policy
from tests.test_invariants import nothing_left
from tests.tiny_models import tiny_model, token_ids


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, x):
        return self.second(self.first(x))


def doubled(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return 2 * nn.Linear.forward(linear, x)


def test_everything_is_undone():
    model, x, calls = Layers(), torch.ones(1, 3), []
    expected = model(x)
    attachment = Attachment()
    attachment.around_forward(model, lambda *_: calls.append("before"), lambda *_: calls.append("after"))
    attachment.after_forward(model.first, lambda *_: calls.append("first"))
    attachment.replace_forwards([(model.first, functools.partial(doubled, model.first))])
    assert not torch.equal(model(x), expected)
    assert calls == ["before", "first", "after"]
    attachment.detach()
    attachment.detach()
    assert torch.equal(model(x), expected)
    assert calls == ["before", "first", "after"]
    assert nothing_left(model)
    assert len(attachment) == 0


def test_the_after_hook_runs_when_the_forward_raises():
    model, calls = Layers(), []
    attachment = Attachment()
    attachment.around_forward(model, lambda *_: calls.append("before"), lambda *_: calls.append("after"))
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 5))
    assert calls == ["before", "after"]
    attachment.detach()


def test_a_forward_that_somebody_else_replaced_comes_back():
    model = Layers()
    theirs = functools.partial(doubled, model.first)
    model.first.forward = theirs
    attachment = Attachment()
    attachment.replace_forwards([(model.first, lambda x: x)])
    attachment.detach()
    assert model.first.forward is theirs


@torch.no_grad()
@pytest.mark.parametrize("cut", ["truncate", "select"])
def test_offloaded_weights_are_real_when_the_cut_runs(cut):
    ids = token_ids()
    resident = SedacForCausalLM.from_base(tiny_model("llama"))
    policy = random_policy(resident.runtime, cut)
    policy.channel_order = None  # offloaded weights cannot be permuted
    resident.install(policy)
    if cut == "select":  # no copy can be made of offloaded weights, so the exact gate decides
        resident.runtime.weights.shadows = [ExactGate(site) for site in resident.runtime.sites]
    expected = resident(ids).logits
    base = tiny_model("llama")
    cpu_offload(base, torch.device("cpu"))
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    offloaded = SedacForCausalLM.from_base(base)
    offloaded.install(policy)
    torch.testing.assert_close(offloaded(ids).logits, expected, rtol=1e-4, atol=2e-4)
    assert not {"strips", "gather"} & set(offloaded.stats().engines)
    offloaded.unload()
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(base(ids).logits, tiny_model("llama")(ids).logits)


@torch.no_grad()
def test_a_forward_that_was_interrupted_leaves_nothing_behind():
    """An interrupt is no `Exception`: the hook that would close the pass does not run."""
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "truncate"))
    expected = model(token_ids()).logits

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(token_ids())
    with pytest.raises(KeyboardInterrupt), closing_passes():
        model(token_ids(seed=1))
    hook.remove()
    assert torch.equal(model(token_ids()).logits, expected)
    assert current_pass.get() is None
