"""`sedac-hf calibrate`: fit a policy for a decoder on text, print the report, save model or adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sedac_hf.cli.loading import DEMO, ExtraMemoryOption, load_model, load_tokenizer
from sedac_hf.cli.recipes import LAW_KEYS, ConfigOption, is_law, law_of, with_flags

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM

LAW_NOTE = (
    "the recipe's law is installed uncalibrated, as a baseline: probes and channel order were fitted, thresholds are "
    "the recipe's; `sedac-hf eval ppl` measures it"
)


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
    probe_rank: Annotated[
        int | None, typer.Option(help="Rank of the probes.", show_default="at most 64, by width")
    ] = None,
    fit_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to fit on.")] = None,
    held_out_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to judge the budget by.")] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Save without the base's weights.")] = False,
    config: ConfigOption = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights' type: float32, bfloat16, float16 or auto (as saved).")] = "auto",
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda:0; default: a GPU where there is one.")] = None,
    extra_memory: ExtraMemoryOption = None,
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
        extra_memory=extra_memory,
    )
    law = {name: settings.pop(name) for name in LAW_KEYS & set(settings)} if is_law(settings) else None
    texts = calibration_texts(model, text, stdlib)
    loaded = load_model(model, dtype=dtype, device=device, extra_memory=settings.pop("extra_memory", None))
    words = load_tokenizer(model, loaded, tokenizer)
    if model == DEMO:
        settings.setdefault("context", 256)  # what it was trained at
    if law is not None:
        loaded = with_law(loaded, words, texts, law, progress=not json_output, **settings)
        figures, table = {"law": loaded.config.layer_configs}, LAW_NOTE
    else:
        report = loaded.calibrate(words, texts, progress=not json_output, **settings)
        figures, table = report.to_dict(), str(report)
    if out is not None:
        loaded.save_pretrained(out, adapter_only=adapter_only)
        if not adapter_only:
            words.save_pretrained(out)
    typer.echo(json.dumps(figures, indent=1) if json_output else table)
    if out is not None and not json_output:
        typer.echo(f"saved to {out}")


def with_law(
    loaded: SedacForCausalLM, tokenizer: Any, texts: Any, law: dict[str, Any], **settings: Any
) -> SedacForCausalLM:
    """The model under a recipe's uncalibrated law: probes and order are fitted, thresholds are the recipe's."""
    from sedac_hf.calibration.baselines import law_policy
    from sedac_hf.configuration import SedacConfig
    from sedac_hf.modeling import SedacForCausalLM

    values = law_of(law, len(loaded.runtime.decoder_layers))
    base = loaded.unload()
    n_levels = values.pop("n_levels", None)
    config = SedacConfig(base.config, layer_configs=values["layer_configs"], extra_memory=loaded.config.extra_memory)
    model = SedacForCausalLM.from_base(base, config)
    if n_levels is not None:
        settings["n_levels"] = n_levels
    # any position of the dial fits probes and order; a share is the one that always exists
    model.calibrate(tokenizer, texts, objective="throughput", share=0.9, refit_compensation=False, **settings)
    policy = model.runtime.policy
    assert policy is not None
    defaults = {"confidence_decay": model.config.confidence_decay, "soft_exit": True, "alpha": model.config.alpha}
    model.install(law_policy(model.runtime, policy, **{**defaults, **values}))
    model.calibration_report = None
    return model


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
