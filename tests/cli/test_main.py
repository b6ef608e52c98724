"""The command line as a user meets it: exit codes, one-line errors, quick help, `env` and `info`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import sedac_hf
from sedac_hf.assets import demo_path
from sedac_hf.cli.main import COMMANDS, main
from sedac_hf.ops.compiled import instruction_sets
from tests.tiny_models import tiny_model


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sedac_hf.cli.main", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as an adapter-only save leaves it."""
    layer = {"layer_idx": 3, "target_exit_rate": 0.2, "initial_threshold": 0.8, "confidence_weight": 0.3}
    config = {"model_type": "sedac", "base_model_name_or_path": "base", "n_levels": 8, "layer_configs": [layer]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"probes.0.weight": np.zeros((4, 2), np.float32)}, tmp_path / "sedac.safetensors")
    (tmp_path / "calibration_report.json").write_text(json.dumps({"tokens": 1000}))
    return tmp_path


def test_help_is_quick_and_lists_every_command() -> None:
    run("--help")  # the first start may compile bytecode
    start = time.perf_counter()
    done = run("--help")
    assert time.perf_counter() - start < 5  # 0.7 s where torch is not loaded; loading it alone takes longer than that
    assert done.returncode == 0
    assert all(name in done.stdout for name, _ in COMMANDS)


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sedac-hf {sedac_hf.__version__}\n"


@pytest.mark.parametrize("args", [["no-such-command"], ["info"], ["env", "--no-such-flag"]])
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    assert main(args) == 2


def test_an_error_is_one_line_and_exit_code_1() -> None:
    done = run("info", str(demo_path()))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "'llama'" in done.stderr
    assert done.stdout == ""


def test_env_names_versions_machine_and_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEDAC_SOFT_EXIT", "0")
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sedac"]["SEDAC_SOFT_EXIT"] == "0"
    assert facts["versions"]["torch"] != "not installed"
    assert facts["torch"]["threads"] >= 1
    assert facts["sedac"]["kernels"] in instruction_sets()
    assert facts["sedac"]["kernel threads"].startswith(f"{facts['torch']['threads']}, ")


def test_info_reads_a_folder_without_its_base(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(saved), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["kind"] == "SEDAC adapter"
    assert facts["tensors"] == {"probes.0.weight": {"dtype": "F32", "shape": [4, 2]}}
    assert facts["report"] == {"tokens": 1000}
    assert facts["base"] == {"name": "base", "revision": None, "fingerprint": None, "parameters compared": None}
    assert main(["info", str(saved)]) == 0
    assert "layer_idx" in capsys.readouterr().out


def test_info_names_base_revision_and_fingerprint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = sedac_hf.SedacForCausalLM.from_base(tiny_model("llama"))
    model.model.name_or_path, model.config.base_revision = "someone/decoder", "0123abc"
    model.save_pretrained(tmp_path, adapter_only=True)
    assert main(["info", str(tmp_path), "--json"]) == 0
    base = json.loads(capsys.readouterr().out)["base"]
    assert (base["name"], base["revision"]) == ("someone/decoder", "0123abc")
    assert base["fingerprint"] == json.loads((tmp_path / "config.json").read_text())["base_fingerprint"]
    assert base["parameters compared"] == len(list(model.model.parameters()))
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(str(value) in printed for value in base.values())


@pytest.mark.parametrize("name", ["config.json", "sedac.safetensors", "calibration_report.json"])
def test_info_names_the_damaged_file(saved: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:7])
    assert main(["info", str(saved)]) == 1
    assert name in capsys.readouterr().err


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "absent")]) == 1
    assert "save_pretrained" in capsys.readouterr().err
