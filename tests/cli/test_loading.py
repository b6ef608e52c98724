"""What the commands load for "demo", for a saved model and for an adapter; and `bench` on the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sedac_hf.assets import demo_path
from sedac_hf.cli.loading import load_model, load_tokenizer, model_path
from sedac_hf.cli.main import main


def test_demo_is_the_embedded_decoder() -> None:
    assert model_path("demo") == str(demo_path())
    assert model_path("some/other") == "some/other"


def test_demo_on_a_cpu_is_float32_unless_asked() -> None:
    assert load_model("demo", device="cpu").dtype == torch.float32
    assert load_model("demo", device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(str(demo_path()), device="cpu").dtype == torch.float16  # as saved


def test_an_adapter_takes_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    load_model("demo", device="cpu").save_pretrained(tmp_path / "adapter", adapter_only=True)
    path = str(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    assert len(load_tokenizer(path, load_model(path, device="cpu"))) == 4096


def test_the_cap_is_given_kept_and_replaced(tmp_path: Path) -> None:
    plain = load_model("demo", device="cpu", extra_memory=0.3)
    assert plain.config.extra_memory == plain.runtime.extra_memory == 0.3
    plain.save_pretrained(tmp_path / "adapter", adapter_only=True)
    plain.save_pretrained(tmp_path / "whole")
    for path in (str(tmp_path / "adapter"), str(tmp_path / "whole")):
        assert load_model(path, device="cpu").runtime.extra_memory == 0.3
        again = load_model(path, device="cpu", extra_memory=0.05)
        assert again.config.extra_memory == again.runtime.extra_memory == 0.05


@pytest.mark.parametrize("value", ["-0.1", "nan"])
@pytest.mark.parametrize(
    "command", [["calibrate", "demo"], ["generate", "demo", "a"], ["eval", "ppl", "demo"], ["bench", "demo"]], ids=str
)
def test_a_cap_that_is_none_is_exit_code_1(command: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--extra-memory", value]) == 1
    error = capsys.readouterr().err
    assert "`extra_memory` must be a finite share of the base's bytes of 0 or more, e.g. 0.1" in error


def test_a_named_tokenizer_must_exist(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_tokenizer("demo", load_model("demo", device="cpu"), str(tmp_path))


def test_bench_prints_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "demo", "--rounds", "2", "--new-tokens", "2", "--prompt-tokens", "4", "--device", "cpu", "--json"]
    assert main(args) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ratio"] == figures["medians"]["sedac"] / figures["medians"]["dense"]
    assert figures["cpu"]["processor"]
    assert list(figures["choices"]) == ["full width: not calibrated"]


def test_bench_names_the_machine_and_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "demo", "--rounds", "1", "--new-tokens", "1", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "SEDAC time / dense time" in printed
    assert "not calibrated" in printed


def test_a_folder_that_is_no_model_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
