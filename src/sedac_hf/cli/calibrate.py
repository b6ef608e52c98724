"""`sedac-hf calibrate`: fit a policy for a decoder on text, print the report, save model or adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sedac_hf.cli.loading import DEMO, load_model, load_tokenizer
from sedac_hf.cli.recipes import ConfigOption, RecipeError, is_law, with_flags


def command(
    model: Annotated[str, typer.Argument(help="'demo', a folder or a hub id of a decoder.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Folder to save to; default: print the report only.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text file, .jsonl(.gz), folder of sources, or dataset name.", show_default=False),
    ] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="Calibrate on this Python's standard library (demo: default).")
    ] = False,
    max_ppl_increase: Annotated[
        float | None, typer.Option(help="Budget: largest relative rise of perplexity, e.g. 0.01.", show_default="0.01")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="Instead of a budget: needed share of FFN compute, 0..1.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="latency (select) or throughput (truncate).", show_default="latency")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw.", show_default="0")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per window; default: the model's, at most 2048.")] = None,
    confidence: Annotated[float | None, typer.Option(help="Confidence that the budget holds.")] = None,
    n_levels: Annotated[int | None, typer.Option(help="Keep levels.", show_default="8")] = None,
    probe_rank: Annotated[int | None, typer.Option(help="Rank of the probes.", show_default="64")] = None,
    fit_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to fit on.", show_default="20480")] = None,
    held_out_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to judge the budget by.", show_default="20480")
    ] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Save without the base's weights.")] = False,
    config: ConfigOption = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights' type: float32, bfloat16, float16 or auto (as saved).")] = "auto",
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda:0; default: a GPU where there is one.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Fit the policy that skips most within a perplexity budget, and report what it costs."""
    settings = with_flags(
        config,
        max_ppl_increase=max_ppl_increase,
        share=share,
        objective=objective,
        seed=seed,
        context=context,
        confidence=confidence,
        n_levels=n_levels,
        probe_rank=probe_rank,
        fit_tokens=fit_tokens,
        held_out_tokens=held_out_tokens,
    )
    if is_law(settings):
        raise RecipeError(
            "this recipe is an uncalibrated law, a baseline that `sedac-hf demo` compares with; `calibrate` takes "
            "recipes that hold a budget, such as configs/balanced.yaml"
        )
    texts = calibration_texts(model, text, stdlib)
    loaded = load_model(model, dtype=dtype, device=device)
    words = load_tokenizer(model, loaded, tokenizer)
    if model == DEMO:
        settings.setdefault("context", 256)  # what it was trained at
    report = loaded.calibrate(words, texts, progress=not json_output, **settings)
    if out is not None:
        loaded.save_pretrained(out, adapter_only=adapter_only)
        if not adapter_only:
            words.save_pretrained(out)
    typer.echo(json.dumps(report.to_dict(), indent=1) if json_output else str(report))
    if out is not None and not json_output:
        typer.echo(f"saved to {out}")


def calibration_texts(model: str, text: str | None, stdlib: bool) -> Any:
    """The documents that the flags name; for the embedded decoder the calibration half of its held-out text."""
    from sedac_hf.cli.demo_text import calibration_documents
    from sedac_hf.evaluation import read_documents

    if text is not None and stdlib:
        raise typer.BadParameter("--text and --stdlib name two texts; give one of them")
    if text is not None:
        return read_documents(text)
    if stdlib or model == DEMO:
        return calibration_documents()
    raise typer.BadParameter("calibration needs text like what the model will read: give --text or --stdlib")
