"""Token by token: how much of the FFNs a completion skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class TokenRatio:
    """One generated token and the law's ratio (share skipped, mean over the checkpoints) of the step that made it."""

    text: str
    ratio: float


def completion_ratios(model: Any, tokenizer: Any, text: str, new_tokens: int, **options: Any) -> list[TokenRatio]:
    """Greedy completion, cut as calibrated; the first token comes from the prompt's own pass.

    Args:
        model: a calibrated `SedacForCausalLM`; one row is decoded.
        new_tokens: at most so many.
        options: further arguments of ``generate``.
    """
    steps: list[list[float]] = []

    def keep(idx: int, ratio: np.ndarray, levels: np.ndarray) -> None:
        if idx == 0:
            steps.append([])
        steps[-1].append(float(ratio[-1]))

    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "consistent": True, **options}
    with model.runtime.observe(on_decision=keep):
        ids = model.generate(**inputs, **settings)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    missing = len(new) - len(steps)  # the prompt's pass, where it ran at full width, decided nothing
    ratios = [0.0] * missing + [float(np.mean(step)) for step in steps]
    return [TokenRatio(tokenizer.decode([token]), ratio) for token, ratio in zip(new, ratios, strict=True)]
