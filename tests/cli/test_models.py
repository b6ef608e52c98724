"""`sedac-hf models`: the list, one type of it, and a type that is not in it."""

from __future__ import annotations

import json

import pytest

from sedac_hf.cli.main import main
from sedac_hf.cli.models import read_list


def test_all_types(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    types = read_list()["types"]
    assert all(name in printed for name in types)
    assert f"transformers {read_list()['transformers']}" in printed


@pytest.mark.parametrize(
    ("model_type", "cells"),
    [
        ("llama", ["gated", "kernels", "yes"]),
        ("phi3", ["fused", "kernels", "yes"]),
        ("mixtral", ["experts", "kernels", "yes"]),
        ("rwkv", ["plain", "linears", "down alone"]),
        ("bitnet", ["gated", "masking", "yes", "ffn_sub_norm.weight"]),
        ("blt", ["gated", "whole: other FFNs"]),
        ("mamba", ["refused", "no FFN"]),
        ("gemma3n", ["not tried", "timm"]),
    ],
)
def test_one_type(
    model_type: str, cells: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["models", "--type", model_type]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if model_type in line]
    assert all(cell in row for cell in cells)
    assert main(["models", "--type", model_type, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"] == {model_type: read_list()["types"][model_type]}


def test_a_type_that_is_newer_than_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--type", "model_of_tomorrow"]) == 0
    printed = capsys.readouterr().out
    assert "model_of_tomorrow is none of the causal types" in printed
    assert "The rules are structural" in printed
