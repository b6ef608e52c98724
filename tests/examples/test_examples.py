"""Every example runs as it stands, in an empty folder, and stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN_TEST = {"train_demo_decoder.py"}  # has flags that keep a test small
SHORT = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in OWN_TEST)


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
