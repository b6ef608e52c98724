"""An adapter is loaded on the base that it was made for, whatever its type, and on no other one."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, TorchAoConfig

from sedac_hf import LoadError, SedacConfig, SedacForCausalLM
from sedac_hf.saving.fingerprint import VALUES, Fingerprint, Sample, differences, fingerprint_of
from tests.policies import random_policy
from tests.quantised import torchao_config
from tests.test_invariants import nothing_left
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, tiny_model, token_ids

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROOM = SedacConfig(extra_memory=1.0)  # a random policy's tables are large beside a tiny base


@pytest.fixture
def base_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(model: SedacForCausalLM, folder) -> None:
    model.install(random_policy(model.runtime, "truncate"))
    model.save_pretrained(folder, adapter_only=True)


def trained_further(model, step: float, name: str = "") -> None:
    """Every weight of the parameters with this name moved by about ``step`` of its size."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(noise * parameter.std() * step)


@pytest.mark.parametrize("family", FAMILIES + EXTRA_FAMILIES)
def test_float32_and_bfloat16_have_the_same_digest(family):
    one, other = tiny_model(family), tiny_model(family, seed=1)
    expected = fingerprint_of(one)
    assert fingerprint_of(tiny_model(family, dtype=torch.bfloat16)).digest == expected.digest
    assert {*expected} == {name for name, _ in one.named_parameters()}
    wrong, compared = differences(expected, fingerprint_of(other))
    assert compared == len(expected)
    assert len(wrong) > compared / 3  # norms and biases of some start out alike


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("saved", DTYPES, ids=str)
def test_the_base_in_another_type_is_the_base(base_folder, tmp_path, saved, loaded):
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM, dtype=saved), tmp_path / "adapter")
    model = SedacForCausalLM.from_pretrained(tmp_path / "adapter", dtype=loaded)
    assert model.dtype == loaded
    assert model.runtime.attached


@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["", "layers.2.mlp.up_proj", "embed_tokens"])
def test_a_base_that_was_trained_further_is_refused(base_folder, tmp_path, loaded, name):
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM), tmp_path / "adapter")
    other = tiny_model("llama")
    trained_further(other, 0.02, name)
    other = other.to(loaded)
    with pytest.raises(LoadError, match="ignore_base_mismatch=True") as caught:
        SedacForCausalLM.from_pretrained(tmp_path / "adapter", base_model=other)
    message = str(caught.value)
    expected = json.loads((tmp_path / "adapter/config.json").read_text())["base_fingerprint"]
    assert f"made for the base {base_folder}, fingerprint {expected}" in message
    assert f"fingerprint {fingerprint_of(other).digest}" in message
    assert f"{name}.weight: " in message or name == ""
    assert nothing_left(other)


def test_a_mismatch_can_be_ignored(base_folder, tmp_path):
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM), tmp_path / "adapter")
    other = tiny_model("llama", seed=1)
    other.save_pretrained(base_folder)  # other weights where the adapter looks
    with pytest.raises(LoadError, match="of 39 parameters differ"):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter")
    for load in (SedacForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(tmp_path / "adapter", ignore_base_mismatch=True)
        assert model.runtime.attached
        assert torch.equal(model.unload().lm_head.weight, other.lm_head.weight)


def test_other_shapes_are_named(base_folder, tmp_path):
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM), tmp_path / "adapter")
    with pytest.raises(LoadError, match=r"differ \(\S+gate_proj.weight: shape \[\d+, 64\] expected, got \[128, 64\]"):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter", base_model=tiny_model("llama", intermediate_size=128))


def test_other_weights_in_a_whole_save_are_refused(tmp_path):
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.save_pretrained(tmp_path / "whole")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    (tmp_path / "other/model.safetensors").replace(tmp_path / "whole/model.safetensors")
    with pytest.raises(LoadError, match="the weights in the same folder"):
        SedacForCausalLM.from_pretrained(tmp_path / "whole")


def test_a_whole_save_of_given_weights_is_taken_as_it_is(tmp_path):
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "whole", state_dict=state)
    loaded = SedacForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.model.lm_head.weight, state["model.lm_head.weight"])


