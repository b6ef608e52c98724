"""`sedac-hf info PATH`: what a saved SEDAC model or adapter holds, read from its files alone (no base, no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_hf.errors import LoadError
from sedac_hf.saving import CONFIG_FILE, FINGERPRINT_FILE, REPORT_FILE, TENSORS_FILE

_SHOWN = ("layer_configs", "base_model_name_or_path", "base_revision", "base_fingerprint")  # in places of their own


def command(
    path: Annotated[Path, typer.Argument(help="Folder written by save_pretrained.", show_default=False)],
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the policy, the tensors and the calibration report of a saved SEDAC model or adapter."""
    facts = read_saved(path)
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{path}: {facts['kind']}")
    _print_table("base", facts["base"])
    _print_table("config", {name: value for name, value in facts["config"].items() if name not in _SHOWN})
    for number, layer in enumerate(facts["config"].get("layer_configs") or []):
        typer.echo(f"  checkpoint {number:<13} {_short(layer)}")
    _print_table("tensors", {name: f"{t['dtype']} {t['shape']}" for name, t in facts["tensors"].items()})
    if facts["report"] is None:
        typer.echo(f"no {REPORT_FILE}: this folder was not calibrated")
    else:
        _print_table("calibration report", facts["report"])


def read_saved(path: Path) -> dict[str, Any]:
    """Read a saved folder without loading its base.

    Args:
        path: folder that holds at least ``config.json``.

    Returns:
        ``kind`` ("SEDAC model" or "SEDAC adapter"), ``base`` (name, revision, fingerprint and how many parameters the
        fingerprint is of; None where there is none), ``config``, ``tensors`` (name -> dtype and shape of
        ``sedac.safetensors``; empty where there is none) and ``report`` (None where there is none).

    Raises:
        LoadError: it is not a folder that `save_pretrained` wrote, or a file in it is damaged.
    """
    if not (path / CONFIG_FILE).is_file():
        raise LoadError(f"{path} must be a folder with a {CONFIG_FILE} that save_pretrained wrote; there is none")
    config = _read_json(path / CONFIG_FILE)
    if config.get("model_type") != "sedac":
        raise LoadError(
            f"{path / CONFIG_FILE} must have model_type 'sedac', got {config.get('model_type')!r}: this is a plain "
            "model; wrap it with SedacForCausalLM.from_pretrained and save it first"
        )
    report, fingerprint = path / REPORT_FILE, path / FINGERPRINT_FILE
    base = config.get("base_model_name_or_path")
    return {
        "kind": "SEDAC adapter" if base else "SEDAC model",
        "base": {
            "name": base or "weights in this folder",
            "revision": config.get("base_revision"),
            "fingerprint": config.get("base_fingerprint"),
            "parameters compared": len(_read_json(fingerprint)) if fingerprint.is_file() else None,
        },
        "config": config,
        "tensors": _tensors(path / TENSORS_FILE) if (path / TENSORS_FILE).is_file() else {},
        "report": _read_json(report) if report.is_file() else None,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} must be readable JSON: {error}; save the model again") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} must hold a JSON object, got {type(content).__name__}; save the model again")
    return content


def _tensors(path: Path) -> dict[str, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: {"dtype": s.get_dtype(), "shape": list(s.get_shape())} for name, s in slices.items()}
    except SafetensorError as error:
        raise LoadError(f"{path} must be a safetensors file: {error}; save the model again") from error


def _print_table(title: str, values: Mapping[str, Any]) -> None:
    typer.echo(title)
    for name, value in values.items():
        typer.echo(f"  {name:<24} {_short(value)}")


def _short(value: Any, limit: int = 96) -> str:
    """One line; long nested values are named by their size, since --json shows them whole."""
    if isinstance(value, dict | list):
        text = json.dumps(value)
        return text if len(text) <= limit else f"({len(value)} entries; see --json)"
    return str(value)
