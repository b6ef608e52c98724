"""Short prompts by the compiled kernels, sixteen rows at a time, where that was measured to be quicker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ops import LevelPlan, SiteCut, compiled, cut_ffn, onednn
from sedac_hf.ops.compiled import MAX_ROWS, MOST_IN_TURNS, available, turns
from sedac_hf.ops.rust_linear import CpuLinear
from sedac_hf.ops.strips import columns
from sedac_hf.ops.threads import parallel_address
from sedac_hf.runtime import decode_linears, timed_calls
from tests.cut_cases import assert_as_good_as_plain
from tests.kernel_cases import own_threads
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

pytestmark = [
    pytest.mark.skipif(not available(), reason="the compiled module is not installed"),
    pytest.mark.skipif(not parallel_address(), reason="kernels have threads of their own here"),
]

OPTIONS = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = ["llama", "phi3", "gpt_neox", "gemma3_text"]


@pytest.fixture
def kernels_win(monkeypatch):
    """Let measurements say so; gives what is asked of the clock."""
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)
    made: list[int] = []

    def give(calls, device):
        for call in calls:
            call()
        made.append(len(calls))
        return [1.0, 2.0][: len(calls)]

    monkeypatch.setattr(timed_calls, "interleaved", give)
    return made


def wrapped(family: str = "llama", cut: str = "select") -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model(family))
    model.install(random_policy(model.runtime, cut))
    return model


@given(st.integers(1, 4 * MOST_IN_TURNS))
def test_turns_are_few_and_even(rows):
    ranges = turns(rows)
    assert [lo for lo, _ in ranges[1:]] == [hi for _, hi in ranges[:-1]]
    assert (ranges[0][0], ranges[-1][1]) == (0, rows)
    sizes = [hi - lo for lo, hi in ranges]
    assert max(sizes) <= MAX_ROWS
    assert max(sizes) - min(sizes) <= 1
    assert len(ranges) == -(-rows // MAX_ROWS)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, MOST_IN_TURNS), bias=st.booleans(), square=st.booleans())
def test_a_row_is_what_it_is_alone(rows, bias, square):
    """Also with many of them: no row's result depends on others, nor on which turn it is in."""
    generator = torch.Generator().manual_seed(rows)
    outputs = 40 if square else 24
    weight, b = torch.randn(outputs, 40, generator=generator), torch.randn(outputs, generator=generator)
    kernel = CpuLinear(weight, b if bias else None)
    x = torch.randn(1, rows, 40, generator=generator)
    y = kernel.run_accepted(x, 2)
    assert y.shape == (1, rows, outputs)
    alone = torch.stack([kernel.run_accepted(row[None], 1)[0] for row in x[0]])
    assert torch.equal(y[0], alone)
    assert not any(n > MAX_ROWS for _, n, _ in kernel._outputs_like), "no tensor is kept for each number of rows"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_prompt_runs_by_the_kernels(family, kernels_win):
    model, ids = wrapped(family), token_ids(1, MAX_ROWS + 5)
    with model.disable():
        expected = model.generate(ids, **OPTIONS)
    with model.full_width():
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
    engines = model.stats().engines
    assert set(engines) == {"rust, whole"}, "prompt and steps"
    assert model.stats().needed_bytes_share == 1.0


@torch.no_grad()
def test_what_was_not_measured_runs_by_the_modules(kernels_win):
    """A plain call, one that must not go by time, a longer one, and one on other threads."""
    model, short, long = wrapped(), token_ids(1, MAX_ROWS + 1), token_ids(1, MOST_IN_TURNS + 1)
    model.generate(short, **OPTIONS)
    with model.full_width():
        for call in (
            lambda: model(short),
            lambda: model.generate(short, consistent=True, **{**OPTIONS, "max_new_tokens": 1}),
            lambda: model.generate(long, **{**OPTIONS, "max_new_tokens": 1}),
        ):
            model.reset_stats()
            call()
            assert set(model.stats().engines) == {"whole"}
        with own_threads():
            model.reset_stats()
            model.generate(short, **{**OPTIONS, "max_new_tokens": 1})
            assert set(model.stats().engines) == {"whole"}


@torch.no_grad()
def test_it_is_measured_three_times_for_all_lengths(kernels_win):
    model = wrapped()
    model.generate(token_ids(1, 4), **OPTIONS)
    half = MOST_IN_TURNS // 2
    lengths = [
        (MAX_ROWS + 1, True),
        (2 * MAX_ROWS, False),
        (2 * MAX_ROWS + 1, True),
        (half, False),
        (half + 1, True),
        (MOST_IN_TURNS, False),
        (MOST_IN_TURNS + 1, False),
    ]
    for length, fresh in lengths:
        kernels_win.clear()
        model.generate(token_ids(1, length), **OPTIONS)
        assert bool(kernels_win) == fresh


