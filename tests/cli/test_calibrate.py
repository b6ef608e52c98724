"""`sedac-hf calibrate`: a recipe's law is installed and saved as it is written; the report of a calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sedac_hf import SedacForCausalLM
from sedac_hf.cli.main import main
from sedac_hf.cli.recipes import law_of, load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = ["--fit-tokens", "2048", "--held-out-tokens", "2048", "--json"]


@pytest.mark.parametrize("name", ["v6_0", "v6_1"])
def test_a_law_recipe_is_saved_as_it_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = CONFIGS / f"{name}.yaml"
    out = tmp_path / name
    arguments = ["calibrate", "demo", "--config", str(recipe), "--extra-memory", "0.2", "--out", str(out), *QUICK]
    assert main(arguments) == 0
    wanted = law_of(load_recipe(recipe), n_layers=12)
    printed = json.loads(capsys.readouterr().out)["law"]
    assert [item["initial_threshold"] for item in printed] == [0.8, 1.0, 1.2]
    model = SedacForCausalLM.from_pretrained(out, dtype="float32")
    assert model.config.cut == "truncate"
    assert model.config.cascade == tuple(wanted["layer_configs"])
    assert (model.config.confidence_decay, model.config.soft_exit) == (wanted["confidence_decay"], wanted["soft_exit"])
    assert model.calibration_report is None
    assert model.config.extra_memory == 0.2
    ids = AutoTokenizer.from_pretrained(out)("def main():\n    return", return_tensors="pt")
    model(**ids)
    stats = model.stats()
    assert [item.tokens for item in stats.checkpoints] == [ids["input_ids"].numel()] * 3


def test_the_report_holds_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    cap = ["--extra-memory", "0.03"]
    arguments = ["calibrate", "demo", "--share", "0.6", "--context", "128", "--out", str(out), *cap, *QUICK]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "calibration_report.json").read_text())
    assert report["needed_bytes"] == pytest.approx(0.6, abs=0.02)
    assert report["dense_perplexity"] < report["perplexity"] < 1.1 * report["dense_perplexity"]
    assert [item["layer_idx"] for item in report["checkpoints"]] == [3, 6, 9]
    for item in report["checkpoints"]:
        assert 0.2 < item["mean_ratio"] < 0.8
        assert 0.1 < item["rank_correlation"] < 1
    low, high = report["law_over_constant"]
    assert low <= high
    assert report["constant_share"] == pytest.approx(report["needed_bytes"], abs=0.005)
    assert report["context"] == 128
    config = json.loads((out / "config.json").read_text())
    assert config["extra_memory"] == 0.03
    assert config["shadow_bits"] in (3, 2)  # there is no room for four
