"""The training script, for a few steps of a very small decoder on a few files."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_demo_decoder.py"
SIZES = ["--steps=30", "--batch=4", "--vocab=400", "--layers=2", "--hidden=32", "--files=12", "--lr=0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("train") / "decoder"
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(out), *SIZES], check=True)
    return out


def test_writes_a_decoder_that_loads(trained: Path) -> None:
    assert not list(trained.glob("*.bin")), "safetensors only"
    model = AutoModelForCausalLM.from_pretrained(trained, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert model.dtype == torch.float16
    assert model.config.vocab_size == len(tokenizer) == 400
    text = "def f(x):\n    return '€'  # any text comes back\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_learns_and_says_what_it_did(trained: Path) -> None:
    card = (trained / "README.md").read_text(encoding="utf-8")
    losses = re.search(r"per token: ([\d.]+) at the last step, ([\d.]+) on held-out", card)
    assert losses is not None
    assert all(float(loss) < 0.95 * math.log(400) for loss in losses.groups())  # guessing costs log(400)
    assert "md5" in card
    assert "12 files" in card
