"""How the weights lie follows what a call does; nothing else changes by it, and nothing moves under a reader."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.ops.compiled import available
from sedac_hf.runtime import decode_linears, timed_calls
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")

OPTIONS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ["llama", "gpt2", "mixtral"]


@pytest.fixture(autouse=True)
def _small_linears_too(monkeypatch):
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(timed_calls, "SECONDS", 0.0)


def wrapped(family: str = "llama") -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model(family))
    model.install(random_policy(model.runtime, "select"))
    return model


def by_units(model: SedacForCausalLM) -> list[bool]:
    """Of each FFN: whether its weights lie otherwise than they came."""
    return [any(not p.is_contiguous() for p in site.owner.parameters()) for site in model.runtime.sites]


def have_times(monkeypatch, cut: float, whole: float = 1.0) -> None:
    """Let measurements say that one way takes so long, and the other."""

    def give(calls, device):
        for call in calls:
            call()
        return [whole, cut] if len(calls) == 2 else [0.0]

    monkeypatch.setattr(timed_calls, "interleaved", give)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_cuts_nothing_has_them_as_they_came(family, monkeypatch):
    base = tiny_model(family)
    before = {name: (p.clone(), p.stride()) for name, p in base.named_parameters()}
    model, ids = wrapped(family), token_ids(1, 4)
    assert all(by_units(model)), "a policy is in force"
    have_times(monkeypatch, cut=1.0)
    model.generate(ids, **OPTIONS)
    assert not any(by_units(model))
    model(ids)
    assert all(by_units(model)), "a plain call cuts"
    have_times(monkeypatch, cut=0.1)
    model.generate(token_ids(2, 4), **OPTIONS)
    assert all(by_units(model))
    with model.full_width():
        model.generate(ids, **OPTIONS)
        assert not any(by_units(model))
    model.generate(ids, consistent=True, **OPTIONS)
    assert all(by_units(model))
    base = model.unload()
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.stride() == before[name][1]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_what_comes_out_does_not_depend_on_what_ran_before(family, monkeypatch):
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped(family), token_ids(1, 3)
    with model.disable():
        dense = model.generate(ids, **OPTIONS)
    plain, cut = model(ids).logits, model.generate(ids, consistent=True, **OPTIONS)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **OPTIONS), dense), "at full width, by usual weights"
        assert torch.equal(model.generate(ids, consistent=True, **OPTIONS), cut)
        model.generate(ids, **OPTIONS)
        assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
def test_whole_and_cut_are_timed_on_ffns_that_lie_as_each_of_them_wants(monkeypatch):
    model, seen = wrapped(), []

    def look(calls, device):
        seen.append(by_units(model))
        return [1.0] * len(calls)

    monkeypatch.setattr(timed_calls, "interleaved", look)
    model.generate(token_ids(1, 4), **OPTIONS)
    governed = [i for i, segment in enumerate(model.runtime.segments) if segment >= 0]
    halves = [lies for lies in seen if {lies[i] for i in governed} == {False, True}]
    assert halves, "both layouts stood side by side"
    assert not any(by_units(model)), "and then what was chosen"


@torch.no_grad()
def test_nothing_moves_while_somebody_reads(monkeypatch):
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped(), token_ids(1, 4)
    lay: list[list[bool]] = []

    def generate_elsewhere(*_):
        handle.remove()
        worker = threading.Thread(target=lambda: model.generate(ids, **OPTIONS), daemon=True)
        worker.start()
        worker.join(60)
        assert not worker.is_alive()
        lay.append(by_units(model))

    handle = model.model.get_input_embeddings().register_forward_hook(generate_elsewhere)
    model(ids)
    assert lay == [[True] * len(model.runtime.sites)], "a forward pass was under way"
    model.generate(ids, **OPTIONS)
    assert not any(by_units(model))


def test_an_interrupted_pass_reads_no_longer(monkeypatch):
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped(), token_ids(1, 4)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.get_input_embeddings().register_forward_hook(interrupt)
    for call in (lambda: model(ids), lambda: model.generate(ids, **OPTIONS)):
        with pytest.raises(KeyboardInterrupt):
            call()
    handle.remove()
    with torch.no_grad():
        model(ids)
        assert model.runtime.arrangement._readers == 0
        model.generate(ids, **OPTIONS)
    assert not any(by_units(model))


@torch.no_grad()
def test_threads_that_want_it_otherwise_do_not_hurt_each_other(monkeypatch):
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped(), token_ids(1, 4)
    expected = [model.generate(ids, **OPTIONS), model.generate(ids, consistent=True, **OPTIONS)]
    wrong: list[int] = []

    def work(consistent: bool) -> None:
        for _ in range(15):
            if not torch.equal(model.generate(ids, consistent=consistent, **OPTIONS), expected[consistent]):
                wrong.append(consistent)

    workers = [threading.Thread(target=work, args=(consistent,)) for consistent in (False, True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert model.runtime.arrangement._readers == 0


@torch.no_grad()
def test_a_copy_moves_its_own_weights(monkeypatch):
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped(), token_ids(1, 4)
    other = copy.deepcopy(model)
    expected = model(ids).logits
    other.generate(ids, **OPTIONS)
    assert all(by_units(model))
    assert not any(by_units(other))
    assert torch.equal(other(ids).logits, expected)


@torch.no_grad()
def test_old_memory_is_let_go(monkeypatch):
    """A kernel that is remembered may hold what the weights were: a second copy of them."""
    have_times(monkeypatch, cut=1.0)
    model, ids = wrapped("gpt2"), token_ids(1, 1)
    model(ids)
    kernels = [weakref.ref(model.runtime.weights.kernel(i)) for i in range(len(model.runtime.sites))]
    assert all(kernel() is not None for kernel in kernels)
    model.generate(ids, **OPTIONS)
    gc.collect()
    assert all(kernel() is None for kernel in kernels)


def replaced(model: SedacForCausalLM) -> int:
    """Modules of the base whose forward is not their class's."""
    return sum("forward" in module.__dict__ for module in model.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_forwards_with_nothing_to_do_are_put_aside(family, monkeypatch):
    """In a call at full width by torch; they are back before anything else runs."""
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [2.0, 2.0 - len(calls) / 2][: len(calls)])
    model, ids = wrapped(family), token_ids(1, 4)
    everything, cut = replaced(model), model(ids).logits
    with model.disable():
        dense = model.generate(ids, **OPTIONS)
    assert torch.equal(model.generate(ids, **OPTIONS), dense)
    assert replaced(model) == 0, "kernels are slower everywhere"
    assert model.stats().needed_bytes_share < 1.0, "of the plain call"
    assert torch.equal(model(ids).logits, cut)
    assert replaced(model) == everything
    model.generate(ids, **OPTIONS)
    assert replaced(model) == 0
    model.generate(ids, consistent=True, **OPTIONS)
    assert replaced(model) == everything
    model.generate(ids, **OPTIONS)
    base = model.unload()
    assert not any("forward" in module.__dict__ for module in base.modules())


