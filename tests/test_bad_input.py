"""Bad input: what is said, and that nothing wrong is loaded, attached or left behind.

Single damaged files are in `tests/test_modeling.py`, other bases in `tests/saving/test_fingerprint.py`, saves that end
early in `tests/saving/test_writing.py`, refusals of calibration in `tests/calibration/test_pipeline.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.utils import logging

from sedac_hf import ConfigError, LoadError, SedacConfig, SedacForCausalLM
from tests.test_invariants import nothing_left, wrapped
from tests.tiny_models import tiny_model, token_ids

# ---------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    wrapped("llama", "truncate").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def intact(saved) -> dict[str, torch.Tensor]:
    return everything(SedacForCausalLM.from_pretrained(saved))


def everything(model: SedacForCausalLM) -> dict[str, torch.Tensor]:
    """Weights, and what the policy computes with."""
    policy = model.runtime.policy
    assert policy is not None
    tensors = policy.to_tensors()
    return {**model.unload().state_dict(), **tensors}


@pytest.mark.parametrize(
    ("name", "seen"),
    [("sedac.safetensors", "all"), ("model.safetensors", "all but a number"), ("base_fingerprint.json", "all")],
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), in_header=st.booleans(), value=st.integers(0, 255), cut=st.booleans())
@example(place=0.0, in_header=False, value=255, cut=False)
@example(place=0.0, in_header=False, value=0, cut=True)
def test_no_damaged_byte_is_loaded_in_silence(saved, intact, name, seen, place, in_header, value, cut):
    content = (saved / name).read_bytes()
    header = min(8 + int.from_bytes(content[:8], "little"), len(content))
    at = int(place * (header if in_header else len(content)))
    damaged = content[:at] if cut else content[:at] + bytes([value]) + content[at + 1 :]
    (saved / name).write_bytes(damaged)
    try:
        found = everything(SedacForCausalLM.from_pretrained(saved))
    except (LoadError, ConfigError):
        return
    finally:
        (saved / name).write_bytes(content)
    wrong = sum(int((found[key] != intact[key]).sum()) for key in intact)
    # A base's weights come as they are, without a checksum: one number may be another one.
    assert wrong <= (1 if seen == "all but a number" and not cut else 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1, exclude_max=True), text=st.text(st.sampled_from('0123456789naesul-.",:[]{} '), max_size=2)
)
def test_a_damaged_configuration_gives_no_other_errors(saved, place, text):
    content = (saved / "config.json").read_text()
    at = int(place * len(content))
    (saved / "config.json").write_text(content[:at] + text + content[at + 1 :])
    try:
        SedacForCausalLM.from_pretrained(saved)
    except (LoadError, ConfigError):
        pass
    finally:
        (saved / "config.json").write_text(content)


def test_a_flipped_bit_of_a_probe_is_seen(tmp_path):
    wrapped("llama", "truncate").save_pretrained(tmp_path)
    content = bytearray((tmp_path / "sedac.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "sedac.safetensors").write_bytes(content)
    with pytest.raises(LoadError, match=r"sedac.safetensors is damaged: its tensors must have the SHA-256"):
        SedacForCausalLM.from_pretrained(tmp_path)


def test_values_that_no_configuration_may_have_are_one_kind_of_error(tmp_path):
    wrapped("llama", "truncate").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["hidden_size"] = 6  # not a multiple of the heads: transformers has an error of its own
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"configuration of .* cannot be read"):
        SedacForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_configuration_of_another_size_is_refused(tmp_path, name):
    wrapped("llama", "truncate").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"][name] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"base weights in .* (cannot be loaded|must be complete)"):
        SedacForCausalLM.from_pretrained(tmp_path)


def test_a_policy_of_another_hidden_size_is_refused(tmp_path):
    wrapped("llama", "truncate").save_pretrained(tmp_path, adapter_only=False)
    other = tiny_model("llama", hidden_size=128)
    with pytest.raises(LoadError, match=r"shape \[160, 64\] expected, got \[160, 128\]"):
        SedacForCausalLM.from_pretrained(tmp_path, base_model=other)
    with pytest.raises(ConfigError, match=r"hidden size|finite|units|must"):
        SedacForCausalLM.from_pretrained(tmp_path, base_model=other, ignore_base_mismatch=True)
    assert nothing_left(other)


# ---------------------------------------------------------------- configuration keys


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("confidence_decy", "confidence_decay"), ("n_level", "n_levels"), ("textconfig", "text_config")],
)
def test_a_misspelt_key_is_refused(tmp_path, wrong, meant):
    with pytest.raises(ConfigError, match=f"no `{wrong}`: did you mean `{meant}`"):
        SedacConfig(**{wrong: 1})
    wrapped("llama", "truncate").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, wrong: 1}))
    with pytest.raises(ConfigError, match=f"no `{wrong}`"):
        SedacForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def warnings_of(caplog, monkeypatch):
    """The library's messages, which do not propagate by themselves."""
    monkeypatch.setattr(logging.get_logger("sedac_hf"), "propagate", True)
    logging.get_logger("sedac_hf").warning_once.cache_clear()
    return caplog


