"""Show, token by token, how much of the FFNs a completion skipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from sedac_hf.evaluation.per_token import completion_ratios

if TYPE_CHECKING:
    from sedac_hf.modeling import SedacForCausalLM


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
