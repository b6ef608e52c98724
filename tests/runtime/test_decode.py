"""Decode steps by the compiled kernels: the base's other linears too, undone without a trace, right after changes."""

from __future__ import annotations

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ops import rust_product
from sedac_hf.ops.compiled import MAX_ROWS, available
from sedac_hf.runtime import decode_linears, units_linears
from sedac_hf.runtime.forward_pass import current_pass
from tests.kernel_cases import own_threads, threads
from tests.policies import random_policy
from tests.test_invariants import CUTS, TOLERANCE, assert_same, nothing_left
from tests.tiny_models import tiny_model, token_ids

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")

FAMILIES = ["llama", "phi3", "gpt2", "opt", "gemma3_text", "gpt_neox"]


@pytest.fixture(autouse=True)
def _small_linears_too(monkeypatch):
    monkeypatch.setattr(decode_linears, "_LEAST_NUMBERS", 0)


def decoding(family: str = "llama", cut: str = "select", **kwargs) -> SedacForCausalLM:
    model = SedacForCausalLM.from_base(tiny_model(family, **kwargs))
    model.install(random_policy(model.runtime, cut))
    return model


def in_torch(model: SedacForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the same cut model without a kernel: none runs where a weight wants a gradient."""
    model.reset_stats()
    with torch.enable_grad():
        logits = model(ids).logits.detach()
    assert not any("rust" in engine for engine in model.stats().engines)
    return logits


def by_kernels(model: SedacForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    model.reset_stats()
    with torch.no_grad():
        logits = model(ids).logits
    assert "rust" in model.stats().engines
    return logits


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_what_one_forward_gives(family, cut):
    model = decoding(family, cut)
    ids = token_ids(2, 7)
    whole = model(ids).logits
    model.reset_stats()
    cache, steps = None, []
    for t in range(ids.shape[1]):
        out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    # OPT's FFN has no module of its own; GPT-2's rows of up are spread over memory unless laid out by units.
    assert ("rust" in model.stats().engines) is (family != "opt" and (family, cut) != ("gpt2", "truncate"))
    assert_same(model, ids, torch.cat(steps, dim=1), whole)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_decoding_gives_the_bases_ids(family, rows):
    model, base = decoding(family), tiny_model(family)
    ids = token_ids(rows, 5)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = base.generate(ids, **options)
    with model.full_width():
        assert torch.equal(model.generate(ids, consistent=True, **options), expected)
    with model.disable():
        assert torch.equal(model(ids[:1, :2]).logits, base(ids[:1, :2]).logits)
        assert torch.equal(model.generate(ids, **options), expected)


@torch.no_grad()
def test_linears_are_replaced_while_attached_and_never_longer():
    model = decoding("llama")
    names = {name for name, m in model.model.named_modules() if isinstance(m, nn.Linear) and "forward" in vars(m)}
    linears = [linear.module for linear in model.runtime.decode_linears]
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.o_proj"} <= names
    assert model.model.lm_head in linears
    ffns = [linear for site in model.runtime.sites for linear in site.linears]
    assert not set(map(id, linears)) & set(map(id, ffns))
    with model.disable():
        assert nothing_left(model.model)
    assert [linear.module for linear in model.runtime.decode_linears] == linears
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 10**6))
    with pytest.raises(RuntimeError):
        model.model.lm_head(torch.randn(1, 3))
    assert nothing_left(model.unload())
    assert not model.runtime.decode_linears


def test_few_rows_take_the_kernel_and_many_do_not():
    model = decoding("llama")
    linear = next(linear for linear in model.runtime.decode_linears if linear.module is model.model.lm_head)
    with torch.no_grad():
        for rows, known in ((MAX_ROWS + 1, False), (MAX_ROWS, True)):
            linear.module(torch.randn(rows, 64))
            assert (linear._kernel[-1] is not None) == known
        x = torch.randn(2, 64)
        torch.testing.assert_close(linear.module(input=x), linear.original(x), **TOLERANCE)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear.module(x).dtype == torch.bfloat16
    x = torch.randn(2, 64, requires_grad=True)
    assert linear.module(x).requires_grad
    assert linear.module(x.detach()).requires_grad, "its weight wants one"


def test_the_first_tokens_of_a_batch_are_those_of_its_rows_alone():
    """The head of a prompt sees each row's last token, which do not lie one behind the other."""
    model, ids = decoding("llama", "select"), token_ids(3, 5)
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def first(rows: torch.Tensor) -> torch.Tensor:
        return model.generate(rows, attention_mask=torch.ones_like(rows), consistent=True, **options).logits[0]

    torch.testing.assert_close(first(ids), torch.cat([first(row[None]) for row in ids]), rtol=0, atol=0)
    head = next(linear for linear in model.runtime.decode_linears if linear.module is model.get_output_embeddings())
    last = torch.randn(3, 5, head.shape[1])[:, -1:]
    with torch.no_grad():
        y = head.by_kernel(last)
    assert y is not None
    torch.testing.assert_close(y, head.original(last), **TOLERANCE)


def test_a_bias_alone_can_learn():
    model = decoding("gpt_neox")
    linear = next(linear for linear in model.runtime.decode_linears if linear.module.bias is not None)
    linear.module.weight.requires_grad_(False)
    assert linear.module(torch.randn(2, linear.shape[1])).requires_grad, "its bias wants a gradient"
    linear.module.bias.requires_grad_(False)
    assert not linear.module(torch.randn(2, linear.shape[1])).requires_grad


@pytest.mark.skipif(not rust_product.available(), reason="no bf16 products")
@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_prompts_whole_ffns_take_the_product_by_units(family, monkeypatch):
    base = tiny_model(family).bfloat16()
    model = SedacForCausalLM.from_base(base, SedacConfig(extra_memory=1.0))
    ids = token_ids(2, 20)
    expected = base(ids).logits
    model.install(random_policy(model.runtime, "select"))
    calls = []
    real = units_linears.product
    monkeypatch.setattr(rust_product, "most_rows", lambda: 128)  # as on a machine without AMX
    monkeypatch.setattr(units_linears, "product", lambda *args: calls.append(args) or real(*args))
    with model.full_width():
        whole = model(ids).logits
        assert len(calls) == len(model.runtime.sites)
        torch.testing.assert_close(whole, expected, rtol=0.05, atol=0.05)
        model(token_ids(7, 20))
        assert len(calls) == len(model.runtime.sites), "too many rows"
    model.generate(ids, max_new_tokens=1, consistent=True)
    assert len(calls) == 2 * len(model.runtime.sites), "a prompt runs whole"
    with model.disable():
        assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.unload()(ids).logits, expected)
    assert len(calls) == 2 * len(model.runtime.sites)
    assert nothing_left(base)


