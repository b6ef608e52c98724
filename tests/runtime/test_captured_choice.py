"""What a ``generate`` call that runs by a captured graph chooses, and what runs where operators can't."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from sedac_hf import SedacForCausalLM
from sedac_hf.ops.compiled import MAX_ROWS, available
from sedac_hf.runtime import timed_calls
from tests.policies import random_policy
from tests.quantised import quantised_model
from tests.runtime.test_captured import base_model, fresh_compiler, generate, wrapped
from tests.tiny_models import token_ids

needs_kernels = pytest.mark.skipif(not available(), reason="the compiled module is not installed")
__all__ = ["fresh_compiler"]  # a fixture that holds here too


def test_a_compiled_call_that_can_only_mask_is_not_decided_by_eager_times(monkeypatch):
    """On a CPU graphs of many rows mask: full width, however well eager steps would do."""
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: [1.0, 0.1][: len(calls)])
    model, ids = wrapped(cut="select"), token_ids(MAX_ROWS + 1, 6)
    monkeypatch.setattr(model.runtime.planner, "_decide_once", lambda x, rows: None)
    expected = generate(base_model(), ids, compiled=False)
    assert torch.equal(generate(model, ids, consistent=False), expected)
    assert model.stats().choices == {"full width: captured graph: its FFNs run by masking, which saves nothing": 1}
    model.reset_stats()
    generate(model, ids)
    assert model.stats().choices == {"cut: asked for": 1}
    model.reset_stats()
    with model.runtime.observe(on_decision=lambda *_: None):
        generate(model, ids, consistent=False)
    (choice,) = model.stats().choices
    assert choice.endswith("measured"), "a watched call runs eagerly"


@needs_kernels
@pytest.mark.parametrize("gain", [True, False])
def test_a_graph_that_runs_the_compiled_kernels_goes_by_their_eager_times(gain, monkeypatch):
    times = [1.0, 0.1 if gain else 1.0]
    monkeypatch.setattr(timed_calls, "interleaved", lambda calls, device: times if len(calls) == 2 else [0.0])
    model, ids = wrapped(cut="select"), token_ids(2, 6)
    monkeypatch.setattr(model.runtime.planner, "_decide_once", lambda x, rows: None)
    generate(model, ids, consistent=False)
    (choice,) = model.stats().choices
    assert choice.startswith("cut: cutting pays" if gain else "full width: cutting does not pay")


@needs_kernels
@pytest.mark.parametrize("cut", ["select", "truncate"])
def test_a_graph_on_a_cpu_reads_what_its_tokens_need(cut):
    model, ids = wrapped(cut=cut), token_ids(1, 6)
    expected = generate(model, ids, compiled=False)
    eager = model.stats()
    model.reset_stats()
    assert torch.equal(generate(model, ids), expected)
    stats = model.stats()
    assert stats.engines["captured"] > 0
    assert all(site.skips(1, "cpu") for site in model.runtime.captured.sites)
    assert stats.saved_bytes_share == pytest.approx(eager.saved_bytes_share, abs=0.1)
    assert stats.saved_bytes_share > 0.1


@pytest.mark.parametrize(
    ("cut", "compensate", "rows", "cuts"),
    [
        ("truncate", False, 64, True),
        ("select", False, 4, True),
        ("select", False, 5, False),  # of more rows the operator masks
        ("select", True, 1, False),  # low-rank maps read what operators keep to themselves
    ],
)
def test_on_cuda_a_graph_cuts_where_it_can_skip(cut, compensate, rows, cuts):
    planner = wrapped(cut=cut, compensate=compensate).runtime.planner
    chosen, reason = planner.choose_captured(rows, device_type="cuda")
    assert chosen is cuts
    assert ("not measured" if cuts else "masking") in reason
    assert planner.choose_captured(rows, device_type="cuda", consistent=True) == (True, "asked for")
    assert not planner.choose_captured(64, device_type="cpu")[0]


def test_what_no_graph_serves_is_left_to_the_choice_for_eager_steps():
    assert wrapped(controller="python").runtime.planner.choose_captured(1) is None
    assert SedacForCausalLM.from_base(base_model()).runtime.planner.choose_captured(1) is None
    model = wrapped()
    with model.disable():
        assert model.runtime.planner.choose_captured(1) is None


@pytest.mark.parametrize(
    ("kind", "cut", "compensate"),
    [
        ("int8", "truncate", False),
        ("int8", "select", False),
        ("int8", "select", True),
        ("int8_dynamic", "truncate", False),
    ],
)
def test_weights_that_are_not_ordinary_tensors_run_by_masking(kind, cut, compensate, tmp_path):
    """No operator gets them: it could not read their memory."""
    model, ids = quantised_model("llama", kind, tmp_path, num_hidden_layers=3), token_ids(2, 6)
    model.install(random_policy(model.runtime, cut, compensate=compensate))
    expected = generate(model, ids, compiled=False)
    model.reset_stats()
    assert torch.equal(generate(model, ids), expected)
    stats = model.stats()
    assert stats.engines["captured"] > 0
    assert {site.operator for site in model.runtime.captured.sites} == {""}
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert not model.runtime.planner.choose_captured(2, device_type="cuda")[0], "masking saves nothing"
