"""Which modules of a captured graph compiled kernels run, and that it changes no result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from sedac_hf.ops.compiled import MAX_ROWS, available
from sedac_hf.runtime import decode_linears, timed_calls
from tests.runtime.test_captured import fresh_compiler, generate, wrapped
from tests.tiny_models import token_ids

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")
__all__ = ["fresh_compiler"]  # a fixture that holds here too


@pytest.fixture(autouse=True)
def _small_linears_too(monkeypatch):
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)


def operators(model, ids, **kwargs):
    """(tokens, how often each of our operators is in the one graph)."""
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    tokens = generate(model, ids, backend=keep, **kwargs)
    (graph,) = graphs
    names = [str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("sedac_hf.")]
    return tokens, {name: names.count(name) for name in set(names)}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cut", ["select", "truncate"])
def test_the_linear_maps_of_a_graph_run_by_kernels(family, cut):
    model, ids = wrapped(family, cut), token_ids(2, 6)
    expected = generate(model, ids, compiled=False)
    tokens, counts = operators(model, ids)
    assert torch.equal(tokens, expected)
    operator = {"select": "selected_ffn", "truncate": "truncated_ffn"}[cut]
    linears = len(model.runtime.decode_linears)
    # GPT-2's own maps are no `nn.Linear`, the head is.
    assert linears == (1 if family == "gpt2" else 4 * 3 + 1)
    assert counts == {operator: len(model.runtime.sites), "linear": linears}


def test_whole_ffns_run_by_kernels_too():
    model, ids = wrapped(), token_ids(2, 6)
    with model.full_width():
        expected = generate(model, ids, compiled=False)
        tokens, counts = operators(model, ids)
    assert torch.equal(tokens, expected)
    assert counts == {"truncated_ffn": 3, "linear": 13}
    model.reset_stats()
    with model.full_width():
        generate(model, token_ids(2, 3))
    assert set(model.stats().engines) == {"rust, whole"}


@pytest.mark.parametrize("quicker", [True, False])
def test_a_graph_has_the_kernels_that_were_measured_to_be_quicker(quicker, monkeypatch):
    times = [0.1, 1.0] if quicker else [1.0, 0.1]
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: times[: len(calls)])
    model, ids = wrapped(), token_ids(2, 6)
    with model.full_width():
        _, counts = operators(model, ids, consistent=False)
    assert counts == ({"truncated_ffn": 3, "linear": 13} if quicker else {})


def test_more_rows_than_kernels_take_run_as_they_are():
    model, ids = wrapped(), token_ids(MAX_ROWS + 1, 6)
    expected = generate(model, ids, compiled=False)
    tokens, counts = operators(model, ids)
    assert torch.equal(tokens, expected)
    assert counts == {"truncated_ffn": 3}  # a cut is asked for, and masks


@pytest.mark.parametrize("cut", ["select", "truncate"])
def test_nothing_is_compiled_again_for_a_model_that_was_disabled_or_ran_whole_or_otherwise(cut):
    model, ids = wrapped(cut=cut), token_ids(2, 6)
    schedule = model.runtime.policy.schedule
    expected = generate(model, ids)
    with model.full_width():
        whole = generate(model, ids)
    with torch.compiler.set_stance("fail_on_recompile"):
        with model.disable():
            pass
        assert torch.equal(generate(model, ids), expected)
        with model.full_width():
            assert torch.equal(generate(model, ids), whole)
        assert torch.equal(generate(model, ids), expected)
        halved = [[point._replace(width=point.width // 2) for point in levels[:-1]] for levels in schedule.points]
        points = tuple((*below, levels[-1]) for below, levels in zip(halved, schedule.points, strict=True))
        model.runtime.reschedule(replace(schedule, points=points))
        generate(model, ids)
        assert torch.equal(generate(model, ids), generate(model, ids, compiled=False))
        model.runtime.reschedule(schedule)
        assert torch.equal(generate(model, ids), expected)


def test_weights_that_change_under_a_graph_are_read_where_they_are():
    model, ids = wrapped(), token_ids(2, 6)
    generate(model, ids)
    with torch.no_grad():
        for linear in (model.model.lm_head, model.model.model.layers[0].self_attn.q_proj):
            linear.weight.data = linear.weight.data * 1.5  # elsewhere in memory
    expected = generate(model, ids, compiled=False)
    assert torch.equal(generate(model, ids), expected)
    assert not counters["graph_break"]