def test_a_key_of_another_version_is_kept_and_told(tmp_path, warnings_of):
    wrapped("llama", "truncate").save_pretrained(tmp_path)
    assert "has no" not in warnings_of.text
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rest": "shadow"}))
    assert AutoConfig.from_pretrained(tmp_path).rest == "shadow"
    assert "a SedacConfig has no `rest`" in warnings_of.text


# ---------------------------------------------------------------- input of odd sizes


def outcome(call) -> Any:
    """The ids or logits, or the error's type and text."""
    try:
        with torch.no_grad():
            got = call()
        return getattr(got, "logits", got)
    except Exception as error:
        return type(error), str(error)


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("shape", [(1, 0), (2, 0), (0, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("cut", ["uncalibrated", "truncate", "select"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_empty_prompts_and_batches_do_what_they_do_with_the_base(family, cut, shape):
    base = tiny_model(family)
    model = SedacForCausalLM.from_base(tiny_model(family)) if cut == "uncalibrated" else wrapped(family, cut)
    ids, options = torch.zeros(shape, dtype=torch.long), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    usual = model(token_ids()).logits
    assert same(outcome(lambda: model(ids)), outcome(lambda: base(ids)))
    expected = outcome(lambda: base.generate(ids, **options))
    for consistent in (False, True):
        assert same(outcome(lambda c=consistent: model.generate(ids, **options, consistent=c)), expected)
    assert torch.equal(model(token_ids()).logits, usual)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sequence_over_the_limit_does_what_it_does_with_the_base(family):
    base, model = tiny_model(family), wrapped(family, "truncate")
    limit = base.config.max_position_embeddings
    ids = token_ids(1, limit + 3)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    usual = model(token_ids()).logits
    with model.full_width():
        for call in (lambda m: m(ids), lambda m: m.generate(ids[:, : limit - 1], **options)):
            got, expected = outcome(lambda c=call: c(model)), outcome(lambda c=call: c(base))
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
            else:
                assert got == expected
    assert torch.equal(model(token_ids()).logits, usual)


# ---------------------------------------------------------------- NaN in the base


@torch.no_grad()
@pytest.mark.parametrize("cut", ["truncate", "select"])
def test_nan_in_the_base_runs_at_full_width_and_is_counted(cut):
    model = wrapped("llama", cut)
    ids, options = token_ids(2, 8), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    policy = model.runtime.policy
    model.uninstall()
    model.model.model.layers[0].mlp.down_proj.weight[3, 3] = float("nan")
    expected = model.model.generate(ids, **options)
    model.install(policy)
    model.reset_stats()
    assert torch.equal(model.generate(ids, **options, consistent=True, prompt="cut"), expected)
    stats = model.stats()
    assert stats.fail_safe == sum(item.tokens for item in stats.checkpoints) > 0
    assert [item.exits for item in stats.checkpoints] == [0, 0]
