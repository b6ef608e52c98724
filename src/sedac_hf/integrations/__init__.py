"""Bridges to other libraries; each is imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path


def metric_path() -> str:
    """Folder of the `evaluate` module that computes perplexity: `evaluate.load(metric_path())` works offline."""
    return str(Path(__file__).parent / "sedac_perplexity")
