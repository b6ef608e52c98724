"""`SedacForCausalLM`: ways of generating, saving, loading, Auto classes, pipelines, bad files (tiny decoders)."""

from __future__ import annotations

import copy
import functools
import json
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, TextStreamer, pipeline

from sedac_hf import ConfigError, LoadError, SedacConfig, SedacForCausalLM, UnsupportedModelError
from sedac_hf.saving.tensors import write_tensors
from tests.policies import random_policy
from tests.test_invariants import nothing_left, wrapped
from tests.tiny_models import VOCAB, tiny_model, token_ids

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "consistent": True}


@pytest.fixture(params=["truncate", "select"])
def model(request) -> SedacForCausalLM:
    return wrapped("llama", request.param)


def greedy_by_hand(model: SedacForCausalLM, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy decoding as a loop of forward calls; under `select` the prompt runs at full width first."""
    full_prompt = model.config.cut == "select"
    with torch.no_grad():
        if full_prompt:
            with model.full_width():
                out = model(ids, use_cache=True)
        else:
            out = model(ids, use_cache=True)
        for _ in range(steps):
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, token), dim=1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return ids


def test_greedy_generation_is_the_loop_of_forward_calls(model):
    ids = token_ids(2, 6)
    got = model.generate(ids, **GREEDY)
    assert model.stats().needed_bytes_share < 1
    assert torch.equal(got, greedy_by_hand(model, ids, 8))
    model.runtime.engine = "reference"
    assert torch.equal(model.generate(ids, **GREEDY), got)


def test_assisted_generation_in_both_roles(model):
    ids = token_ids(1, 6)
    expected = greedy_by_hand(model, ids, 8)
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=tiny_model("llama", seed=3)), expected)
    base = tiny_model("llama", seed=3)
    options = {key: value for key, value in GREEDY.items() if key != "consistent"}
    model.reset_stats()
    model.generate = functools.partial(model.generate, consistent=True)  # transformers calls it, and would not say so
    model.generation_config.assistant_confidence_threshold = 0.0  # or each call ends with its prompt's first token
    assert torch.equal(base.generate(ids, **options, assistant_model=model), base.generate(ids, **options))
    assert model.stats().needed_bytes_share < 1


def test_left_padded_batch_generates_what_each_row_does(model):
    ids = token_ids(2, 6)
    padded = torch.cat((torch.zeros(2, 2, dtype=ids.dtype), ids), dim=1)
    mask = (torch.arange(8) >= 2).long().expand(2, -1)
    got = model.generate(padded, attention_mask=mask, **GREEDY)[:, 2:]
    for row in range(2):
        assert torch.equal(got[row : row + 1], model.generate(ids[row : row + 1], **GREEDY))


def test_embeddings_in_place_of_ids(model):
    ids = token_ids(1, 6)
    embedded = model.get_input_embeddings()(ids)
    got = model.generate(inputs_embeds=embedded, **GREEDY)
    assert torch.equal(got, model.generate(ids, **GREEDY)[:, 6:])


def test_streamer_sees_every_token(model):
    class Collect(TextStreamer):
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value.flatten())

        def end(self):
            pass

    streamer = Collect()
    out = model.generate(token_ids(1, 6), **GREEDY, streamer=streamer)
    assert torch.equal(torch.cat(streamer.seen), out[0])


def test_one_choice_per_call_is_recorded(model):
    model.reset_stats()
    model.generate(token_ids(1, 6), **{**GREEDY, "consistent": False})
    (choice,) = model.stats().choices
    assert choice.startswith(("cut: ", "full width: "))
    with pytest.raises(ConfigError, match="prompt"):
        model.generate(token_ids(1, 6), prompt="half")


def test_uncalibrated_model_is_the_base_and_skips_nothing():
    base, ids = tiny_model("llama"), token_ids()
    with torch.no_grad():
        expected = base(ids).logits
        model = SedacForCausalLM.from_base(base)
        assert torch.equal(model(ids).logits, expected)
    assert nothing_left(base)
    assert model.stats().needed_bytes_share == 1.0


def test_stats_count_what_the_schedule_says():
    model = wrapped("llama", "truncate")
    model.install(random_policy(model.runtime, "truncate", compensate=False))
    ids = token_ids(2, 12)
    with torch.no_grad(), model.runtime.forced_levels(4):
        model(ids)
    sites, points = model.runtime.sites, model.runtime.policy.schedule.points
    expected = sum(row[4].width for row in points) / sum(site.intermediate_size for site in sites)
    stats = model.stats()
    assert stats.needed_bytes_share == pytest.approx(expected)
    assert stats.saved_bytes_share == pytest.approx(1 - expected)
    assert stats.saved_multiply_adds_share == pytest.approx(1 - expected)
    model.reset_stats()
    assert model.stats().tokens == 0


def test_auto_classes_and_pipeline(tmp_path, model):
    ids = token_ids()
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert isinstance(loaded, SedacForCausalLM)
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "saved"), SedacConfig)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_pipeline_with_object_and_path(tmp_path):
    from sedac_hf import demo_path, load_demo

    base, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, "truncate"))
    options = {"max_new_tokens": 4, "do_sample": False, "consistent": True}
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)("def main(", **options)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    got = pipeline("text-generation", model=str(tmp_path / "saved"))("def main(", **options)
    assert got == expected
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert json.loads((tmp_path / "adapter/config.json").read_text())["base_model_name_or_path"] == str(demo_path())
    assert not list((tmp_path / "adapter").glob("model*"))


def test_saving_again_replaces_what_was_there(tmp_path, model):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.json").write_text("{}")
    model.uninstall()
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors"}
    assert names == {*weights, "base_fingerprint.json", "README.md", "tokenizer.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["saved"], "a temporary folder was left behind"


def test_a_failed_save_leaves_nothing(tmp_path, model, monkeypatch):
    monkeypatch.setattr(type(model.config), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    expected = model(token_ids()).logits
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(token_ids()).logits, expected)


def damage(name):
    def cut_short(path):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: len(data) // 2])

    return cut_short


def without_key(key):
    def remove(path):
        config = json.loads((path / "config.json").read_text())
        del config[key]
        (path / "config.json").write_text(json.dumps(config))

    return remove


def with_value(key, value):
    def change(path):
        config = json.loads((path / "config.json").read_text())
        config[key] = value
        (path / "config.json").write_text(json.dumps(config))

    return change


def spoiled_tensor(name, value):
    def change(path):
        ours = name.startswith(("probes", "comp", "channel"))
        file = path / ("sedac.safetensors" if ours else "model.safetensors")
        tensors = load_file(file)
        if value is None:
            del tensors[name]
        else:
            tensors[name] = torch.full_like(tensors[name], value)
        if ours:
            write_tensors(tensors, file)
        else:
            save_file(tensors, file, metadata={"format": "pt"})

    return change


def foreign_sizes(path):
    other = wrapped("llama", "truncate", intermediate_size=128)
    other.save_pretrained(path.parent / "other")
    (path / "sedac.safetensors").write_bytes((path.parent / "other/sedac.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage("sedac.safetensors"), "damaged"),
        (damage("model.safetensors"), "cannot be loaded"),
        (damage("config.json"), "cannot be read"),
        (lambda path: (path / "sedac.safetensors").unlink(), "missing"),
        (lambda path: (path / "model.safetensors").unlink(), "must hold the base's weights"),
        (lambda path: (path / "config.json").unlink(), "must hold a config.json"),
        (without_key("layer_configs"), "must hold `layer_configs`"),
        (foreign_sizes, "must be a permutation"),
        (with_value("n_levels", 4), "n_levels"),
        (with_value("cut", "slice"), "`cut` must be one of"),
        (with_value("schedule", {"n_levels": 8}), "schedule"),
        (spoiled_tensor("model.layers.1.mlp.up_proj.weight", None), "1 are missing"),
        (spoiled_tensor("probes.layers.1.out.bias", float("nan")), "must be finite"),
        (spoiled_tensor("probes.layers.1.out.bias", None), "do not fit"),
        (spoiled_tensor("channel_order.0", 3), "must be a permutation"),
        (spoiled_tensor("compensation.0.2.v", None), "second half"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_are_named(tmp_path, spoil, message):
    wrapped("llama", "truncate").save_pretrained(tmp_path / "saved")
    spoil(tmp_path / "saved")
    with pytest.raises((LoadError, ConfigError), match=message):
        SedacForCausalLM.from_pretrained(tmp_path / "saved")


def test_adapter_for_another_base_is_refused(tmp_path):
    model = wrapped("llama", "select")
    model.model.name_or_path = "somewhere/else"
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    other = tiny_model("llama", intermediate_size=128)
    with pytest.raises(ConfigError, match="units"):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter", base_model=other, ignore_base_mismatch=True)
    assert nothing_left(other)


def test_what_cannot_be_wrapped_is_refused():
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    with pytest.raises(ConfigError, match="wrapped already"):
        SedacForCausalLM.from_base(model)
    with pytest.raises(ConfigError, match="PreTrainedModel"):
        SedacForCausalLM.from_base(torch.nn.Linear(2, 2))
    mamba = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4)
    )
    with pytest.raises(UnsupportedModelError, match="Looked for"):
        SedacForCausalLM.from_base(mamba)
    assert nothing_left(mamba)


def test_threads_share_one_model(model):
    batches = [token_ids(1, 5 + i, seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in batches]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            with torch.no_grad():
                if not torch.allclose(model(batches[i]).logits, expected[i], atol=1e-4):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_deep_copy_is_independent(model):
    ids = token_ids()
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, expected)
    twin.unload()
    assert torch.equal(model(ids).logits, expected)
    assert twin.runtime.model is twin.model


def test_training_step_is_differentiable(model):
    ids = token_ids()
    model.train()
    loss = model(ids, labels=ids).loss
    loss.backward()
    gradient = model.model.model.layers[2].mlp.up_proj.weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()


def test_environment_sets_the_defaults_of_a_new_config(monkeypatch, tmp_path):
    text_config = tiny_model("llama").config
    saved = SedacConfig(text_config)
    saved.save_pretrained(tmp_path)
    monkeypatch.setenv("SEDAC_CONFIDENCE_DECAY", "0.25")
    monkeypatch.setenv("SEDAC_SOFT_EXIT", "off")
    monkeypatch.setenv("SEDAC_LAYER_WEIGHTS", "0.1,0.7")
    config = SedacConfig(text_config)
    assert (config.confidence_decay, config.soft_exit) == (0.25, False)
    assert [item.confidence_weight for item in config.cascade] == [0.1, 0.7]
    assert SedacConfig(text_config, confidence_decay=0.5).confidence_decay == 0.5
    assert SedacConfig.from_pretrained(tmp_path).layer_configs == saved.layer_configs
    assert SedacConfig.from_pretrained(tmp_path).confidence_decay == 0.9
    for name, bad in (("SEDAC_CONFIDENCE_DECAY", "2"), ("SEDAC_SOFT_EXIT", "maybe"), ("SEDAC_LAYER_WEIGHTS", "1,x")):
        with monkeypatch.context() as patch:
            patch.setenv(name, bad)
            with pytest.raises(ConfigError, match=name):
                SedacConfig(text_config)
