"""Every causal-LM model type, wrapped: the invariants that one forward call can show."""

from __future__ import annotations

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import UnsupportedModelError
from tests.families import MODEL_TYPES, NOT_BUILT, build
from tests.policies import random_policy
from tests.test_invariants import CUTS, nothing_left

# Refused, and what the error names.
REFUSED = dict.fromkeys(["falcon_mamba", "mamba", "mamba2"], "no FFN")
# `select` is refused: no activation can be read.
NO_ACTIVATION = {"minimax_m3_vl_text", "rwkv"}
# A layer that does not run without an image has the first checkpoint: what is behind it runs whole, and is counted.
SKIPS_LAYERS = {"mllama"}
WRAPPED = [name for name in MODEL_TYPES if name not in REFUSED and name not in NOT_BUILT]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", WRAPPED)
@torch.no_grad()
def test_a_wrapped_decoder(model_type, cut):
    base, inputs = build(model_type)
    reference = base(**inputs).logits
    spread = reference.std()
    model = SedacForCausalLM.from_base(base)
    assert torch.equal(model(**inputs).logits, reference), "a wrapper without a policy changes the logits"
    if cut == "select" and model_type in NO_ACTIVATION:
        with pytest.raises(UnsupportedModelError, match="activation"):
            model.install(random_policy(model.runtime, cut))
    else:
        model.install(random_policy(model.runtime, cut))
        got = model(**inputs).logits
        effect = (got - reference).abs().mean()
        assert effect > 1e-3 * spread, "the policy cuts nothing that matters: the test would show nothing"
        model.runtime.engine = "reference"
        masked = model(**inputs).logits
        # A unit, or an expert, at its cut point may fall on either side: a sliver of the effect.
        assert (got - masked).abs().mean() < 0.02 * effect
        model.runtime.engine = "auto"
        with model.full_width():
            assert (model(**inputs).logits - reference).abs().mean() < 1e-4 * spread
        with model.disable():
            assert torch.equal(model(**inputs).logits, reference)
        assert bool(model.stats().fail_safe) == (model_type in SKIPS_LAYERS), "a decision could not be taken"
    restored = model.unload()
    assert nothing_left(restored)
    assert torch.equal(restored(**inputs).logits, reference)


@pytest.mark.parametrize("model_type", sorted(set(REFUSED) & set(MODEL_TYPES) - set(NOT_BUILT)))
def test_a_decoder_that_is_refused_is_left_alone(model_type):
    base, inputs = build(model_type)
    with torch.no_grad():
        reference = base(**inputs).logits
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            SedacForCausalLM.from_base(base)
        assert nothing_left(base)
        assert torch.equal(base(**inputs).logits, reference)
