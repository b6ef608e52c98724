"""The demo's speed part, on a tiny shape: what is reported, and when it is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sedac_hf.cli import demo_speed
from sedac_hf.cli.demo_speed import free_memory, place_and_dtype, print_speed, speed_on_this_machine

TINY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip


@pytest.fixture(scope="module")
def speed() -> dict[str, Any]:
    return speed_on_this_machine(rounds=1, tokens=4, **TINY)


def test_reports_three_variants_over_the_dense_one(speed: dict[str, Any]) -> None:
    rates = speed["tokens_per_second"]
    assert list(rates) == ["dense", "nothing skipped", "sedac"]
    assert min(rates.values()) > 0
    assert speed["speed_up"]["dense"] == 1
    assert speed["speed_up"]["sedac"] == rates["sedac"] / rates["dense"]
    assert speed["weights"] == "random"
    assert len(speed["choices"]) == 1  # of the SEDAC variant alone
    assert json.loads(json.dumps(speed)) == speed


def test_prints_that_the_weights_are_random(speed: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_speed(speed)
    printed = capsys.readouterr().out
    assert "random weights" in printed
    assert f"{speed['speed_up']['sedac']:.2f}x" in printed
    assert speed["choices"][0] in printed


def test_is_left_out_where_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory.max").write_text("20000000\n")
    (tmp_path / "memory.current").write_text("15000000\n")
    (tmp_path / "memory.stat").write_text("anon 10000000\ninactive_file 4000000\n")
    monkeypatch.setattr(demo_speed, "MEMORY_LIMIT", tmp_path)
    assert free_memory("cpu") == 9_000_000
    speed = speed_on_this_machine(rounds=1, tokens=2)  # of the real shape, which must not be made
    assert list(speed) == ["skipped"]
    print_speed(speed)
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [None, "max\n"])
def test_no_limit_of_a_container(limit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(demo_speed, "MEMORY_LIMIT", tmp_path)
    assert free_memory("cpu") > 1 << 24


def test_the_place_can_be_used() -> None:
    device, dtype = place_and_dtype()
    assert torch.ones(2, dtype=dtype, device=device).sum() == 2
