"""`sedac-hf eval ppl`: perplexity, dense and with SEDAC in the same run, with everything that it depends on.

Under `accelerate launch -m sedac_hf.cli.main eval ppl ...` the processes share the windows and give the same figure.
"""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_hf.cli.loading import DEMO, ExtraMemoryOption, load_model, load_tokenizer
from sedac_hf.errors import EvaluationError

if TYPE_CHECKING:
    from sedac_hf.evaluation import Comparison

app = typer.Typer(help="Measure quality.", no_args_is_help=True)

_DEMO_CONTEXT = 256  # what the embedded decoder was trained at; its positions reach further, its training did not


class ProtocolName(str, Enum):
    """The protocols as values of a flag."""

    sliding = "sliding"
    windows = "windows"
    document = "document"


@app.callback()
def _measure() -> None:
    pass  # keeps `ppl` a sub-command while it is the only one


@app.command()
def ppl(
    model: Annotated[str, typer.Argument(help="'demo', a folder or a hub id: SEDAC model, adapter or plain decoder.")],
    dataset: Annotated[
        str | None, typer.Option(help="Dataset of the hub, or a file or folder that holds one.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file, .jsonl(.gz), or folder of source files.", show_default=False)
    ] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib", help="The held-out files of this Python's standard library (demo: default).")
    ] = False,
    dataset_config: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset.")] = "test",
    column: Annotated[str | None, typer.Option(help="Column that holds the text; default: text.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download the whole dataset.")] = False,
    join: Annotated[
        str | None, typer.Option(help=r"Join documents by this string (\n for a line end) instead of end-of-text.")
    ] = None,
    protocol: Annotated[ProtocolName, typer.Option(help="How the text is cut into windows.")] = ProtocolName.sliding,
    context: Annotated[int | None, typer.Option(help="Tokens per window; default: the model's, at most 2048.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows; default: half the context.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop after so many scored tokens.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights' type: float32, bfloat16, float16 or auto (as saved).")] = "auto",
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda:0; default: a GPU where there is one.")] = None,
    extra_memory: ExtraMemoryOption = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward call.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the model's.")] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of the interval and the bound.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Perplexity of a model, dense and with SEDAC in the same run."""
    texts = _texts(model, dataset, text, stdlib, dataset_config, split, column, streaming)
    from sedac_hf.evaluation import compare
    from sedac_hf.evaluation.processes import is_main_process, leave, local_device

    place = device or local_device()
    loaded = load_model(model, dtype=dtype, device=None if place is None else str(place), extra_memory=extra_memory)
    if context is None and model == DEMO:
        context = _DEMO_CONTEXT
    result = compare(
        loaded,
        load_tokenizer(model, loaded, tokenizer),
        texts,
        protocol=protocol.value,
        context=context,
        stride=stride,
        join=None if join is None else join.replace(r"\n", "\n").replace(r"\t", "\t"),
        max_tokens=max_tokens,
        batch_size=batch_size,
        confidence=confidence,
        seed=seed,
        progress=not json_output,
    )
    calibrated = loaded.runtime.policy is not None
    if is_main_process() and json_output:
        typer.echo(json.dumps({"model": model, "calibrated": calibrated, **result.to_dict()}, indent=1))
    elif is_main_process():
        _print(model, result, calibrated)
    leave()


def _texts(
    model: str,
    dataset: str | None,
    text: Path | None,
    stdlib: bool,
    config: str | None,
    split: str,
    column: str | None,
    streaming: bool,
) -> Any:
    given = [name for name, value in (("--dataset", dataset), ("--text", text), ("--stdlib", stdlib)) if value]
    if len(given) > 1 or (not given and model != DEMO):
        raise EvaluationError(
            f"one of --dataset, --text and --stdlib must say what to evaluate on, got {' and '.join(given) or 'none'}"
        )
    from sedac_hf.evaluation import read_documents, stdlib_documents

    if text is not None:
        if not text.exists():
            raise EvaluationError(f"--text must be a file or a folder, there is none at {text}")
        return read_documents(text, column=column, split=split)
    if dataset is not None:
        return read_documents(dataset, config=config, split=split, column=column, streaming=streaming)
    return stdlib_documents("heldout")


def _print(model: str, result: Comparison, calibrated: bool) -> None:
    dense, cut = result.dense, result.cut
    start = "" if cut.bos == "none" else f", start token: {cut.bos}"
    typer.echo(
        f"{model}: protocol {cut.protocol}, context {cut.context}, stride {cut.stride}{start}, between documents "
        f"{cut.separator!r}"
    )
    typer.echo(
        f"{cut.tokens:,} tokens of {len(cut.document_names)} {result.unit} scored, {cut.dtype}, device {cut.device}"
    )
    typer.echo(f"{'':<8}{'perplexity':>12}{'nats/token':>12}{'bits/byte':>12}")
    for name, figures in (("dense", dense), ("SEDAC", cut)):
        typer.echo(f"{name:<8}{figures.perplexity:>12.4f}{figures.mean_nll:>12.5f}{figures.bits_per_byte:>12.5f}")
    line = f"perplexity {result.relative_increase:+.3%}"
    if result.interval is None or result.upper is None:
        typer.echo(f"{line} (too little text for an interval)")
    else:
        low, high = result.interval
        typer.echo(
            f"{line}, {result.confidence:.0%} bootstrap interval over {result.unit} {low:+.3%} to {high:+.3%}; upper "
            f"bound {result.upper:+.3%}"
        )
    if not calibrated:
        typer.echo("the model is uncalibrated: it skips nothing (see `sedac-hf calibrate`)")
    elif result.stats is not None:
        stats = result.stats
        typer.echo(
            f"FFN not needed: {1 - stats['needed_bytes_share']:.1%} of weight bytes, "
            f"{1 - stats['needed_multiply_adds_share']:.1%} of multiply-adds, all FFNs and tokens, costs counted; "
            f"saved in this run: {stats['saved_bytes_share']:.1%} and {stats['saved_multiply_adds_share']:.1%}"
        )
