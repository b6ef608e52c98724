"""`sedac-hf demo`: calibrate the embedded decoder, compare with the baselines, draw, complete a function; then the
speed of a larger decoder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.evaluation import DocumentScores, WindowSet
    from sedac_hf.evaluation.quality import QualityRow
    from sedac_hf.modeling import SedacForCausalLM

CONTEXT = 256  # what the embedded decoder was trained at
BASELINE_LEVELS = (6, 4)
HARD_EXIT_SCALES = (0.5, 1.0)
PROMPT = 'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file."""\n'


def command(
    out: Annotated[Path, typer.Option(help="Folder for the plot, the table and the calibrated model.")] = Path(
        "sedac-demo"
    ),
    budgets: Annotated[str, typer.Option(help="Perplexity budgets, comma-separated.")] = "0.01,0.025",
    tokens: Annotated[int, typer.Option(min=2 * CONTEXT, help="Held-out tokens to score.")] = 24_576,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the completion.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the calibration.")] = 0,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="End with the speed of a 0.5B shape: a minute, up to 2.5 GB.")
    ] = True,
    json_output: Annotated[bool, typer.Option("--json", help="Print the table as JSON only.")] = False,
) -> None:
    """Everything once, on the decoder that ships with the package: a few minutes on two cores."""
    from sedac_hf.assets import load_demo
    from sedac_hf.cli.demo_speed import print_speed, speed_on_this_machine
    from sedac_hf.cli.demo_text import calibration_documents, evaluation_documents
    from sedac_hf.evaluation import score
    from sedac_hf.evaluation.quality import dense_row, measure, spread_windows
    from sedac_hf.modeling import SedacForCausalLM

    started = time.monotonic()
    wanted = parse_budgets(budgets)
    base, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(base)
    windows = spread_windows(evaluation_documents(), tokenizer, context=CONTEXT, tokens=tokens)
    say = (lambda _: None) if json_output else typer.echo
    say(f"dense perplexity on {windows.n_tokens} held-out tokens ({windows.protocol}, context {CONTEXT}) ...")
    dense = score(model, windows, progress=not json_output)
    rows = [dense_row(dense)]
    texts = calibration_documents()
    for objective in ("throughput", "latency"):
        for budget in wanted:
            say(f"calibrating: objective {objective}, at most +{budget:.1%} perplexity ...")
            report = model.calibrate(
                tokenizer,
                texts,
                max_ppl_increase=budget,
                objective=objective,
                context=CONTEXT,
                seed=seed,
                progress=not json_output,
            )
            say(str(report))
            name = f"SEDAC {model.config.cut}, budget {budget:.1%}"
            rows.append(measure(model, windows, dense, name, f"SEDAC {model.config.cut}"))
        if objective == "throughput":
            say("baselines ...")
            rows[1:1] = list(_baselines(model, windows, dense))
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    result: dict[str, Any] = {
        "tokens_scored": int(dense.tokens.sum()),
        "protocol": windows.protocol,
        "context": CONTEXT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "rows": [asdict(row) for row in rows],
    }
    _write(result, out)
    if json_output:
        if speed:
            result["speed"] = speed_on_this_machine()
            _write(result, out)
        typer.echo(json.dumps(result, indent=1))
        return
    print_table(rows, result)
    _draw(rows, out / "perplexity_against_compute.png")
    from sedac_hf.cli.per_token import print_completion

    print_completion(model, tokenizer, PROMPT, new_tokens)
    if speed:
        typer.echo("\nmaking a larger decoder to time ...")
        result["speed"] = speed_on_this_machine()
        _write(result, out)
        print_speed(result["speed"])
    typer.echo(f"\n{time.monotonic() - started:.0f} s in all; table, plot and calibrated model are in {out}/")


def _write(result: dict[str, Any], out: Path) -> None:
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse_budgets(text: str) -> list[float]:
    """Budgets from a comma-separated list, each above 0 and below 1."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(0 < value < 1 for value in values):
        raise ConfigError(f"`--budgets` must be numbers between 0 and 1 separated by commas, got {text!r}")
    return values


def _baselines(model: SedacForCausalLM, windows: WindowSet, dense: DocumentScores) -> Iterator[QualityRow]:
    """V6.0, constant levels in natural and in importance order, V6.1 as designed; the policy is put back."""
    import torch

    from sedac_hf.calibration import baselines
    from sedac_hf.evaluation.quality import measure

    runtime, kept = model.runtime, model.runtime.policy
    assert kept is not None
    batches = [torch.as_tensor(window.input_ids)[None] for window in windows.windows[:64]]
    risks = baselines.probe_risks(runtime, kept, batches)
    for scale in HARD_EXIT_SCALES:
        model.install(baselines.hard_exit_policy(runtime, kept, risks, scale=scale))
        name = f"V6.0 hard exit, {scale:g} x the design's exit rates"
        yield measure(model, windows, dense, name, "V6.0 hard exit")
    for importance_order in (False, True):
        order = "importance" if importance_order else "natural"
        model.install(baselines.plain_policy(runtime, kept, importance_order=importance_order))
        for level in BASELINE_LEVELS:
            name = f"constant {level}/{kept.n_levels}, {order} order"
            forced = runtime.forced_levels(level)
            yield measure(model, windows, dense, name, f"constant, {order} order", forced)
    model.install(baselines.design_policy(runtime, kept, risks))
    yield measure(model, windows, dense, "V6.1, the design's weights", "V6.1 as designed")
    model.install(kept)


def print_table(rows: list[QualityRow], result: dict[str, Any]) -> None:
    """The comparison as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Embedded decoder, {result['tokens_scored']} held-out tokens, {result['protocol']}, context "
        f"{result['context']}, {result['dtype']}; shares of all FFNs and tokens, what decides counted as cost",
        title_justify="left",
    )
    for heading in ("", "perplexity", "increase", "95% interval", "bytes not needed", "multiply-adds not needed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.perplexity:.3f}",
            f"{row.increase:+.2%}",
            f"{row.low:+.2%} .. {row.high:+.2%}" if row.kind != "dense" else "",
            f"{row.bytes_not_needed:.1%}",
            f"{row.multiply_adds_not_needed:.1%}",
        )
    Console(width=max(Console().width, 120)).print(table)


def _draw(rows: list[QualityRow], path: Path) -> None:
    try:
        from sedac_hf.cli.demo_plot import draw
    except ImportError:
        typer.echo("no plot: it needs matplotlib (the extra `eval`: pip install 'sedac-hf[eval]')", err=True)
        return
    draw(rows, path)
    typer.echo(f"plot: {path}")
