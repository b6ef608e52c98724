"""Every causal-LM model type, wrapped: what must hold of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.deciders import SiteUnits
from tests.families import MODEL_TYPES, NOT_BUILT, build
from tests.policies import random_policy
from tests.test_invariants import CUTS, nothing_left

# Refused, and what the error names.
REFUSED = dict.fromkeys(["falcon_mamba", "mamba", "mamba2"], "no FFN")
# No activation can be read: under `select` the hidden units themselves decide.
NO_ACTIVATION = {"minimax_m3_vl_text", "rwkv"}
# A layer that does not run without an image has the first checkpoint: what is behind it runs whole, and is counted.
SKIPS_LAYERS = {"mllama"}
# The base itself gives a left-padded row other logits than the row alone, and why.
PADDING_SHOWS = {
    **dict.fromkeys(
        [
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "musicgen",
            "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr",
        ],
        "it counts positions from a row's first token, padding or not, and takes none from the caller",
    ),
    **dict.fromkeys(["recurrent_gemma", "rwkv", "xlstm"], "its recurrence reads the padding"),
    "blt": "it forms patches of bytes from a row's first one on, padding or not",
    "deepseek_v4": "it compresses windows of tokens from a row's first one on, padding or not",
    "reformer": "it attends in chunks of tokens from a row's first one on, padding or not",
    "xlm": "it attends to all earlier tokens, padding or not",
    "xlnet": "it takes a mask for one row alone",
}  # fmt: skip
if Version(transformers.__version__) < Version("5.24"):
    PADDING_SHOWS["doge"] = "in earlier versions it attends to later tokens too where no mask is needed"
# What `generate` of the base does not do without.
GENERATES_WITH = {
    name: {"decoder_start_token_id": 1, "num_return_sequences": 1} for name in ("musicgen", "musicgen_melody")
}
PADDING = 3
WRAPPED = [name for name in MODEL_TYPES if name not in REFUSED and name not in NOT_BUILT]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", WRAPPED)
@torch.no_grad()
def test_a_wrapped_decoder(model_type: str, cut: str, tmp_path: Path) -> None:
    base, inputs = build(model_type)
    reference = base(**inputs).logits
    spread = reference.std()
    ids = inputs["input_ids"]
    greedy = {"max_new_tokens": 4, "do_sample": False, **GENERATES_WITH.get(model_type, {})}
    row = ids[: _streams(ids)]
    expected = base.generate(row, **greedy)
    positions, difference = _best_of_padding(base, ids)
    assert (difference > 1e-4 * spread) == (model_type in PADDING_SHOWS), "what the base makes of padding has changed"
    model = SedacForCausalLM.from_base(base)
    assert torch.equal(model(**inputs).logits, reference), "a wrapper without a policy changes the logits"
    model.install(random_policy(model.runtime, cut))
    itself = any(isinstance(deciding, SiteUnits) for deciding in model.runtime.weights.shadows)
    assert itself == (cut == "select" and model_type in NO_ACTIVATION)
    got = model(**inputs).logits
    effect = (got - reference).abs().mean()
    assert effect > 1e-3 * spread, "the policy cuts nothing that matters: the test would show nothing"
    model.runtime.engine = "reference"
    masked = model(**inputs).logits
    # A unit, or an expert, at its cut point may fall on either side: a sliver of the effect.
    assert (got - masked).abs().mean() < 0.02 * effect
    model.runtime.engine = "auto"
    if model_type not in PADDING_SHOWS:
        assert _padding_difference(model, ids, positions) < 0.02 * effect, "padding changes a row's logits"
    with model.full_width():
        assert (model(**inputs).logits - reference).abs().mean() < 1e-4 * spread
        assert torch.equal(model.generate(row, **greedy, consistent=True), expected)
    with model.disable():
        assert torch.equal(model(**inputs).logits, reference)
    assert bool(model.stats().fail_safe) == (model_type in SKIPS_LAYERS), "a decision could not be taken"
    _saved_and_loaded_is_the_same(model, inputs, got, tmp_path)
    restored = model.unload()
    assert nothing_left(restored)
    assert torch.equal(restored(**inputs).logits, reference)


def _streams(ids: Tensor) -> int:
    """Rows of ids that make one row of the model: the builder gives two of those."""
    return len(ids) // 2


def _best_of_padding(base: nn.Module, ids: Tensor) -> tuple[bool, Tensor]:
    """Whether the caller is to give position ids, and how little then a left-padded row's logits are off."""
    without, given = (_padding_difference(base, ids, positions) for positions in (False, True))
    return bool(given < without), torch.minimum(without, given)


def _padding_difference(model: nn.Module, ids: Tensor, positions: bool) -> Tensor:
    """Mean difference between the logits of a row that is left-padded to another's length, and of the row alone."""
    n = _streams(ids)
    short = ids[:n, :-PADDING]
    batch = torch.cat((torch.cat((torch.zeros_like(ids[:n, :PADDING]), short), dim=1), ids[n:]))
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[0, :PADDING] = 0
    kwargs = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    alone = model(short).logits
    try:
        padded = model(batch, attention_mask=mask, **kwargs).logits[:n, PADDING:]
    except (RuntimeError, TypeError):  # it takes no such mask, or no positions
        return torch.tensor(torch.inf)
    return (padded - alone).abs().mean()


def _saved_and_loaded_is_the_same(
    model: SedacForCausalLM, inputs: dict[str, Tensor], got: Tensor, folder: Path
) -> None:
    model.save_pretrained(folder)
    assert torch.equal(model(**inputs).logits, got), "saving changed the model"
    loaded = SedacForCausalLM.from_pretrained(folder)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.model.state_dict().items())
    assert loaded.runtime.policy.to_config() == model.runtime.policy.to_config()
    # Loaded weights lie where the file has them, and a matrix product may sum in another order there.
    assert (loaded(**inputs).logits - got).abs().mean() < 1e-6 * got.std()


@pytest.mark.parametrize("model_type", sorted(set(REFUSED) & set(MODEL_TYPES) - set(NOT_BUILT)))
def test_a_decoder_that_is_refused_is_left_alone(model_type):
    base, inputs = build(model_type)
    with torch.no_grad():
        reference = base(**inputs).logits
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            SedacForCausalLM.from_base(base)
        assert nothing_left(base)
        assert torch.equal(base(**inputs).logits, reference)
