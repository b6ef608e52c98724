"""Show how much each token of a text computes: its keep level after the last checkpoint, under the text.

python examples/per_token_levels.py
"""

from __future__ import annotations

import numpy as np
import torch

from sedac_hf import SedacForCausalLM, load_demo
from sedac_hf.evaluation import stdlib_documents

TEXT = '''def count_words(path):
    """Return how often each word occurs."""
    counts = {}
    with open(path) as file:
        for line in file:
            for word in line.split():
                counts[word] = counts.get(word, 0) + 1
    return counts
'''


@torch.no_grad()
def levels_of(model: SedacForCausalLM, ids: torch.Tensor) -> np.ndarray:
    """Keep levels, uint8 [n_checkpoints, n_tokens], of one sequence [1, n_tokens]."""
    seen: list[np.ndarray] = []
    with model.runtime.observe(on_decision=lambda idx, ratio, levels: seen.append(levels.copy())):
        model(input_ids=ids)
    return np.stack(seen)


# Little text, to be quick: leave the token counts out where the figures matter.
QUICK = {"context": 256, "fit_tokens": 2048, "held_out_tokens": 4096, "progress": False}


def main() -> None:
    decoder, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(decoder)
    texts = [document.text for document in stdlib_documents("heldout")[:24]]
    model.calibrate(tokenizer, texts, share=0.5, **QUICK)

    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    levels = levels_of(model, ids)
    text = marks = ""
    for token, level in zip(ids[0], levels[-1], strict=True):
        piece = tokenizer.decode(token)
        text, marks = text + piece, marks + "".join("\n" if c == "\n" else str(level) for c in piece)
    for line, below in zip(text.splitlines(), marks.splitlines(), strict=True):
        print(f"{line}\n{below}")
    print(f"levels of {model.config.n_levels}; mean after each checkpoint: {levels.mean(axis=1).round(2).tolist()}")


if __name__ == "__main__":
    main()
