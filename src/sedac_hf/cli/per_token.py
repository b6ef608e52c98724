"""Show, token by token, how much of the FFNs a completion skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM


@dataclass(frozen=True)
class TokenRatio:
    """One generated token and the law's ratio (share skipped, mean over the checkpoints) of the step that made it."""

    text: str
    ratio: float


def completion_ratios(
    model: SedacForCausalLM, tokenizer: Any, prompt: str, new_tokens: int, **options: Any
) -> list[TokenRatio]:
    """Greedy completion, cut as calibrated; the first token comes from the prompt's own pass.

    Args:
        model: calibrated; one row is decoded.
        new_tokens: at most so many.
        options: further arguments of ``generate``.
    """
    steps: list[list[float]] = []

    def keep(idx: int, ratio: np.ndarray, levels: np.ndarray) -> None:
        if idx == 0:
            steps.append([])
        steps[-1].append(float(ratio[-1]))

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "consistent": True, **options}
    with model.runtime.observe(on_decision=keep):
        ids = model.generate(**inputs, **settings)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    missing = len(new) - len(steps)  # the prompt's pass, where it ran at full width, decided nothing
    ratios = [0.0] * missing + [float(np.mean(step)) for step in steps]
    return [TokenRatio(tokenizer.decode([token]), ratio) for token, ratio in zip(new, ratios, strict=True)]


def print_completion(model: SedacForCausalLM, tokenizer: Any, prompt: str, new_tokens: int) -> None:
    """Print a completion; under each line the tenths of the FFN units that each token skipped."""
    tokens = completion_ratios(model, tokenizer, prompt, new_tokens)
    console = Console()
    console.print(
        "\nA completion, and under each token the tenths of the later FFNs that it skipped:", highlight=False
    )
    console.print(Text(prompt, style="dim"), end="")
    line, digits = Text(), ""
    for token in tokens:
        style = f"on rgb({int(40 + 40 * token.ratio)},{int(40 + 140 * token.ratio)},60)"
        for part in token.text.splitlines(keepends=True) or [""]:
            shown = part.rstrip("\n")
            line.append(shown, style=style)
            digits += (f"{min(int(token.ratio * 10), 9)}" + " " * (len(shown) - 1)) if shown else ""
            if part.endswith("\n"):
                _flush(console, line, digits)
                line, digits = Text(), ""
    _flush(console, line, digits)
    console.print(f"mean over the completion: {np.mean([token.ratio for token in tokens]):.2f}", highlight=False)


def _flush(console: Console, line: Text, digits: str) -> None:
    if line.plain.strip():
        console.print(line, highlight=False)
        console.print(Text(digits, style="dim"), highlight=False)
