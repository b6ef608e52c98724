"""What `stats()` says of the costs by which strips are cut."""

from __future__ import annotations

import json

import pytest
import torch

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ops.strips import cold_clock, costs
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SEDAC_MEASURE_COSTS", raising=False)
    monkeypatch.setattr(cold_clock, "FLUSH_BYTES", 1 << 12)  # no need of true times here
    costs.forget_tables()
    model = SedacForCausalLM.from_base(tiny_model("llama"), SedacConfig(extra_memory=1.0, engine="strips"))
    model.install(random_policy(model.runtime, "truncate"))
    yield model
    costs.forget_tables()


@torch.no_grad()
def run(model: SedacForCausalLM) -> dict[str, str]:
    """Strip costs after one batch of mixed widths, as they are written to JSON."""
    model(token_ids(4, 16))
    found = model.stats().strip_costs
    assert json.loads(json.dumps(model.stats().to_dict()))["strip_costs"] == found
    return found


@pytest.mark.parametrize(
    ("least_weights", "flag", "origin"),
    [(0, "1", "measured"), (0, "0", "stated"), (1 << 62, "1", "stated")],
    ids=["measured", "switched off", "too small"],
)
def test_each_kind_of_ffn_has_its_origin(model, monkeypatch, capsys, least_weights, flag, origin):
    monkeypatch.setattr(costs, "LEAST_WEIGHTS", least_weights)
    monkeypatch.setenv("SEDAC_MEASURE_COSTS", flag)
    assert model.stats().strip_costs == {}
    kind = f"float32 on cpu, hidden size 64, 3 matrices, {torch.get_num_threads()} threads"
    assert run(model) == {kind: origin}
    model.reset_stats()
    assert model.stats().strip_costs == {kind: origin}
    model.print_summary()
    assert f"strips are cut by {origin} costs: {kind}" in " ".join(capsys.readouterr().out.split())


def test_a_measurement_that_failed_is_not_called_one(model, monkeypatch):
    monkeypatch.setattr(costs, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(costs, "_measure", None)
    assert list(run(model).values()) == ["stated"]


def test_a_flag_that_changed_shows_both(model, monkeypatch):
    monkeypatch.setattr(costs, "LEAST_WEIGHTS", 0)
    run(model)
    monkeypatch.setenv("SEDAC_MEASURE_COSTS", "0")
    assert list(run(model).values()) == ["measured and stated"]