@pytest.mark.parametrize("kind", ["int8", "float8", "int8_dynamic"])
@pytest.mark.parametrize("made_on", ["plain", "quantised"])
def test_a_quantised_base_is_the_base(base_folder, tmp_path, kind, made_on):
    quantised = {"quantization_config": TorchAoConfig(torchao_config(kind)), "dtype": torch.float32}
    first, second = ({}, quantised) if made_on == "plain" else (quantised, {})
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM, **first), tmp_path / "adapter")
    again = SedacForCausalLM.from_pretrained(tmp_path / "adapter", **second)
    assert again.runtime.attached
    tiny_model("llama", seed=1).save_pretrained(base_folder)
    with pytest.raises(LoadError, match="parameters differ"):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter", **second)


def test_quantised_weights_of_another_base_are_told_apart():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    expected = fingerprint_of(model)
    rounded = Fingerprint((n, Sample(s.shape, "quantised", s.values)) for n, s in fingerprint_of(other).items())
    wrong, _ = differences(expected, rounded)
    linear = [name for name in expected if "proj" in name]
    assert {item.split(":")[0] for item in wrong} >= {*linear}
    scale = {name: sample.values.abs().max() / 7 for name, sample in expected.items()}  # 4-bit
    rounded = Fingerprint(
        (n, Sample(s.shape, "quantised", (s.values / scale[n]).round() * scale[n])) for n, s in expected.items()
    )
    assert differences(expected, rounded) == ([], len(expected))


def test_order_and_layout_do_not_show(base_folder, tmp_path):
    expected = fingerprint_of(tiny_model("llama")).digest
    for cut in ("truncate", "select"):
        model = SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM)
        model.install(random_policy(model.runtime, cut))
        model.save_pretrained(tmp_path / cut, adapter_only=True)
        assert json.loads((tmp_path / cut / "config.json").read_text())["base_fingerprint"] == expected


def test_what_cannot_be_read_is_not_compared():
    model = tiny_model("llama")
    whole = fingerprint_of(model)
    model.lm_head.to("meta")
    part = fingerprint_of(model)
    assert {*whole} - {*part} == {"lm_head.weight"}
    assert differences(whole, part) == ([], len(part))


@torch.no_grad()
def test_nan_in_both_is_no_difference():
    model = tiny_model("llama")
    model.lm_head.weight.fill_(float("nan"))
    broken = fingerprint_of(model)
    assert differences(broken, broken) == ([], len(broken))
    (wrong,), _ = differences(fingerprint_of(tiny_model("llama")), broken)
    assert "lm_head.weight" in wrong
    assert "nan" in wrong


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1),
        st.tuples(
            st.lists(st.integers(1, 10**6), max_size=3),
            st.sampled_from(["float32", "bfloat16", "quantised"]),
            st.lists(st.floats(width=32), min_size=VALUES, max_size=VALUES),
        ),
    )
)
def test_json_gives_the_same_fingerprint_again(content):
    made = Fingerprint((name, Sample(tuple(s), d, torch.tensor(v))) for name, (s, d, v) in content.items())
    again = Fingerprint.from_json(made.to_json())
    assert again.digest == made.digest
    assert differences(made, again) == ([], len(made))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "the file is missing"), ("[]", "damaged"), ("{}", "belongs to another save")]
)
def test_the_file_must_be_the_one_that_is_named(base_folder, tmp_path, content, message):
    save_adapter(SedacForCausalLM.from_pretrained(base_folder, sedac_config=ROOM), tmp_path / "adapter")
    file = tmp_path / "adapter/base_fingerprint.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(LoadError, match=message):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter")


@torch.no_grad()
def test_a_fingerprint_of_a_large_base_stays_small(base_folder, tmp_path):
    model = SedacForCausalLM.from_pretrained(base_folder)
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    parameters = sum(1 for _ in model.model.parameters())
    assert (tmp_path / "adapter/base_fingerprint.json").stat().st_size < 200 * parameters
    logits = SedacForCausalLM.from_pretrained(tmp_path / "adapter")(token_ids()).logits
    assert torch.equal(logits, model(token_ids()).logits)
