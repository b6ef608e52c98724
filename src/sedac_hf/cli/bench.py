"""`sedac-hf bench`: time of one model, dense and with SEDAC, in one interleaved run on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from sedac_hf.cli.env import machine
from sedac_hf.cli.loading import ExtraMemoryOption, load_model


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="'demo', a folder or a hub id: SEDAC model, adapter or plain decoder.", show_default=False
        ),
    ],
    work: Annotated[
        Literal["generate", "forward"],
        typer.Option(help="generate: prompt and new tokens; forward: the prompt alone."),
    ] = "generate",
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt length, in tokens.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per row.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements per variant; the median is quoted.")] = 5,
    dtype: Annotated[str, typer.Option(help="Weights' type: float32, bfloat16, float16 or auto (as saved).")] = "auto",
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda:0; default: a GPU where there is one.")] = None,
    extra_memory: ExtraMemoryOption = None,
    consistent: Annotated[
        bool, typer.Option("--consistent", help="Cut even where full width would be quicker.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random prompt.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time dense, full width and SEDAC in turn, and print the medians and their ratio."""
    from sedac_hf.evaluation.speed import compare_speed

    loaded = load_model(model, dtype=dtype, device=device, extra_memory=extra_memory)
    extra = {"consistent": True} if consistent else {}
    report = compare_speed(
        loaded,
        work=work,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        seed=seed,
        **extra,
    )
    if json_output:
        typer.echo(json.dumps({"model": model, "cpu": machine(), **report.to_dict()}, indent=2))
        return
    typer.echo(
        f"{model}: {report.work}, {batch} x {prompt_tokens} prompt tokens, {report.new_tokens} new tokens per row"
    )
    typer.echo(f"{machine()['processor']}, {report.threads} threads, device {report.device}, {report.dtype}")
    for name, median in report.medians.items():
        low, high = min(report.seconds[name]), max(report.seconds[name])
        typer.echo(f"  {name:<12} {1e3 * median:10.2f} ms   (median of {rounds}; {1e3 * low:.2f} to {1e3 * high:.2f})")
    typer.echo(f"SEDAC time / dense time = {report.ratio:.3f}  (below 1 is faster)")
    for text, count in report.choices.items():
        typer.echo(f"  generate: {text} ({count} calls)")