@torch.no_grad()
def test_a_cut_call_beside_a_whole_one_finds_its_forwards(monkeypatch):
    """Also if they were put aside after it began, but before its first pass."""
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [2.0, 2.0 - len(calls) / 2][: len(calls)])
    model, ids = wrapped(), token_ids(1, 4)
    everything, cut = replaced(model), model(ids).logits
    with model.disable():
        dense = model.generate(ids, **OPTIONS)
    seen: list[int] = []
    model.generate(ids, **OPTIONS)
    assert replaced(model) == 0

    def plain_call(*_):
        handle.remove()
        worker = threading.Thread(
            target=lambda: seen.append(bool(torch.allclose(model(ids).logits, cut, atol=1e-5))), daemon=True
        )
        worker.start()
        worker.join(60)
        seen.append(replaced(model))

    handle = model.model.get_input_embeddings().register_forward_hook(plain_call)
    assert torch.equal(model.generate(ids, **OPTIONS), dense)
    assert seen[-2:] == [True, everything]


@torch.no_grad()
def test_modules_that_are_offloaded_meanwhile_are_cut_again(monkeypatch):
    """Accelerate's hook takes the module's own forward for what it runs; ours goes in its place."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [2.0, 2.0 - len(calls) / 2][: len(calls)])
    model, ids = wrapped(), token_ids(1, 4)
    cut = model(ids).logits
    model.generate(ids, **OPTIONS)
    assert replaced(model) == 0
    accelerate.cpu_offload(model.model)
    model.reset_stats()
    torch.testing.assert_close(model(ids).logits, cut, rtol=1e-4, atol=1e-4)
    assert model.stats().needed_bytes_share < 1.0
