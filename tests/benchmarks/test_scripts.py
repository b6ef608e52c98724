"""Benchmarks run from end to end on tiny sizes: cells, figures in the JSON, the checks of what is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SIZES = ["--layers", "2", "--tokens", "4", "--rounds", "1"]


def run(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *args: str) -> dict[str, Any]:
    """What the script writes as JSON."""
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", [module.__name__, *args, "--json", str(out)])
    module.main()
    figures: dict[str, Any] = json.loads(out.read_text())
    assert figures["machine"]["kernels"]
    return figures


@pytest.mark.parametrize(("rows", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_ffn(rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ffn

    monkeypatch.setattr(ffn, "last_level_cache", lambda: 1 << 12)
    shape = ["--shape", "128x512", "--rows", str(rows), "--dtype", dtype, "--seconds", "0"]
    figures = run(ffn, monkeypatch, tmp_path, *shape, "--isa", "portable")
    assert figures["machine"]["kernels"] == "portable"
    (case,) = figures["cases"]
    cells = {(cell["engine"], cell["cut"], cell["share"]): cell for cell in case["cells"]}
    assert cells["torch", "dense", 1.0]["time_over_dense"] == 1
    assert cells["read", "", 1.0]["time_over_read"] == 1
    for share in (0.75, 0.5, 0.35, 0.25):
        selected, cut = cells["rust", "select", share], cells["rust", "truncate", share]
        assert cut["bytes_share"] == pytest.approx(share, abs=0.13)  # a width is a multiple of 64 units
        # One row reads what it needs; two rows read what either needs.
        assert (
            selected["bytes_share"] == pytest.approx(share, abs=0.02) if rows == 1 else selected["bytes_share"] > share
        )
        assert selected["time_over_read"] * selected["bytes_share"] == pytest.approx(
            selected["us"] / cells["read", "", 1.0]["us"]
        )
    torch_engines = {engine for engine, _, _ in cells} - {"torch", "read", "rust"}
    assert torch_engines == {"masked", "strips", *(["gather"] if rows == 1 else [])}


def test_ffn_stops_where_a_cell_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    import ffn

    monkeypatch.setattr(ffn, "last_level_cache", lambda: 1 << 12)
    case = ffn.Case(64, 256, torch.float32, 1, None)
    cells = [ffn.Cell("rust", "whole", 1.0, 1.0, lambda i: case.dense(i) * 1.01, 1)]
    with pytest.raises(SystemExit, match="wrong"):
        case.check(cells)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layout(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import layout

    from sedac_hf.ops.strips.columns import may_pay

    monkeypatch.setattr(layout, "LEAST_BYTES", 1)
    arguments = ["--shape", "64x128", "--dtype", dtype, "--rows", "1", "--rows", "16", "--seconds", "0"]
    figures = run(layout, monkeypatch, tmp_path, *arguments)
    down = [line for line in figures["lines"] if line["what"] == "down"]
    whole = [line for line in figures["lines"] if line["what"] == "whole FFN"]
    assert [line["rows"] for line in down] == [1, 16]
    assert all(line["time_over_usual"]["usual"] == 1 and "units" in line["s"] for line in down)
    assert [line["rows"] for line in whole] == (
        [16] if may_pay(16, torch.empty(0, dtype=getattr(torch, dtype))) else []
    )
    assert all(set(line["s"]) == {"usual", "columns", "rows, units", "columns, units"} for line in whole)


def test_overhead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import overhead

    from sedac_hf.evaluation import random_decoders

    config_class, sizes = random_decoders.SHAPES["qwen2.5-0.5b"]
    small = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "vocab_size": 512}
    monkeypatch.setitem(random_decoders.SHAPES, "qwen2.5-0.5b", (config_class, {**sizes, **small}))
    figures = run(overhead, monkeypatch, tmp_path, "--dtype", "float32", *SIZES)
    (case,) = figures["cases"]
    names = ["base", "disabled", "full width", "auto, 30%", "base, again", "auto, 95%"]
    assert list(case["rows"]) == names
    assert case["rows"]["base"]["time_over_base"] == 1
    assert all(row["taken"] > 0 for row in case["rows"].values())
    assert all(case["rows"][name]["chose"] for name in names if name.startswith("auto"))
    figures = run(overhead, monkeypatch, tmp_path, "--dtype", "float32", "--prompt", "20", *SIZES)
    assert list(figures["cases"][0]["rows"]) == names


def test_controller(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import controller

    monkeypatch.setenv("SEDAC_MEASURE_COSTS", "0")
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["controller", "--rounds", "1", "--tokens", "10000", "--json", str(out)])
    controller.main()
    assert "strips are cut by stated costs" in capsys.readouterr().out
    seconds = json.loads(out.read_text())["seconds"]
    for label in ("strips of 512 mixed tokens", "strips of 2,048 mixed tokens"):
        assert set(seconds[label]) == {"rust", "plain"}
    assert all(value > 0 for row in seconds.values() for value in row.values())


def test_prefill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import prefill

    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = prefill.random_decoder
    monkeypatch.setattr(prefill, "random_decoder", lambda shape, **changes: decoder(shape, **changes, **sizes))
    out = tmp_path / "figures.json"
    monkeypatch.setattr(sys, "argv", ["prefill", "--tokens", "24", "--rounds", "1", "--json", str(out)])
    prefill.main()
    rows = json.loads(out.read_text())["rows"]
    assert {row["work"] for row in rows} == {"FFN", "model"}
    cut = [row for row in rows if row["case"].startswith(("uniform", "mixed"))]
    assert cut
    assert all(0 < row["share"] < 1 and row["eta"] is not None for row in cut)