@torch.no_grad()
@pytest.mark.parametrize("cut", ["select", "truncate"])
@pytest.mark.parametrize("isa", ["avx2", "portable"])
@pytest.mark.parametrize(("dtype", "products"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_prompts_of_any_length_take_turns_where_torch_has_no_products(
    dtype, products, isa, cut, kernels_win, monkeypatch
):
    """Without products of a low precision torch takes several times as long, however long the prompt is: nothing is
    measured where the kernels have vector instructions."""
    monkeypatch.setattr(onednn, "has_products", lambda dtype: products)
    monkeypatch.setattr(compiled, "_isa", lambda: isa)
    model = SedacForCausalLM.from_base(tiny_model("llama").to(getattr(torch, dtype)), SedacConfig(extra_memory=0.5))
    model.install(random_policy(model.runtime, cut))
    monkeypatch.setattr(model.runtime.planner, "_compare_widths", lambda rows: (True, "asked for"))
    for length in (MOST_IN_TURNS + 1, 3 * MOST_IN_TURNS):
        ids = token_ids(1, length)
        with model.disable():
            expected = model(ids).logits
        options = {"output_logits": True, "return_dict_in_generate": True, **OPTIONS, "max_new_tokens": 1}
        with model.full_width():
            model.reset_stats()
            kernels_win.clear()
            got = model.generate(ids, **options)
        by_kernels = dtype == "bfloat16" and not products
        assert not (by_kernels and isa == "avx2" and length > MOST_IN_TURNS + 1 and kernels_win)
        assert set(model.stats().engines) == {"rust, whole" if by_kernels else "whole"}
        assert model.stats().needed_bytes_share == 1.0
        torch.testing.assert_close(got.logits[0], expected[:, -1].float(), rtol=0.05, atol=0.05)
        model.reset_stats()
        model.generate(ids, **OPTIONS, prompt="cut")
        assert ("strips" in model.stats().engines) == (cut == "truncate" and not by_kernels)


@torch.no_grad()
@pytest.mark.parametrize("cut", ["select", "truncate"])
@pytest.mark.parametrize("products", [True, False])
def test_calls_that_do_not_go_by_time_take_turns_where_torch_has_no_products(cut, products, monkeypatch):
    """Plain calls, and `consistent` ones."""
    monkeypatch.setattr(onednn, "has_products", lambda dtype: products)
    monkeypatch.setattr(compiled, "_isa", lambda: "avx2")
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)
    monkeypatch.setattr(timed_calls, "interleaved", None)  # nothing may be measured
    model = SedacForCausalLM.from_base(tiny_model("llama").bfloat16(), SedacConfig(extra_memory=0.5))
    model.install(random_policy(model.runtime, cut))
    ids = token_ids(3, 2 * MAX_ROWS)
    with model.disable():
        expected = model(ids).logits
    with model.full_width():
        model.reset_stats()
        torch.testing.assert_close(model(ids).logits, expected, rtol=0.05, atol=0.05)
        assert set(model.stats().engines) == {"whole" if products else "rust, whole"}
    with model.runtime.forced_levels(model.runtime.policy.n_levels):  # before the first checkpoint FFNs are cut
        model.reset_stats()
        got = model(ids).logits
        assert ("rust, whole" in model.stats().engines) != products
        assert ("whole" in model.stats().engines) == products
        model.runtime.engine = "reference"
        masked = model(ids).logits
        model.runtime.engine = "auto"
        assert (got - masked).abs().mean() < 0.05 * masked.std()
    model.reset_stats()
    model.generate(ids, consistent=True, **OPTIONS, prompt="cut")
    assert (set(model.stats().engines) <= {"rust, whole", "rust"}) != products


@torch.no_grad()
def test_many_rows_that_choose_by_turns_are_what_masking_gives(monkeypatch):
    monkeypatch.setattr(onednn, "has_products", lambda dtype: False)
    monkeypatch.setattr(compiled, "_isa", lambda: "avx2")
    model = SedacForCausalLM.from_base(tiny_model("llama").bfloat16(), SedacConfig(extra_memory=0.5))
    model.install(random_policy(model.runtime, "select"))
    weights, policy, rows = model.runtime.weights, model.runtime.policy, 2 * MAX_ROWS + 3
    levels = np.random.default_rng(0).integers(0, 9, rows).astype(np.uint8)
    for i, site in enumerate(model.runtime.sites):
        x = torch.randn(rows, site.hidden_size, generator=torch.Generator().manual_seed(i)).bfloat16()
        counted: list[dict] = []
        cut = SiteCut(
            points=policy.schedule.points[i],
            plan=LevelPlan.of(levels, policy.n_levels),
            importance=weights.importance(i),
            compensation=None,
            engine="auto",
            record=lambda counted=counted, **what: counted.append(what),
            kernel=weights.kernel(i),
        )
        assert_as_good_as_plain(cut_ffn(x, site.weights(), cut), x, site.weights(), cut)
        cut_ffn(x, site.weights(), replace(cut, kernel=None))
        kernels, torchs = counted
        assert (kernels["engine"], torchs["engine"]) == ("rust", "masked")
        assert kernels["needed"] == int(torchs["needed"])
        # What turns have in common is read in each of them.
        assert kernels["needed"] / rows <= kernels["read"] <= site.intermediate_size


@torch.no_grad()
def test_modules_run_where_they_are_quicker(monkeypatch):
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [2.0, 1.0][: len(calls)])
    model = wrapped()
    with model.full_width():
        model.generate(token_ids(1, MAX_ROWS + 1), **{**OPTIONS, "max_new_tokens": 1})
    assert set(model.stats().engines) == {"whole"}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("compensate", [False, True])
