"""Ways of decoding: the ids by cut FFNs are those by masking, and with the policy off those of the plain base."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    cache_utils,
)

from sedac_hf import SedacForCausalLM
from tests.test_invariants import CUTS, wrapped
from tests.tiny_models import VOCAB, tiny_model, token_ids

PLAIN = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
GREEDY = {**PLAIN, "consistent": True}
SKIPPING = {"rust", "strips", "gather"}


class LongEnough(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 14)


class EvenIdsOnly(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


class NoStream(nullcontext):
    def wait_stream(self, stream):
        pass


# Ways that greedy decoding goes by another road: the ids are the same.
GREEDY_WAYS = {
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "prefill in chunks": {"prefill_chunk_size": 4},
}
OTHER_WAYS = {
    "sampling": {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "stopping criteria": {"stopping_criteria": StoppingCriteriaList([LongEnough()])},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "logits processor": {"logits_processor": LogitsProcessorList([EvenIdsOnly()])},
}
MOVED = {
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[5]]},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa": {"dola_layers": "low"},
}


@pytest.fixture(params=CUTS)
def model(request) -> SedacForCausalLM:
    return wrapped("llama", request.param)


def generated(model: PreTrainedModel, ids: torch.Tensor, **how: object) -> torch.Tensor:
    torch.manual_seed(7)
    return model.generate(ids, **{**PLAIN, **how})


def checked(
    model: SedacForCausalLM, ids: torch.Tensor, base: PreTrainedModel | None = None, **how: object
) -> torch.Tensor:
    """The ids under the policy, after a look that they are those by masking, and those of the base without it."""
    model.reset_stats()
    cut = generated(model, ids, consistent=True, **how)
    stats = model.stats()
    if how.get("use_cache", True) or model.config.cut == "truncate":  # `select` zeroes where many tokens run at once
        assert stats.engines.keys() & SKIPPING, "units were zeroed, not skipped"
    assert stats.needed_bytes_share < 1
    model.runtime.engine = "reference"
    assert torch.equal(generated(model, ids, consistent=True, **how), cut)
    model.runtime.engine = "auto"
    with model.disable():
        plain = generated(model, ids, consistent=True, **how)
    assert torch.equal(plain, generated(base or tiny_model("llama"), ids, **how))
    assert not torch.equal(plain, cut), "the policy changes no id: the test would show nothing"
    return cut


@pytest.mark.parametrize("how", GREEDY_WAYS)
def test_greedy_decoding_by_other_roads(model, how):
    ids = token_ids(1, 7, seed=1)
    got = checked(model, ids, **GREEDY_WAYS[how])
    assert torch.equal(got, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("how", OTHER_WAYS)
def test_ways_of_choosing_tokens(model, how):
    ids = token_ids(1 if "num_beams" in OTHER_WAYS[how] else 2, 7)
    got = checked(model, ids, **OTHER_WAYS[how])
    if how == "stopping criteria":
        assert got.shape == (2, 14)
    if how == "logits processor":
        assert not (got[:, 7:] % 2).any()


@pytest.mark.parametrize("how", MOVED)
def test_modes_that_transformers_has_moved_are_its_own_errors(model, how):
    errors = []
    for each, options in ((tiny_model("llama"), PLAIN), (model, GREEDY)):
        with pytest.raises(ValueError, match="trust_remote_code") as caught:
            each.generate(token_ids(1, 7), **options, **MOVED[how])
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert model.generate(token_ids(1, 7), **GREEDY).shape == (1, 19)


@pytest.mark.parametrize("backend", ["fp8", "hqq", "quanto"])
def test_a_quantised_cache(model, backend):
    options = {"backend": backend}
    if backend == "fp8":
        if not hasattr(cache_utils, "Fp8QuantizedLayer"):
            pytest.skip("this transformers has no cache in fp8")
    else:
        pytest.importorskip({"hqq": "hqq", "quanto": "optimum.quanto"}[backend])
        options |= {"residual_length": 2, "q_group_size": 16}
    checked(model, token_ids(2, 7), cache_implementation="quantized", cache_config=options)


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_whose_streams_do_nothing(model, kind, monkeypatch):
    monkeypatch.setattr(torch, "Stream", NoStream)  # transformers makes one, and without a GPU that is an error
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: NoStream())
    checked(model, token_ids(2, 7), cache_implementation=kind, disable_compile=True)


def test_continuous_batching(model):
    settings = GenerationConfig(**PLAIN)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # or most of the memory is taken for caches
    rows = [token_ids(1, length, seed=length)[0].tolist() for length in (7, 4, 9)]

    def batch(model: PreTrainedModel) -> list[list[int]]:
        outputs = model.generate_batch(rows, generation_config=settings, continuous_batching_config=small)
        return [output.generated_tokens for _, output in sorted(outputs.items())]

    cut = batch(model)
    assert "rust" in model.stats().engines, "no decode step was cut by kernels"
    assert model.stats().needed_bytes_share < 1
    model.runtime.engine = "reference"
    assert batch(model) == cut
    with model.disable():
        assert batch(model) == batch(tiny_model("llama")) != cut
    assert all(0 <= token < VOCAB for row in cut for token in row)
