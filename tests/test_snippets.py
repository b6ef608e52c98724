"""The Python blocks of the README run, in order, as one program, in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_lines(markdown: str) -> str:
    """The Python blocks, every other line left empty, so that a traceback gives the line of the README."""
    lines, inside = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


def test_readme_snippets_run(tmp_path: Path) -> None:
    program = python_lines(README)
    assert "model.calibrate(" in program
    script = tmp_path / "README.py"
    script.write_text(program, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my-sedac" / "config.json").is_file()
    assert not list((tmp_path / "my-adapter").glob("model*.safetensors"))


def test_readme_names_only_commands_that_exist() -> None:
    from sedac_hf.cli.main import COMMANDS

    named = set(re.findall(r"^\$ sedac-hf (\w+)", README, re.MULTILINE))
    assert named == {name for name, _ in COMMANDS}


def test_readme_names_only_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:\$ |`)make ([a-z-]+)", text))
    assert named
    assert named <= targets


@pytest.mark.parametrize("name", re.findall(r"configs/(\w+\.yaml)", README))
def test_readme_names_only_recipes_that_exist(name: str) -> None:
    assert isinstance(yaml.safe_load((ROOT / "configs" / name).read_text(encoding="utf-8")), dict)
