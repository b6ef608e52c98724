"""Ways that transformers computes attention, each in three precisions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ops.compiled import stand_in
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

# Largest mean difference to masking, as a share of what the cut changes. Under `select` a unit whose importance is at
# the threshold to rounding may fall on either side: in half precision that is one of some units.
SLIVER = {
    ("truncate", torch.float32): 1e-4,
    ("truncate", torch.bfloat16): 0.05,
    ("truncate", torch.float16): 0.01,
    ("select", torch.float32): 1e-3,
    ("select", torch.bfloat16): 0.2,
    ("select", torch.float16): 0.1,
}


def logits_of(model: torch.nn.Module, ids: Tensor, prompt: int) -> Tensor:
    """float32 [1, n, V]: a prompt of that many tokens, the others one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for t in range(prompt, ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1).float()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(("cut", "dtype"), SLIVER, ids=lambda value: str(value).removeprefix("torch."))
@torch.no_grad()
def test_attention_in_each_precision(cut, dtype, attention):
    options = {"dtype": dtype, "attn_implementation": attention}
    base, ids = tiny_model("llama", **options), token_ids(1, 20, seed=1)
    model = SedacForCausalLM.from_base(tiny_model("llama", **options), SedacConfig(base.config, extra_memory=0.5))
    assert base.config._attn_implementation == model.model.config._attn_implementation == attention
    model.install(random_policy(model.runtime, cut))
    # flex_attention is compiled for each kind of shape, which takes seconds
    prompt = 17 if attention != "flex_attention" else 19 if dtype == torch.float32 else 20
    dense = logits_of(base, ids, prompt)
    model.reset_stats()
    got, stats = logits_of(model, ids, prompt), model.stats()
    assert stats.needed_bytes_share < 1
    assert ("rust" in stats.engines) == (prompt < 20 or stand_in(dtype))
    model.runtime.engine = "reference"
    masked = logits_of(model, ids, prompt)
    effect = (masked - dense).abs().mean()
    assert effect > 0.1 * dense.std()
    assert (got - masked).abs().mean() < SLIVER[cut, dtype] * effect
    with model.disable():
        assert torch.equal(logits_of(model, ids, prompt), dense)
