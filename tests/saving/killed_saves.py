"""Saves over an older save that are killed at each of their steps: `python -m tests.saving.killed_saves FOLDER`.

FOLDER/old holds the older save and files of a user. Prints JSON, one entry per step: what lies in the folder then.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from sedac_hf import SedacForCausalLM
from tests.tiny_models import token_ids

STEPS = ("open", "os.", "shutil.", "tempfile.")


def kill_at(step: int, folder: Path) -> None:
    """Let this process die right before so many file-system calls below the folder are made."""
    left = step

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event.startswith(STEPS) and any(isinstance(a, str | Path) and str(folder) in str(a) for a in args):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ids = token_ids()
    with torch.no_grad():
        old = SedacForCausalLM.from_pretrained(folder / "old")
        old_logits = old(ids).logits
        new = SedacForCausalLM.from_pretrained(folder / "new")
        new_logits = new(ids).logits
        seen = []
        for step in range(200):
            work = folder / f"work{step}"
            shutil.copytree(folder / "old", work / "saved")
            child = os.fork()
            if child == 0:
                kill_at(step, work)
                new.save_pretrained(work / "saved")
                os._exit(0)
            finished = os.waitpid(child, 0)[1] == 0
            logits = SedacForCausalLM.from_pretrained(work / "saved")(ids).logits
            which = {True: "old", False: "other"}[torch.equal(logits, old_logits)]
            which = "new" if torch.equal(logits, new_logits) else which
            kept = (work / "saved/tokenizer.json").read_text() == "mine"
            seen.append([which, kept, finished])
            shutil.rmtree(work)
            if finished:
                break
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
