"""The model card of a save: metadata that huggingface_hub reads, the report's own figures, code that runs."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import ModelCard

from sedac_hf import SedacForCausalLM
from tests.saving.reports import some_report
from tests.test_invariants import wrapped


@pytest.fixture
def model() -> SedacForCausalLM:
    model = wrapped("llama", "truncate")
    model.calibration_report = some_report()
    return model


def card_of(folder) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_card_for_an_adapter_of_a_hub_base(tmp_path, model):
    model.model.name_or_path = "someone/decoder"
    model.config.base_revision = "0123abc"
    model.save_pretrained(tmp_path / "saved", adapter_only=True)
    card = card_of(tmp_path / "saved")
    assert card.data.base_model == "someone/decoder"
    assert card.data.base_model_relation == "adapter"
    assert card.data.library_name == "sedac-hf"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["sedac", "adaptive-computation"]
    fingerprint = re.escape(SedacForCausalLM.config_class.from_pretrained(tmp_path / "saved").base_fingerprint)
    assert re.search(rf"`someone/decoder`, revision `0123abc`, type `llama`; fingerprint.*`{fingerprint}`", card.text)
    assert "without the base's weights" in card.text
    assert "`truncate`" in card.text


def test_a_local_base_is_no_hub_id(tmp_path, model):
    model.model.save_pretrained(tmp_path / "base")
    model.model.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved", adapter_only=True)
    assert card_of(tmp_path / "saved").data.base_model is None
    assert str(tmp_path / "base") in card_of(tmp_path / "saved").text


def test_figures_are_those_of_the_report(tmp_path, model):
    model.save_pretrained(tmp_path / "saved")
    text = card_of(tmp_path / "saved").text
    for name, value in some_report().rows():
        assert f"| {name} | {value} |" in text
    assert "figures for the calibration text" in text


def test_the_code_of_the_card_loads_the_model(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path / "saved").text, re.DOTALL)
    scope: dict[str, object] = {}
    exec(code, scope)
    assert isinstance(scope["model"], SedacForCausalLM)
    assert scope["model"].calibration_report == some_report()


def test_an_uncalibrated_model_has_no_figures(tmp_path, model):
    model.uninstall()
    model.save_pretrained(tmp_path / "saved")
    text = card_of(tmp_path / "saved").text
    assert "uncalibrated" in text
    assert "|" not in text


def test_a_card_is_written_again_until_somebody_takes_it_over(tmp_path, model):
    card = tmp_path / "saved/README.md"
    model.save_pretrained(tmp_path / "saved")
    card.write_text(card.read_text() + "\nadded\n")
    model.save_pretrained(tmp_path / "saved")
    assert "added" not in card.read_text()
    own = re.sub("<!-- Written by sedac-hf.*-->", "", card.read_text()) + "\nadded\n"
    card.write_text(own)
    model.save_pretrained(tmp_path / "saved")
    assert card.read_text() == own


@pytest.mark.parametrize("content", [b"# Mine\n", b"", b"\xff\xfe not text"])
def test_a_card_of_others_is_not_touched(tmp_path, model, content):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/README.md").write_bytes(content)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_bytes() == content
