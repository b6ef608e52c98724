from __future__ import annotations

import json
from pathlib import Path

import pytest

from sedac_hf.assets import demo_path
from sedac_hf.cli.main import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"m{number}.py").write_text(f"import os\n\n\ndef f{number}(x):\n    return os.path.join(x)\n" * 6)
    return tmp_path


def test_table_tells_what_the_figure_depends_on(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "ppl", "demo", "--text", str(source), "--context", "64", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for part in ("protocol sliding, context 64, stride 32", "<|endoftext|>", "float32", "device cpu", "bits/byte",
                 "dense", "SEDAC", "tokens of", "uncalibrated"):  # fmt: skip
        assert part in printed


def test_json_is_all_that_is_printed(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", str(source / "m0.py"), "--protocol", "windows", "--context", "32", "--max-tokens", "90"]
    assert main(["eval", "ppl", str(demo_path()), *arguments, "--dtype", "float32", "--device", "cpu", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["cut"]["tokens"] == 90
    assert (values["cut"]["protocol"], values["cut"]["stride"], values["calibrated"]) == ("windows", 32, False)
    assert values["cut"]["perplexity"] == pytest.approx(values["dense"]["perplexity"])


def test_joined_text(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", str(source), "--join", r"\n\n", "--context", "32", "--max-tokens", "60", "--device", "cpu"]
    assert main(["eval", "ppl", "demo", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cut"]["separator"] == "\n\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(demo_path())], "one of --dataset, --text and --stdlib"),
        (["demo", "--stdlib", "--text", "x.txt"], "got --text and --stdlib"),
        (["demo", "--text", "no-such-file.txt"], "there is none at no-such-file.txt"),
        (["demo", "--stdlib", "--context", "9999"], "context must be at most 512"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "ppl", *arguments]) == 1
    assert message in capsys.readouterr().err