def test_a_cut_prompt_by_turns_is_what_strips_give(family, compensate, kernels_win):
    """Mixed levels, level 0 among them: rows are sorted for their turns, and come back in order."""
    model = SedacForCausalLM.from_base(tiny_model(family))
    model.install(random_policy(model.runtime, "truncate", compensate=compensate))
    rows = 2 * MAX_ROWS + 3
    sites = model.runtime.sites
    x = torch.randn(rows, sites[0].hidden_size, generator=torch.Generator().manual_seed(3))
    levels = np.random.default_rng(0).integers(0, 9, rows).astype(np.uint8)
    policy = model.runtime.policy
    for i, site in enumerate(sites):
        counted: list[dict] = []
        cut = SiteCut(
            points=policy.schedule.points[i],
            plan=LevelPlan.of(levels, policy.n_levels),
            importance=None,
            compensation=policy.compensation[i] if compensate else None,
            engine="auto",
            record=lambda counted=counted, **what: counted.append(what),
            kernel=model.runtime.weights.kernel(i),
        )
        got = cut_ffn(x, site.weights(), cut)
        torch.testing.assert_close(got, cut_ffn(x, site.weights(), replace(cut, kernel=None)), rtol=1e-4, atol=1e-4)
        kernels, strips = counted
        assert (kernels["engine"], strips["engine"]) == ("rust", "strips")
        assert kernels["needed"] == strips["needed"]
        assert kernels["read"] == strips["read"], "the widest row's"


@torch.no_grad()
def test_cut_prompts_take_turns_where_that_is_quicker(kernels_win):
    ids = token_ids(1, MAX_ROWS + 1)
    model = wrapped(cut="truncate")
    model.generate(ids, **OPTIONS)
    assert "strips" not in model.stats().engines
    for call in (lambda: model(ids), lambda: model.generate(ids, consistent=True, **{**OPTIONS, "max_new_tokens": 1})):
        model.reset_stats()
        call()
        assert "strips" in model.stats().engines
        assert "rust" not in model.stats().engines


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", ["select", "truncate"])
def test_columns_run_whole_ffns_where_they_are_quicker(family, cut, monkeypatch):
    """Prompts, and steps of some rows; what they give is what the modules give but for rounding."""
    monkeypatch.setattr(onednn, "has_products", lambda dtype: True)
    # Where three ways are timed they are kernel, columns and module; where two are, ours and the module.
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [2.0, 1.0, 3.0][-len(calls) :])
    model = SedacForCausalLM.from_base(tiny_model(family).bfloat16(), SedacConfig(extra_memory=0.5))
    model.install(random_policy(model.runtime, cut))
    for rows, prompt in ((1, MAX_ROWS + 1), (8, 3)):
        ids = token_ids(rows, prompt)
        options = {**OPTIONS, "max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
        with model.disable():
            expected = model.generate(ids, **options)
        with model.full_width():
            model.reset_stats()
            got = model.generate(ids, **options)
        engines = model.stats().engines
        assert "columns, whole" in engines
        assert ("rust, whole" in engines) == (rows == 1), "single rows have kernels"
        assert model.stats().needed_bytes_share == 1.0
        torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=0.05, atol=0.05)
        model.reset_stats()
        with model.full_width():
            model.generate(ids, consistent=True, **options)
        assert "columns, whole" not in model.stats().engines, "nothing goes by time there"


@torch.no_grad()
@pytest.mark.parametrize("kernel_s", [1.0, 3.0])
def test_cut_batches_run_by_what_is_quicker(kernel_s, monkeypatch):
    """Kernel or strips, from the number of rows on for which torch's products may read as little in less time."""
    monkeypatch.setattr(onednn, "has_products", lambda dtype: True)

    def give(calls, device):  # cut or whole; kernel or strips; kernel, columns or module
        return {1: [0.0], 2: [kernel_s, 2.0], 3: [5.0, 5.0, 5.0]}[len(calls)]

    monkeypatch.setattr(timed_calls, "interleaved", give)
    model = SedacForCausalLM.from_base(tiny_model("llama").bfloat16(), SedacConfig(extra_memory=0.5))
    model.install(random_policy(model.runtime, "truncate"))
    monkeypatch.setattr(model.runtime.planner, "_compare_widths", lambda rows: (True, "asked for"))
    for rows in (columns.LEAST_TOKENS - 1, columns.LEAST_TOKENS, MAX_ROWS):
        model.reset_stats()
        model.generate(token_ids(rows, 4), **OPTIONS)
        steps = set(model.stats().engines) - {"whole"}
        by_strips = rows >= columns.LEAST_TOKENS and kernel_s > 2
        assert ("rust" in steps) is not by_strips
    model.reset_stats()
    model.generate(token_ids(MAX_ROWS, 4), consistent=True, **OPTIONS)
    assert "rust" in model.stats().engines, "nothing goes by time there"
