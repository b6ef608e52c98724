"""`sedac-hf generate`: complete a prompt, and say what it took."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sedac_hf.cli.loading import ExtraMemoryOption, load_model, load_tokenizer


def command(
    model: Annotated[str, typer.Argument(help="'demo', a folder or a hub id: SEDAC model, adapter or plain decoder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --sample.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams.")] = 1,
    consistent: Annotated[
        bool, typer.Option("--consistent", help="Cut as calibrated even where that does not pay.")
    ] = False,
    prompt_width: Annotated[
        str | None, typer.Option(help="full or cut: how the prompt itself runs.", show_default="by the cut")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print what ran.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of --sample.")] = 0,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id; default: the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Weights' type: float32, bfloat16, float16 or auto (as saved).")] = "auto",
    device: Annotated[str | None, typer.Option(help="E.g. cpu, cuda:0; default: a GPU where there is one.")] = None,
    extra_memory: ExtraMemoryOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print text, ids and statistics as JSON.")] = False,
) -> None:
    """Complete a prompt."""
    import torch
    from transformers import TextStreamer

    loaded = load_model(model, dtype=dtype, device=device, extra_memory=extra_memory)
    words = load_tokenizer(model, loaded, tokenizer)
    inputs = words(prompt, return_tensors="pt").to(loaded.device)
    if inputs["input_ids"].shape[1] == 0:
        raise typer.BadParameter("the prompt must hold at least one token")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": sample, "num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if sample:
        options |= {"temperature": temperature, "top_p": top_p}
    if not json_output and num_beams == 1:
        options["streamer"] = TextStreamer(words, skip_special_tokens=True)
    ids = loaded.generate(**inputs, **options, consistent=consistent, prompt=prompt_width)
    text = words.decode(ids[0], skip_special_tokens=True)
    if json_output:
        typer.echo(json.dumps({"text": text, "ids": ids[0].tolist(), "stats": loaded.stats().to_dict()}, indent=1))
        return
    if "streamer" not in options:
        typer.echo(text)
    if stats:
        loaded.print_summary()
