"""FFNs spread over sibling modules or with other parameters beside their linears: found, put in order, cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, undo_order
from sedac_hf.ffn.sites import find_sites
from sedac_hf.ffn.slicing import why_masked
from tests.families import MODEL_TYPES, build
from tests.families.builder import is_ffn_weight
from tests.policies import random_policy

BERT_LIKE = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "git", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
# A norm or an adapter over the units.
MIXING = tuple(name for name in ("bitnet", "dory", "zamba2") if name in MODEL_TYPES)  # older versions lack one
SPLIT = (*BERT_LIKE, "xlnet", "reformer", "rwkv", *MIXING)
# Their rows are not the call's rows, or their layers run more than once: cut by the runtime only once it knows these.
NOT_CUT_YET = ("reformer", "dory")
WITHOUT_ACTIVATION = ("rwkv",)


@pytest.mark.parametrize("model_type", SPLIT)
@torch.no_grad()
def test_found_and_put_in_another_order(model_type: str) -> None:
    model, inputs = build(model_type)
    found = find_sites(model)
    ffn = {id(p): name for name, p in model.named_parameters() if is_ffn_weight(name, p)}
    covered = {id(linear.weight) for site in found.sites for linear in site.linears}
    assert covered <= set(ffn), "a site that is no FFN"
    assert {name for key, name in ffn.items() if key not in covered and "adapter" not in name} == set()
    assert model_type == "zamba2" or len(found.sites) == len(found.decoder_layers)
    assert all((site.activation is None) == (model_type in WITHOUT_ACTIVATION) for site in found.sites)
    # Unfitted norms and scales are all ones: no order of them would show.
    for site in found.sites:
        for parameter in site.beside:
            parameter.value.add_(0.3 * torch.rand(parameter.value.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(**inputs).logits
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.intermediate_size, generator=generator) for site in found.sites]
    orders = [orders[found.sites.index(site.origin or site)] for site in found.sites]
    for site, order in zip(found.sites, orders, strict=True):
        apply_order(site, order)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in ffn.values() if "adapter" not in name} <= changed
    torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    for site, order in zip(found.sites, orders, strict=True):
        undo_order(site, order)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_type", SPLIT)
def test_those_that_mix_their_units_are_masked_and_say_why(model_type: str) -> None:
    sites = find_sites(build(model_type)[0]).sites
    assert all(bool(site.beside) == (model_type in MIXING) for site in sites)
    for site in sites:
        why = why_masked(site)
        assert (why is not None) == (model_type in MIXING)
        assert why is None or site.beside[0].path in why


@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("model_type", [name for name in SPLIT if name not in NOT_CUT_YET])
@torch.no_grad()
def test_the_cut_equals_masking_and_is_undone(model_type: str, cut: str) -> None:
    base, inputs = build(model_type)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    dense = base(**inputs).logits
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, cut, compensate=False))
    logits = model(**inputs).logits
    assert (logits - dense).abs().mean() > 0.02 * dense.std()
    stats = model.stats()
    assert stats.fail_safe == 0
    assert set(stats.engines) <= {"coupled", "mask", "whole"}
    assert bool(stats.masked) == (model_type in MIXING)
    expected = masked_logits(model, inputs)
    effect = (logits - dense).abs().mean()
    assert (logits - expected).abs().mean() < (0.02 if cut == "select" else 1e-3) * effect
    restored = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.state_dict().items())
    assert torch.equal(restored(**inputs).logits, dense)


def masked_logits(model: SedacForCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same decisions with everything computed and the cut units zeroed."""
    runtime = model.runtime
    runtime.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sedac_hf.ffn.coupled.why_masked", lambda site: "the test says so")
        runtime.attach()
        model.reset_stats()
        logits = model(**inputs).logits
        assert set(model.stats().engines) <= {"mask", "whole"}
        runtime.detach()
    runtime.attach()
    return logits


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba"])
def test_recurrent_mixers_are_none_and_the_refusal_says_so(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"this decoder has no FFN: its 4 layers .*Mixer alone.*Pass a"):
        find_sites(build(model_type)[0])


@pytest.mark.parametrize("model_type", ["nemotron_h", "zamba", "jamba", "mixtral", "recurrent_gemma", "lfm2_moe"])
def test_nothing_else_is_taken_for_one(model_type: str) -> None:
    """Layers of attention, state-space blocks or experts alone are searched twice, too."""
    model = build(model_type)[0]
    ffn = {id(p) for name, p in model.named_parameters() if is_ffn_weight(name, p)}
    try:
        sites = find_sites(model).sites
    except UnsupportedModelError:
        return
    assert {id(linear.weight) for site in sites for linear in site.linears} <= ffn


class Layer(nn.Module):
    """Linears in sibling modules, and what else a test wants."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"dense": nn.Linear(16, 40)})
        self.second = nn.ModuleDict({"dense": nn.Linear(40, 16), "norm": nn.LayerNorm(16)})
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = functional.gelu(self.first["dense"](x))
        return x + self.second["norm"](self.second["dense"](h))


def stacked(layer: nn.Module) -> nn.Module:
    model = nn.Module()
    model.stack = nn.ModuleList([layer])
    return model


def test_the_smallest_module_that_holds_them_is_the_owner() -> None:
    layer = Layer(self_attn=nn.Linear(16, 16))
    (site,) = find_sites(stacked(layer)).sites
    assert site.owner is layer
    assert (site.kind, site.hidden_size, site.intermediate_size) == ("plain", 16, 40)


@pytest.mark.parametrize(
    "part",
    [nn.Conv1d(40, 40, 3), nn.Linear(40, 24), nn.Bilinear(40, 3, 5), nn.Linear(40, 16), nn.Linear(40, 40)],
    ids=["convolution", "another reader", "a matrix", "a second down", "a square"],
)
def test_another_matrix_over_the_units_makes_it_another_thing(part: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError):
        find_sites(stacked(Layer(part=part)))


def test_attention_under_any_name_is_none() -> None:
    class GroupedAttention(nn.Module):
        """Heads that are wider than the stream together, with fewer keys and values."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, n) for n in (40, 8, 8))
            self.o = nn.Linear(40, 16)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = GroupedAttention()

    with pytest.raises(UnsupportedModelError):
        find_sites(stacked(Block()))
