"""What one of two ranks does: `python -m tests.tensor_parallel FOLDER`, with RANK, WORLD_SIZE, MASTER_* set.

FOLDER holds, per case, a saved base, two SEDAC adapters and the inputs to run. Results go to ``FOLDER/rank<r>.pt``;
nothing is judged here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import SedacError
from sedac_hf.ffn.linears import weight_of
from tests.margins import decisions

FAMILIES = ("llama", "starcoder2")
GATHERED = "phi3"  # its gate and up, one linear, are gathered before down
PROMPT, NEW_TOKENS = 4, 4


def continued(model: Any, prompt: torch.Tensor) -> torch.Tensor:
    """The prompt and what the cut model makes of it, int64 [rows, PROMPT + NEW_TOKENS]."""
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    ids: torch.Tensor = model.generate(prompt, do_sample=False, prompt="cut", consistent=True, **length)
    return ids


def input_gradient(model: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Of a cut forward pass, with respect to the embeddings [rows, length, d] that went in."""
    embeddings = embeddings.clone().requires_grad_()
    model(inputs_embeds=embeddings).logits.square().mean().backward()
    assert embeddings.grad is not None
    return embeddings.grad


def run_case(folder: Path) -> dict[str, Any]:
    """One family: dense, both cuts, generation, what is restored, what is refused."""
    found: dict[str, Any] = {}
    inputs = torch.load(folder / "inputs.pt")
    ids, embeddings = inputs["ids"], inputs["embeddings"]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto").eval()
    with torch.no_grad():
        found["dense"] = base(ids).logits
    for cut in ("truncate", "select"):
        model = SedacForCausalLM.from_pretrained(folder / cut, base_model=base)
        sites = model.runtime.sites
        with torch.no_grad():
            found[cut] = model(ids).logits
        found[f"{cut} gradient"] = input_gradient(model, embeddings)
        found[f"{cut} ids"] = continued(model, ids[:, :PROMPT])
        found[f"{cut} choices"] = list(model.stats().choices)
        if cut == "select":
            found["used"] = decisions(model, input_ids=ids).used + decisions(model, inputs_embeds=embeddings).used
        found[f"{cut} engines"] = model.stats().engines
        found[f"{cut} widths"] = [
            [point.width for point in row] for row in model.runtime.running_policy.schedule.points
        ]
        found[f"{cut} saved policy"] = model.runtime.policy.to_tensors()
        found[f"{cut} down"] = [weight_of(site.down).detach().clone() for site in sites]
        found["shards"] = [(site.shard.rank, site.shard.ranks, site.intermediate_size) for site in sites]
        for name, call in (
            ("calibrate", lambda model=model: model.calibrate(None, [])),
            ("save", lambda model=model: model.save_pretrained(folder / "whole")),
        ):
            try:
                call()
                found[f"{name} refused"] = ""
            except SedacError as error:
                found[f"{name} refused"] = str(error)
        if dist.get_rank() == 0:  # alone: nothing in it may wait for the others
            model.save_pretrained(folder / f"{cut} again", adapter_only=True)
        base = model.unload()
        with torch.no_grad():
            found[f"{cut} unloaded"] = base(ids).logits
        found["natural down"] = [weight_of(site.down).detach().clone() for site in sites]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        results = {family: run_case(folder / family) for family in FAMILIES}
        gathered = AutoModelForCausalLM.from_pretrained(folder / GATHERED, tp_plan="auto")
        try:
            SedacForCausalLM.from_base(gathered)
        except SedacError as error:
            results[GATHERED] = {"refused": str(error)}
        torch.save(results, folder / f"rank{os.environ['RANK']}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
