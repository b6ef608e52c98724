"""Decode steps as one captured graph: the same tokens, no graph breaks, nothing compiled again, everything counted."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig

from sedac_hf import SedacForCausalLM
from sedac_hf.configuration import SedacConfig
from tests.policies import random_policy
from tests.test_invariants import nothing_left
from tests.tiny_models import tiny_model, token_ids

NEW_TOKENS = 8
OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# A recognised GLU and MLP (operators; Conv1D weights), a fused GLU, FFNs whose own forward runs, low-rank maps.
CASES = [
    ("llama", "truncate", False),
    ("llama", "select", False),
    ("gpt2", "select", False),
    ("phi3", "truncate", True),
    ("opt", "truncate", False),
    ("opt", "select", True),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def base_model(family="llama"):
    """Three layers: one in front of the checkpoints, one behind each."""
    return tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 3})


def wrapped(family="llama", cut="truncate", compensate=False, **config) -> SedacForCausalLM:
    base = base_model(family)
    model = SedacForCausalLM.from_base(base, SedacConfig(base.config, **config))
    model.install(random_policy(model.runtime, cut, compensate=compensate))
    return model


def compile_config(backend="eager") -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def generate(model, ids, *, compiled=True, backend="eager", **kwargs):
    how = {"compile_config": compile_config(backend)} if compiled else {"disable_compile": True}
    own = {"consistent": True, "prompt": "full"} if isinstance(model, SedacForCausalLM) else {}
    return model.generate(ids, cache_implementation="static", **OPTIONS, **{**own, **how, **kwargs})


def levels_on_the_host(model, ids):
    """Tokens of an eager run, and the levels of its decode steps [n_checkpoints, n]."""
    seen = [[] for _ in model.runtime.checkpoint_layers]
    with model.runtime.observe(on_decision=lambda idx, ratio, levels: seen[idx].append(levels)):
        tokens = generate(model, ids, compiled=False)
    return tokens, np.array([np.concatenate(steps) for steps in seen])


@pytest.mark.parametrize(("family", "cut", "compensate"), CASES)
def test_one_graph_gives_the_tokens_and_levels_of_the_host(family, cut, compensate):
    model, ids = wrapped(family, cut, compensate), token_ids(2, 6)
    expected, levels = levels_on_the_host(model, ids)
    assert len(np.unique(levels)) > 2
    logged = []
    tokens = generate(model, ids)
    model.runtime.captured.audit._on_replay = lambda part, exited, ratios: logged.append(part.levels)
    counts = model.runtime.captured.flush()
    assert torch.equal(tokens, expected)
    np.testing.assert_array_equal(np.concatenate(logged, axis=1), levels)
    assert counts is not None
    assert (counts.mismatches, counts.dropped, counts.decisions) == (0, 0, levels.size)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_on_a_cpu_a_given_configuration_is_taken_at_its_word():
    model, ids = wrapped(), token_ids(2, 6)
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    for how in ({}, {"compile_config": config, "disable_compile": True}):
        generate(model, ids, **{"compile_config": None, **how})
        assert not counters["stats"]["unique_graphs"]
    for how in ({"compile_config": config}, {"generation_config": GenerationConfig(compile_config=config)}):
        torch._dynamo.reset()
        counters.clear()
        model.generate(ids, cache_implementation="static", consistent=True, **OPTIONS, **how)
        assert counters["stats"]["unique_graphs"] == 1
    assert config._compile_all_devices is None, "the caller's own object"


def test_the_graph_asks_the_host_nothing_and_reads_tables_where_they_lie():
    model, graphs, inputs = wrapped(cut="select"), [], []

    def keep(graph, example_inputs):
        graphs.append(graph)
        inputs.extend(example_inputs)
        return graph.forward

    generate(model, token_ids(1, 6), backend=keep)
    (graph,) = graphs
    called = {str(node.target) for node in graph.graph.nodes if node.op.startswith("call")}
    assert not called & {"item", "tolist", "nonzero", "cpu", "masked_select", "unique", "repeat_interleave"}
    assert not any(isinstance(value, torch.SymInt) for value in inputs)
    # CUDA graphs copy every input that is not static before each replay: the step's own inputs may be the only ones.
    static = [isinstance(value, torch.nn.Parameter) or hasattr(value, "_dynamo_static_input_type") for value in inputs]
    moving = [value for value, fixed in zip(inputs, static, strict=True) if not fixed]
    assert sum(value.numel() for value in moving) < 500, [tuple(value.shape) for value in moving]
    assert len(inputs) > 50


def test_inductor_gives_the_same_tokens():
    model, ids = wrapped(cut="select"), token_ids(1, 6)
    expected = generate(model, ids, compiled=False)
    assert torch.equal(generate(model, ids, backend="inductor"), expected)
    assert model.runtime.captured.flush().mismatches == 0


def test_nothing_is_compiled_again_when_levels_or_thresholds_change():
    model, first, second = wrapped(), token_ids(2, 6), token_ids(2, 6, seed=5)
    generate(model, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        generate(model, second)
        model.runtime.controller.set_thresholds([0.3, 1.7])
        compiled = generate(model, second)
    expected, levels = levels_on_the_host(model, second)
    assert torch.equal(compiled, expected)
    assert model.runtime.captured.flush().mismatches == 0
    model.runtime.controller.set_thresholds([1.0, 1.0])
    assert (levels != levels_on_the_host(model, second)[1]).any()


def test_full_width_inside_a_graph_is_the_base():
    model, ids = wrapped(), token_ids(2, 6)
    expected = generate(base_model(), ids, compiled=False)
    with model.full_width():
        assert torch.equal(generate(model, ids), expected)
    with model.disable():
        assert torch.equal(generate(model, ids), expected)


def test_an_uncalibrated_model_compiles_as_its_base_does():
    model, ids = SedacForCausalLM.from_base(base_model()), token_ids(2, 6)
    assert torch.equal(generate(model, ids), generate(base_model(), ids, compiled=False))
    assert model._can_compile_fullgraph
    assert not wrapped(controller="python")._can_compile_fullgraph


def test_totals_are_those_of_an_eager_run():
    model, ids = wrapped(compensate=True), token_ids(2, 6)
    model.reset_stats()
    generate(model, ids, compiled=False)
    eager = model.stats()
    model.reset_stats()
    generate(model, ids)
    captured = model.stats()
    assert captured.engines["captured"] == (NEW_TOKENS - 1) * len(model.runtime.sites)
    assert (captured.tokens, captured.forward_passes) == (eager.tokens, eager.forward_passes)
    assert captured.needed_bytes_share == pytest.approx(eager.needed_bytes_share, abs=1e-9)
    assert captured.saved_bytes_share <= 0, "on a CPU the operators skip nothing, and the totals must say so"
    for ours, theirs in zip(captured.checkpoints, eager.checkpoints, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.mean_ratio == pytest.approx(theirs.mean_ratio, abs=1e-3)
    model.reset_stats()
    assert model.stats().tokens == 0


def test_an_unusable_risk_runs_at_full_width_and_is_counted():
    model, ids = wrapped(), token_ids(1, 6)
    for layer in model.runtime.checkpoint_layers:
        model.runtime.probes[layer].out.bias.fill_(float("nan"))
    model.reset_stats()
    tokens = generate(model, ids)
    assert model.stats().fail_safe == (NEW_TOKENS - 1) * len(model.runtime.checkpoint_layers)
    assert torch.equal(tokens, generate(model, ids, compiled=False))


def test_thresholds_adapt_from_the_log():
    model = wrapped(adaptive_thresholds=True)
    before = model.runtime.controller.thresholds
    generate(model, token_ids(2, 6))
    between = model.runtime.controller.thresholds  # the prompt ran at full width: nobody asked the controller
    assert (between == before).all()
    model.stats()
    assert (model.runtime.controller.thresholds != before).any()


def test_prompt_chunks_and_watched_calls_run_eagerly():
    model, ids = wrapped(), token_ids(2, 9)
    expected = generate(model, ids, compiled=False)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)
    counts = model.runtime.captured.flush()
    assert counts.decisions == 2 * (NEW_TOKENS - 1) * len(model.runtime.checkpoint_layers)
    with model.runtime.observe(on_decision=lambda *_: None):
        assert torch.equal(generate(model, ids), expected)
    assert model.runtime.captured.flush() == counts


def test_without_the_compiled_controller_steps_run_eagerly_and_it_is_said(caplog):
    model, ids = wrapped(controller="python"), token_ids(2, 6)
    expected = generate(model, ids, compiled=False)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, ids), expected)
    assert "the controller is not the compiled one; they run eagerly" in caplog.text


def test_a_copy_has_a_law_of_its_own_and_unloading_leaves_nothing():
    model, ids = wrapped(), token_ids(2, 6)
    expected = generate(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, ids), expected)
    assert twin.runtime.captured.law is not model.runtime.captured.law
    assert nothing_left(model.unload())
    assert torch.equal(generate(twin, ids), expected)


def test_an_exception_inside_a_compiled_step_leaves_no_state():
    model, ids = wrapped(), token_ids(2, 6)
    expected = model(ids).logits
    call = model.get_compiled_call(compile_config())
    with pytest.raises(IndexError):
        call(input_ids=torch.full_like(ids, 10**6), use_cache=False)  # outside the vocabulary
    assert not model.runtime.captured.serving
    assert torch.equal(model(ids).logits, expected)