@torch.no_grad()
def replace_weights(model):
    for module in (*model.runtime.sites[1].linears, model.model.model.layers[0].self_attn.q_proj, model.model.lm_head):
        module.weight = nn.Parameter(module.weight * 1.5 + 0.01)


@torch.no_grad()
def replace_biases(model):
    layer = model.model.gpt_neox.layers[2]
    for module in (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h, layer.attention.query_key_value):
        module.bias = nn.Parameter(module.bias * 2 + 0.1)


@torch.no_grad()
def new_bias_data(model):
    layer = model.model.gpt_neox.layers[2]
    for module in (layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h, layer.attention.query_key_value):
        module.bias.data = module.bias * 2 + 0.1


@torch.no_grad()
def add_in_place(model):
    for parameter in model.model.parameters():
        parameter.add_(0.01)


def load(model, *, assign):
    state = {name: tensor * 1.1 for name, tensor in model.model.state_dict().items()}
    model.model.load_state_dict(state, assign=assign)


def prune_some(model):
    prune.l1_unstructured(model.model.model.layers[0].self_attn.q_proj, "weight", 0.5)


CHANGES = {
    "weights replaced": ("llama", replace_weights),
    "biases replaced": ("gpt_neox", replace_biases),
    "biases of new memory": ("gpt_neox", new_bias_data),
    "added in place": ("gpt_neox", add_in_place),
    "loaded": ("llama", lambda model: load(model, assign=False)),
    "loaded by assignment": ("llama", lambda model: load(model, assign=True)),
    "pruned": ("llama", prune_some),
    "bfloat16": ("llama", lambda model: model.to(torch.bfloat16)),
    "there and back": ("gpt_neox", lambda model: model.to(torch.float16).to(torch.bfloat16).to(torch.float32)),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_noticed(change, cut):
    family, apply = CHANGES[change]
    model = decoding(family, cut)
    ids = token_ids(1, 3)
    before = by_kernels(model, ids)
    apply(model)
    # In half precision a probe's risk may fall on either side of a cut point.
    level = model.runtime.policy.n_levels // 2
    with nullcontext() if change != "bfloat16" else model.runtime.forced_levels(level):
        got, wanted = by_kernels(model, ids), in_torch(model, ids)
    assert got.dtype == wanted.dtype
    assert all(linear._kernel[-1] is not None for linear in model.runtime.decode_linears) or change == "pruned"
    assert (wanted.float() - before).abs().max() > 1e-3, "the change must show"
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    else:
        assert (got - wanted).float().norm() < 0.05 * wanted.float().norm()
    base = model.unload()
    assert all(p.is_contiguous() for p in base.parameters())
    if change == "pruned":
        prune.remove(base.model.layers[0].self_attn.q_proj, "weight")
    assert nothing_left(base)


@torch.no_grad()
@pytest.mark.parametrize("biases", [False, True])
def test_less_memory_at_the_same_address_is_not_read_beyond_its_end(biases):
    """Half as many bytes where the weights were: an error of torch's, as without the kernels, not a read of what
    comes after them."""
    model, ids = decoding("gpt_neox"), token_ids(1, 3)
    by_kernels(model, ids)
    name = "bias" if biases else "weight"
    linears = [*model.runtime.sites[1].linears, *(linear.module for linear in model.runtime.decode_linears)]
    for held in [linear for linear in linears if getattr(linear, name) is not None]:
        parameter = getattr(held, name)
        kept = parameter.data
        run = kept if kept.is_contiguous() else kept.t()  # down lies by units
        less = run.view(torch.bfloat16).flatten()[: run.numel()].view(run.shape)
        parameter.data = less if kept.is_contiguous() else less.t()
        assert parameter.data_ptr() == kept.data_ptr()
        with pytest.raises(RuntimeError):
            model(ids)
        parameter.data = kept
    by_kernels(model, ids)


def test_two_threads_decode_with_one_model():
    model = decoding("llama")
    prompts = [token_ids(rows, 4, seed=rows) for rows in (1, 2)]
    expected = [by_kernels(model, ids[:, :2]) for ids in prompts]
    wrong: list[str] = []

    def decode(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(model(prompts[i][:, :2]).logits, expected[i]):
                    wrong.append(f"thread {i}")

    for context in (own_threads(active=False), own_threads()):
        with context, threads(2):
            workers = [threading.Thread(target=decode, args=(i,)) for i in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(60)
            assert not wrong
            assert torch.get_num_threads() == 2


@pytest.mark.parametrize("own", [False, True])
def test_torchs_threads_are_what_they_were(own):
    ids = token_ids(1, 4)
    inside: list[int] = []

    def fail(_, scores):
        raise KeyError("stop")

    def interrupt(_, __, hidden):
        if hidden.shape[1] == 1:  # past the prompt, in a decode step
            raise KeyboardInterrupt

    with own_threads(active=own), threads(3):
        model = decoding("llama")
        model.model.model.norm.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
        model.generate(ids, max_new_tokens=3, consistent=True)
        assert inside[-1] == (1 if own else 3)
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyError, match="stop"):
            model.generate(ids, max_new_tokens=3, logits_processor=[fail])
        with pytest.raises(IndexError):
            model(torch.full((1, 2), 10**6))
        assert torch.get_num_threads() == 3
        interruption = model.model.model.norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, max_new_tokens=3)
        interruption.remove()
        assert (torch.get_num_threads(), current_pass.get()) == (3, None)
        with model.disable():
            model(ids[:, :2])
            assert (inside[-1], torch.get_num_threads()) == (3, 3)
        model.unload()
        assert torch.get_num_threads() == 3


@torch.no_grad()
@pytest.mark.parametrize("cut", CUTS)
def test_threads_of_our_own_and_their_number_give_the_same_bits(cut):
    model = decoding("phi3", cut)
    ids = token_ids(1, 3)
    expected = by_kernels(model, ids)
    for count in (1, 2):
        with threads(count):
            assert torch.equal(model(ids).logits, expected)
            with own_threads():
                assert torch.equal(model(ids).logits, expected)
