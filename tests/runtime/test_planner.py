"""What a ``generate`` call chooses: measured once, recorded, and without a say in anything else."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import ConfigError
from sedac_hf.ops import compiled
from sedac_hf.ops.compiled import MAX_ROWS
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.runtime import SedacRuntime, decode_linears, timed_calls
from tests.ffn.test_shadow import Opaque
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

needs_kernels = pytest.mark.skipif(not compiled.available(), reason="the compiled module is not installed")


@pytest.fixture
def model(monkeypatch) -> SedacForCausalLM:
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(timed_calls, "SECONDS", 0.0)
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "select"))
    return model


def measured(monkeypatch, times) -> list[int]:
    """Let measurements have these results; gives how many were made."""
    made: list[int] = []

    def give(calls, device):
        for call in calls:
            call()  # each alternative must run
        made.append(len(calls))
        return times(len(calls))

    monkeypatch.setattr(timed_calls, "interleaved", give)
    return made


def test_a_choice_is_measured_once_per_number_of_rows_and_recorded(model, monkeypatch):
    made = measured(monkeypatch, lambda n: [1.0] * n)
    for rows, fresh in ((1, True), (1, False), (2, True), (1, False)):
        made.clear()
        model.generate(token_ids(rows, 4), max_new_tokens=2)
        assert bool(made) == fresh
    choices = model.stats().choices
    assert sum(choices.values()) == 4
    assert {choice.partition(":")[0] for choice in choices} == {"full width"}
    assert any("at 2 row(s), measured" in choice for choice in choices)


@pytest.mark.parametrize(("times", "chosen"), [([1.0, 0.1], "cut"), ([1.0, 0.95], "full width")])
def test_cutting_must_pay(model, monkeypatch, times, chosen):
    measured(monkeypatch, lambda n: times if n == 2 else [0.0])
    model.generate(token_ids(1, 4), max_new_tokens=2)
    (choice,) = model.stats().choices
    assert choice.startswith(f"{chosen}: cutting")


def test_consistent_cuts_whatever_it_costs(model, monkeypatch):
    measured(monkeypatch, lambda n: [1.0, 9.0][:n])
    model.generate(token_ids(1, 4), max_new_tokens=4, consistent=True)
    assert model.stats().choices == {"cut: asked for": 1}
    assert model.stats().needed_bytes_share != 1.0
    bare = SedacForCausalLM.from_base(tiny_model("llama"))
    bare.generate(token_ids(1, 4), max_new_tokens=2)
    assert bare.stats().choices == {"full width: not calibrated": 1}


def test_what_is_compared_never_reads_the_layer_that_was_just_read():
    """It would find it in a cache, and win by that."""
    seen: list[int] = []
    layers = [[functools.partial(seen.append, i) for i in range(6)] for _ in range(2)]
    calls = timed_calls.in_turns(*layers)
    for _ in range(7):
        for call in calls:
            call()
    assert all(abs(a - b) in (2, 3, 4) for a, b in itertools.pairwise(seen))
    assert sorted(seen[:12:2]) == sorted(seen[1:12:2]) == list(range(6)), "each is timed on all"


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("kernels_win", [True, False])
def test_kernel_or_module_is_chosen_by_shape_and_rows(model, monkeypatch, kernels_win):
    """The faster one runs, for the number of rows that was measured; both give the same."""
    measured(monkeypatch, lambda n: [1.0, 2.0][:n] if kernels_win else [2.0, 1.0][:n])
    model.generate(token_ids(1, 4), max_new_tokens=2)
    shapes = {linear.shape for linear in model.runtime.decode_linears}
    assert len(shapes) > 2
    for shape in shapes:
        choice = model.runtime.kernel_choice
        assert choice.linear_by_kernel(shape, 1, kernel_threads()) is kernels_win
        assert choice.linear_by_kernel(shape, 3, kernel_threads()), "not measured: the kernel"
    with model.full_width():
        for rows, by_kernel in ((1, kernels_win), (3, True)):
            model.reset_stats()
            monkeypatch.setattr(model.runtime.kernel_choice, "_compare_kernels", lambda _: None)
            # Longer than a kernel's calls, so that steps alone can run by one.
            model.generate(token_ids(rows, MAX_ROWS + 1), max_new_tokens=3)
            assert ("rust, whole" in model.stats().engines) is by_kernel


@needs_kernels
@torch.no_grad()
def test_without_generate_or_consistent_nothing_goes_by_time(model, monkeypatch):
    """Times differ from run to run; where bits matter they must not have a say."""
    measured(monkeypatch, lambda n: [2.0, 1.0][:n])
    fresh = model(token_ids(1, 1)).logits
    model.generate(token_ids(1, 4), max_new_tokens=2)
    assert any(times.fastest() == "module" for times in model.runtime.kernel_choice._times.values())
    assert torch.equal(model(token_ids(1, 1)).logits, fresh)
    for forward in (
        lambda: model(token_ids(1, 1)),
        lambda: model.generate(token_ids(1, 5), max_new_tokens=3, consistent=True),
    ):
        with model.full_width():
            model.reset_stats()
            forward()
            assert "rust, whole" in model.stats().engines


def test_measuring_draws_no_random_numbers(model):
    """Sampling gives the same whether a call had to measure or not."""
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(model.generate(token_ids(1, 4), max_new_tokens=8, do_sample=True, consistent=True))
    assert torch.equal(*runs)


def test_without_the_compiled_module(monkeypatch):
    ids = token_ids(1, 3)
    with torch.no_grad():
        with_kernels = SedacForCausalLM.from_base(tiny_model("llama"))
        with_kernels.install(random_policy(with_kernels.runtime, "select"))
        expected = with_kernels(ids).logits
        monkeypatch.setattr(compiled, "module", None)
        assert not compiled.available()
        with pytest.raises(ConfigError, match=r"engine='rust'.*not installed.*engine='auto'"):
            SedacRuntime(tiny_model("llama"), engine="rust")
        model = SedacForCausalLM.from_base(tiny_model("llama"))
        model.install(random_policy(model.runtime, "select"))
        assert not model.runtime.decode_linears
        assert all(p.is_contiguous() for p in model.model.parameters())
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=2e-4)
        model.generate(ids, max_new_tokens=2)
        assert not any("rust" in engine for engine in model.stats().engines)


@needs_kernels
@torch.no_grad()
def test_an_engine_by_name_holds_from_the_next_call(model):
    ids = token_ids(1, 3)
    for engine, ran in (("auto", "rust"), ("reference", "reference"), ("rust", "rust")):
        model.runtime.engine = engine
        model.reset_stats()
        model(ids)
        assert ran in model.stats().engines


@needs_kernels
@torch.no_grad()
@pytest.mark.parametrize("cutting_wins", [True, False])
def test_a_prompt_is_cut_where_that_pays(monkeypatch, cutting_wins):
    """By default under `truncate`; asked for, for certain, or for few tokens it is never measured."""
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "truncate"))
    monkeypatch.setattr(model.runtime.planner, "_compare_widths", lambda rows: (True, "asked for"))
    asked: list[int] = []

    def timed(calls, device):
        asked.append(len(calls))
        return {1: [0.0], 2: [3.0, 1.0] if cutting_wins else [1.0, 3.0]}[len(calls)]

    monkeypatch.setattr(timed_calls, "interleaved", timed)
    monkeypatch.setattr(model.runtime.kernel_choice, "compare", lambda rows: None)
    monkeypatch.setattr(model.runtime.kernel_choice, "compare_many", lambda tokens: None)
    options = {"max_new_tokens": 1, "do_sample": False}  # the prompt's pass is the only one

    def cuts(tokens: int, **more) -> bool:
        model.reset_stats()
        model.generate(token_ids(1, tokens), **options, **more)
        return model.stats().needed_bytes_share < 1

    long = 2 * MAX_ROWS + 1
    assert cuts(long) is cutting_wins
    (choice,) = model.stats().choices
    assert ("prompt at full width: cutting does not pay" in choice) is not cutting_wins
    assert asked == [2, 1]
    assert cuts(long + 1) is cutting_wins, "known by now"
    assert cuts(4)
    assert cuts(long, prompt="cut")
    assert cuts(long, consistent=True)
    assert not cuts(long, prompt="full")
    assert asked == [2, 1]
    cuts(4 * MAX_ROWS)
    assert asked == [2, 1], "64 tokens as 33 of them"
    cuts(4 * MAX_ROWS + 1)
    assert asked == [2, 1] * 2


@torch.no_grad()
@pytest.mark.parametrize("length", [3, MAX_ROWS + 3])
def test_weights_that_cannot_be_seen_run_at_full_width_unless_asked(length):
    """As linears of some quantised bases, which keep their numbers under other names."""
    base, ids = tiny_model("llama"), token_ids(2, length)
    expected = base.generate(ids, max_new_tokens=3, do_sample=False)
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if name in ("gate_proj", "up_proj", "down_proj"):
                setattr(module, name, Opaque(child))
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, "select"))
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), expected)
    (choice,) = model.stats().choices
    assert "masking, which saves nothing" in choice
    model.reset_stats()
    model.generate(ids, max_new_tokens=3, do_sample=False, consistent=True)
    assert "mask" in model.stats().engines


def test_a_site_tells_device_and_dtype_also_where_its_weight_cannot_be_seen():
    site = SedacRuntime(tiny_model("llama")).sites[0]
    assert site.like is site.weight
    opaque = replace(site, down=Opaque(site.down.to(torch.float16)))
    assert opaque.like.dtype == torch.float16
    assert replace(site, down=torch.nn.Identity()).like.numel() == 0
