"""Decoders whose layers run in loops, or not all: the cascade begins anew, a missing checkpoint means full width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from sedac_hf import ConfigError, SedacForCausalLM
from sedac_hf.configuration import SedacConfig
from sedac_hf.layer_config import default_layer_configs
from sedac_hf.ops.compiled import available
from sedac_hf.runtime.observation import counting_layers
from tests.families import build
from tests.policies import N_LEVELS, random_policy
from tests.runtime.test_captured import compile_config
from tests.test_invariants import CUTS, assert_same

LOOPED = ["hrm_text", "looped"]


class Looped(nn.ModuleList):
    """Decoder layers of which the middle ones run twice; not for caches, which know a layer once."""

    def __getitem__(self, idx):
        if not isinstance(idx, slice):
            return super().__getitem__(idx)
        first, *middle, last = self
        return [first, *middle, *middle, last]


def looped():
    base, inputs = build("llama", use_cache=False)
    base.model.layers = Looped(base.model.layers)
    return base, inputs


def wrapped(model_type, cut="truncate", layers=None, *, compensate=True, **config):
    base, inputs = looped() if model_type == "looped" else build(model_type)
    if layers is not None:
        config["layer_configs"] = default_layer_configs(layers)
    model = SedacForCausalLM.from_base(base, SedacConfig(base.config, **config))
    model.install(random_policy(model.runtime, cut, compensate=compensate))
    return model, inputs["input_ids"]


def decisions(model, ids):
    """What one forward decided: (checkpoint_idx, levels), in order."""
    seen = []
    with model.runtime.observe(on_decision=lambda idx, ratio, levels: seen.append((idx, levels))):
        model(ids)
    return seen


@pytest.mark.parametrize("model_type", ["hrm_text", "longcat_flash", "blt"])
def test_default_checkpoints_are_layers_that_there_are(model_type):
    base, _ = build(model_type)
    for config in (None, SedacConfig(base.config, engine="reference")):
        model = SedacForCausalLM.from_base(base, config)
        n_layers = len(model.runtime.decoder_layers)
        assert model.runtime.checkpoint_layers[-1] < max(n_layers - 1, 1)
        assert model.config.checkpoint_layers == model.runtime.checkpoint_layers
        assert len(model.config.cascade) == len(model.runtime.checkpoint_layers)
    n_named = getattr(base.config.get_text_config(decoder=True), "num_hidden_layers", None)
    assert n_named != n_layers, "the configuration tells the number: the test shows nothing"


def test_layers_that_were_chosen_stay_or_are_refused():
    base, _ = build("longcat_flash")
    config = SedacConfig(base.config, layer_configs=default_layer_configs((0, 2)))
    assert SedacForCausalLM.from_base(base, config).runtime.checkpoint_layers == (0, 2)
    with pytest.raises(ConfigError, match=r"must be in 0\.\.3"):
        SedacForCausalLM.from_base(base, SedacConfig(base.config, layer_configs=default_layer_configs((1, 7))))


@torch.no_grad()
@pytest.mark.parametrize("controller", ["rust", "python"])
@pytest.mark.parametrize(("model_type", "layers"), [("hrm_text", None), ("looped", None), ("looped", (0, 2))])
def test_a_checkpoint_that_comes_again_begins_the_cascade_anew(model_type, layers, controller):
    if controller == "rust" and not available():
        pytest.skip("the compiled module is not installed")
    model, ids = wrapped(model_type, layers=layers, controller=controller)
    seen, risks, step = [], [], model.runtime.captured._risks

    def risk(idx, hidden, n_tokens):
        risks.append((idx, step(idx, hidden, n_tokens)))
        return risks[-1][1]

    model.runtime.detach()
    model.runtime.captured._risks = risk
    model.runtime.attach()
    seen = decisions(model, ids)
    assert len(seen) > len(model.runtime.checkpoint_layers)
    latest = {}
    for (idx, levels), (_, values) in zip(seen, risks, strict=True):
        latest[idx] = values
        unknown = np.zeros(ids.numel(), np.float32)
        cascade = [latest.get(i, unknown) if i <= idx else unknown for i in range(len(model.config.cascade))]
        expected = model.runtime.controller.evaluate_batch(np.stack(cascade)).levels[idx]
        np.testing.assert_array_equal(levels, expected)
    assert len({bytes(levels) for _, levels in seen}) > len(model.config.cascade)


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", ["hrm_text"])
def test_loops_keep_the_invariants(model_type, cut):
    model, ids = wrapped(model_type, cut)
    whole = model(ids).logits
    assert model.stats().fail_safe == 0
    model.runtime.engine = "reference"
    assert_same(model, ids, model(ids).logits, whole)
    model.runtime.engine = "auto"
    out = model.generate(
        ids[:, :6], max_new_tokens=5, do_sample=False, consistent=True, prompt="cut", eos_token_id=None,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    again = model(out.sequences).logits[:, 5:-1]
    assert_same(model, out.sequences, torch.stack(out.logits, dim=1), again)


@torch.no_grad()
@pytest.mark.parametrize("model_type", LOOPED)
def test_every_run_of_an_ffn_is_counted(model_type):
    model, ids = wrapped(model_type, compensate=False)
    for i in range(len(model.runtime.sites)):  # FFNs in front of the checkpoints whole, as calibration leaves them
        if model.runtime.segments[i] < 0:
            points = list(model.runtime.policy.schedule.points)
            points[i] = (points[i][0], *[points[i][-1]] * N_LEVELS)
            model.runtime.reschedule(type(model.runtime.policy.schedule)(N_LEVELS, tuple(points)))
    with model.disable(), counting_layers(model.runtime) as runs:
        model(ids)
    model.reset_stats()
    seen = decisions(model, ids)
    stats = model.stats()
    assert stats.engines["whole"] > 0
    assert sum(stats.engines.values()) >= sum(runs)  # at worst a run too many is counted as whole
    assert model_type == "looped" or sum(stats.engines.values()) == sum(runs)
    assert [item.tokens for item in stats.checkpoints] == [
        ids.numel() * sum(idx == i for idx, _ in seen) for i in range(len(stats.checkpoints))
    ]


@torch.no_grad()
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["default", "in the first stack"])
def test_every_run_of_a_whole_ffn_is_counted(layers):
    model, ids = wrapped("hrm_text", layers=layers)
    with model.disable(), counting_layers(model.runtime) as runs:
        model(ids)
    model.reset_stats()
    with model.full_width():
        model(ids)
    whole = model.stats().engines["whole"]
    assert whole == sum(runs) if layers is None else whole >= sum(runs)


@torch.no_grad()
@pytest.mark.parametrize("model_type", LOOPED)
def test_a_token_that_failed_stays_whole_in_later_loops(model_type):
    model, ids = wrapped(model_type)
    model.runtime.probes[model.runtime.checkpoint_layers[-1]].out.bias.fill_(float("nan"))
    seen = decisions(model, ids)
    first = next(n for n, (idx, _) in enumerate(seen) if idx == len(model.config.cascade) - 1)
    assert len(seen) > first + 1
    assert any((levels < N_LEVELS).any() for _, levels in seen[:first])
    assert all((levels == N_LEVELS).all() for _, levels in seen[first:])


@torch.no_grad()
@pytest.mark.parametrize("layers", [(1, 2), (0, 1)], ids=["first", "last"])
def test_a_checkpoint_that_does_not_come_means_full_width(layers):
    # Layer 1 attends to an image, and there is none.
    model, ids = wrapped("mllama", layers=layers, compensate=False)
    model.reset_stats()
    got = model(ids).logits
    assert model.stats().fail_safe == ids.numel()
    levels, behind = {}, model.config.checkpoint_layers.index(1)
    with model.runtime.observe(on_decision=lambda idx, ratio, given: levels.setdefault(idx, given)):
        assert torch.equal(model(ids).logits, got)
    assert sorted(levels) == list(range(behind))
    # The same by force: levels up to the layer that is missing, the rest whole.
    points = list(model.runtime.policy.schedule.points)
    whole = [(row[0], *[row[-1]] * N_LEVELS) if segment >= behind else row
             for row, segment in zip(points, model.runtime.segments, strict=True)]  # fmt: skip
    model.runtime.reschedule(type(model.runtime.policy.schedule)(N_LEVELS, tuple(whole)))
    with model.runtime.forced_levels(levels.get(behind - 1, 1)):
        torch.testing.assert_close(model(ids).logits, got, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_default_checkpoints_avoid_layers_that_did_not_run():
    base, inputs = build("mllama")
    runtime = SedacForCausalLM.from_base(base).runtime
    assert 1 in runtime.checkpoint_layers
    with counting_layers(runtime) as runs:
        base(**inputs)
    assert [calls > 0 for calls in runs] == [True, False, True, True]
    runtime.avoid_idle_layers(runs)
    assert runtime.checkpoint_layers == (0, 2)
    assert [runtime.segments[i] for i, site in enumerate(runtime.sites) if site.layer_idx == 3] == [1]
    chosen = SedacForCausalLM.from_base(build("mllama")[0], SedacConfig(layer_configs=default_layer_configs((0, 1))))
    with pytest.raises(ConfigError, match=r"\[1\] did not run"):
        chosen.runtime.avoid_idle_layers(runs)


@torch.no_grad()
@pytest.mark.skipif(not available(), reason="the compiled module is not installed")
@pytest.mark.parametrize("prompt", ["full", "cut"])
def test_decode_steps_with_loops_are_not_captured(prompt):
    model, ids = wrapped("hrm_text")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "consistent": True, "prompt": prompt}
    expected = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    torch._dynamo.reset()
    counters.clear()
    got = model.generate(ids, cache_implementation="static", compile_config=compile_config(), **options)
    assert torch.equal(got, expected)
    assert not counters["stats"]["unique_graphs"]
    assert model.runtime.captured.irregular
