"""Training steps on a wrapped decoder: checkpointed layers, `Trainer`, low-rank adapters of PEFT."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments

from sedac_hf import ConfigError, SedacForCausalLM
from sedac_hf.runtime.forward_pass import current_pass
from tests.policies import random_policy
from tests.runtime.test_order import LOOPED
from tests.runtime.test_order import wrapped as looped
from tests.test_invariants import CUTS, nothing_left, wrapped
from tests.tiny_models import tiny_model, token_ids


def gradients(model: SedacForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_layers_that_run_again_in_the_backward_pass_are_cut_as_before(cut, reentrant):
    ids = token_ids(2, 9)
    model = wrapped("llama", cut, attention_dropout=0.0)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients(model, ids)
    assert got.keys() == expected.keys()
    assert model.stats().needed_bytes_share < 1
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model_type", LOOPED)
def test_layers_of_a_loop_that_run_again_are_cut_as_in_their_own_turn(model_type, cut):
    model, ids = looped(model_type, cut)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = gradients(model, ids)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("cut", CUTS)
def test_trainer_trains_saves_and_loads(cut, tmp_path):
    model = wrapped("llama", cut)
    before = model.model.model.layers[1].mlp.up_proj.weight.detach().clone()
    ids = token_ids(4, 8)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, save_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    assert not torch.equal(model.model.model.layers[1].mlp.up_proj.weight, before)
    model.eval()
    again = SedacForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float32)
    with torch.no_grad():
        spread = model(ids).logits.std()
        assert (again(ids).logits - model(ids).logits).abs().mean() < 2e-2 * spread


@pytest.mark.parametrize("cut", CUTS)
def test_a_base_with_lora_in_it_is_wrapped_and_runs_by_masking(cut):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["up_proj", "q_proj"]))
    base = adapted.get_base_model()
    with torch.no_grad():
        reference = base(token_ids()).logits
    model = SedacForCausalLM.from_base(base)
    if cut == "truncate":
        with pytest.raises(Exception, match="select"):
            model.install(random_policy(model.runtime, cut))
        assert nothing_left(model.model)
        return
    model.install(random_policy(model.runtime, cut, compensate=False))
    model.train()
    model(token_ids(), labels=token_ids()).loss.backward()
    trained = {name for name, p in model.model.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    assert model.stats().masked
    model.eval()
    with torch.no_grad(), model.disable():
        assert torch.equal(model(token_ids()).logits, reference)


def test_lora_goes_on_top_of_a_wrapped_decoder():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = wrapped("llama", "truncate")
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    assert model.stats().needed_bytes_share < 1


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_each_of_two_forwards_runs_its_layers_again_as_its_own(cut, reentrant):
    def both(model: SedacForCausalLM) -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        (model(first, labels=first).loss + model(second, labels=second).loss).backward()
        return {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}

    first, second = token_ids(2, 9), token_ids(2, 9, seed=5)
    model = wrapped("llama", cut, attention_dropout=0.0)
    expected = both(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = both(model)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 + 1e-4 * float(gradient.abs().max()))
    assert not checkpointing_of_ours(model.unload()), "unload leaves nothing behind"


@pytest.mark.parametrize("leave", ["unload", "disable"])
def test_an_interrupted_forward_leaves_the_checkpointing_function_as_it_was(leave):
    model, ids = wrapped("llama", "truncate"), token_ids()
    model.gradient_checkpointing_enable()
    model.train()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.model.layers[2].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids, labels=ids)
    handle.remove()
    if leave == "unload":
        model.eval()
        assert not checkpointing_of_ours(model.unload())
        assert current_pass.get() is None
        return
    with model.disable():
        assert not checkpointing_of_ours(model.model)
        assert current_pass.get() is None
    model(ids, labels=ids).loss.backward()
    assert not checkpointing_of_ours(model.model)


def checkpointing_of_ours(base: torch.nn.Module) -> bool:
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in base.modules()]
    assert any(functions)
    return any(type(function).__module__.startswith("sedac_hf") for function in functions)


@pytest.mark.parametrize("cut", CUTS)
def test_lora_over_the_ffns_of_a_calibrated_decoder_is_refused(cut):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, ids = wrapped("llama", cut), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
    lora = peft.LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    with pytest.raises(ConfigError, match=r"'model.layers.0.mlp.up_proj' has been replaced"):
        adapted(input_ids=ids)
    with torch.no_grad(), model.disable():
        assert not torch.allclose(adapted(input_ids=ids).logits, tiny_model("llama")(ids).logits)
    assert adapted.unload() is model
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert nothing_left(model.unload())


def test_a_peft_model_itself_is_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="get_base_model"):
        SedacForCausalLM.from_base(adapted)
