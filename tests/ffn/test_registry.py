"""FFNs that a user registers, in decoders whose code comes with their weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from sedac_hf import (
    ConfigError,
    LoadError,
    SedacForCausalLM,
    UnsupportedModelError,
    register_ffn_site,
    unregister_ffn_site,
)
from sedac_hf.ffn import registry
from sedac_hf.ffn.sites import find_sites
from tests.policies import random_policy
from tests.remote_code import remote_folder
from tests.test_invariants import CUTS, nothing_left
from tests.tiny_models import tiny_model, token_ids

PARTS = {
    "TwoBranches": {"up": "fc_in", "down": "fc_out", "activation": "act"},
    "Normed": {"up": "fc_in", "down": "fc_out", "activation": torch.relu},
    "Odd": {"up": "both", "down": "back", "fused": True, "activation": functional.relu},
}


@pytest.fixture(autouse=True)
def _nothing_registered() -> Iterator[None]:
    assert registry._REGISTERED == {}
    yield
    registry._REGISTERED.clear()


def loaded(folder: Path) -> SedacForCausalLM:
    return SedacForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("ffn", ["Gated", *PARTS])
@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_a_decoder_with_code_of_its_own(ffn: str, cut: str, tmp_path: Path) -> None:
    folder = remote_folder(tmp_path / "base", ffn)
    if ffn in PARTS:
        with pytest.raises(UnsupportedModelError, match="register_ffn_site"):
            loaded(folder)
        register_ffn_site(ffn, **PARTS[ffn])
    model, ids = loaded(folder), token_ids(4, 9)
    dense, before = model(ids).logits, {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    assert [site.intermediate_size for site in model.runtime.sites] == [176] * 4
    assert all(site.plain_forward == (ffn == "Gated") for site in model.runtime.sites)
    beside = {parameter.path for site in model.runtime.sites for parameter in site.beside}
    assert beside == ({"norm.weight", "norm.bias"} if ffn == "Normed" else set())
    policy = random_policy(model.runtime, cut)
    if ffn == "Odd" and cut == "truncate":
        with pytest.raises(UnsupportedModelError, match="let their units be put in another order"):
            model.install(policy)
        return
    model.install(policy)
    got = model(ids).logits
    effect = (got - dense).abs().mean()
    assert effect > 0.02 * dense.std(), "the policy cuts nothing that matters"
    assert bool(model.stats().masked) == (ffn in ("Normed", "Odd"))
    assert set(model.stats().engines) - {"whole"}
    model.runtime.engine = "reference"
    with pytest.MonkeyPatch.context() as patch:  # everything computed, the cut units zeroed
        patch.setattr("sedac_hf.ffn.coupled.why_masked", lambda site: "the test says so")
        model.runtime.detach()
        model.runtime.attach()
        expected = model(ids).logits
        model.runtime.detach()
    model.runtime.engine = "auto"
    model.runtime.attach()
    assert (got - expected).abs().mean() < (0.02 if cut == "select" else 1e-4) * effect
    with model.full_width():
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    with model.disable():
        assert torch.equal(model(ids).logits, dense)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, got)
    for adapter_only in (False, True):
        model.save_pretrained(tmp_path / f"saved-{adapter_only}", adapter_only=adapter_only)
        assert torch.equal(loaded(tmp_path / f"saved-{adapter_only}")(ids).logits, got)
    base = model.unload()
    assert nothing_left(base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(base(ids).logits, dense)
    assert torch.equal(twin(ids).logits, got)


def test_saved_code_is_run_only_where_it_is_trusted(tmp_path: Path) -> None:
    loaded(remote_folder(tmp_path / "base", "Gated")).save_pretrained(tmp_path / "whole")
    assert (tmp_path / "whole" / "modeling_foreign.py").is_file()
    with pytest.raises(LoadError, match="trust_remote_code"):
        SedacForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", trust_remote_code=True)
    again.save_pretrained(tmp_path / "again")
    assert type(loaded(tmp_path / "again").config.text_config).__name__ == "ForeignConfig"


class Branches(nn.Module):
    """Two pairs of the same sizes; ``down`` goes with ``up``."""

    def __init__(self, n_in: int = 16, units: int = 40) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(n_in, units), nn.Linear(units, 16)
        self.other, self.back = nn.Linear(16, 40), nn.Linear(40, 16)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) + self.back(self.other(x).sin())


class Derived(Branches):
    pass


class Ordinary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


def decoder(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.ModuleDict(parts)])
    return model


def names(model: nn.Module) -> list[str]:
    try:
        return [site.name for site in find_sites(model).sites]
    except UnsupportedModelError:
        return []


@pytest.mark.parametrize("owner", [Branches, "Branches", f"{__name__}.Branches"], ids=str)
def test_a_class_its_name_and_what_is_made_of_it(owner: type | str) -> None:
    model = decoder(first=Branches(), second=Derived())
    assert names(model) == []
    with register_ffn_site(owner, up="up", down="down"):
        assert names(model) == names(copy.deepcopy(model)) == ["layers.0.first", "layers.0.second"]
        register_ffn_site(Derived, up="other", down="back", activation=torch.sin)  # its own goes before its base's
        first, second = find_sites(model).sites
        assert (first.up, second.up) == (model.layers[0]["first"].up, model.layers[0]["second"].other)
        unregister_ffn_site(Derived)
    assert names(model) == []
    register_ffn_site(owner, up="up", down="down", subclasses=False)
    assert names(model) == ["layers.0.first"]


def test_it_is_taken_before_the_structural_rules_and_beside_them() -> None:
    model = decoder(odd=Branches(), usual=Ordinary(), inner=nn.Sequential(Ordinary()))
    with register_ffn_site(Branches, up="up", down="down"):
        assert names(model) == ["layers.0.odd", "layers.0.usual", "layers.0.inner.0"]
        with register_ffn_site(nn.Sequential, up="0.up", down="0.down", gate="0.gate"):
            odd, sequential, usual = find_sites(model).sites
            assert (odd.name, sequential.name, usual.name) == ("layers.0.odd", "layers.0.inner", "layers.0.usual")
            assert sequential.plain_forward
    family = tiny_model("llama")
    usual_sites = find_sites(family).sites
    with register_ffn_site("LlamaMLP", up="up_proj", down="down_proj", gate="gate_proj", activation="act_fn"):
        for told, found in zip(find_sites(family).sites, usual_sites, strict=True):
            assert (told.gate, told.up, told.down, told.activation) == (
                found.gate,
                found.up,
                found.down,
                found.activation,
            )
            assert told.plain_forward


def test_what_is_given_as_gate_and_activation_is_checked_on_numbers() -> None:
    model = decoder(ffn=Ordinary())
    with register_ffn_site(Ordinary, up="gate", down="down", gate="up"):
        (site,) = find_sites(model).sites
        assert site.plain_forward
        assert site.gate is model.layers[0]["ffn"].gate
    with register_ffn_site(Ordinary, up="up", down="down", gate="gate", activation=torch.tanh):
        (site,) = find_sites(model).sites
        assert not site.plain_forward
        assert site.activation is torch.tanh


def test_a_formula_that_holds_by_present_numbers_alone_is_not_believed() -> None:
    class Adapted(Ordinary):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)
            nn.init.zeros_(self.high.weight)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.high(self.low(x))

    with register_ffn_site(Adapted, up="up", down="down", gate="gate"):
        (site,) = find_sites(decoder(ffn=Adapted())).sites
        assert not site.plain_forward
        assert site.beside == ()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"up": "up", "down": "gone"}, "'layers.0.ffn', a Branches .* must have a module 'gone' for `down`, got None"),
        ({"up": "act", "down": "down"}, "must have a linear map in 'act' for `up` .*, got ReLU"),
        ({"up": "down", "down": "up"}, "must take hidden states of 40 as its parts say, and takes 16: exchange them"),
        ({"up": "up", "down": "up"}, "must map hidden -> f and, with `down`, f -> hidden; got up 'up' 16 -> 40, down"),
        ({"up": "up", "down": "down", "fused": True}, "must map hidden -> 2f .*; got up 'up' 16 -> 40"),
        ({"up": "up", "down": "down", "gate": "back"}, "got gate 'back' 40 -> 16, up 'up' 16 -> 40, down 'down' 40"),
        ({"up": "up", "down": "down", "activation": "gelu"}, "have a callable 'gelu' for its activation, got None"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(parts: dict[str, object], message: str) -> None:
    register_ffn_site(Branches, **parts)
    with pytest.raises(UnsupportedModelError, match=message):
        find_sites(decoder(ffn=Branches()))


def test_units_that_other_parts_go_with_are_refused() -> None:
    class Mixed(Branches):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).relu()
            return self.down(h) + self.back(h.flip(-1))

    register_ffn_site(Mixed, up="up", down="down")
    with pytest.raises(UnsupportedModelError, match="must give the same for hidden states alone when its units"):
        find_sites(decoder(ffn=Mixed()))


@pytest.mark.parametrize(
    ("owner", "arguments", "message"),
    [
        (nn.Linear(2, 2), {}, "`owner` must be a class of modules or the name of one"),
        ("", {}, "`owner` must be"),
        (dict, {}, "`owner` must be"),
        (Branches, {"up": ""}, "`up` must name an attribute of the owner, got ''"),
        (Branches, {"gate": 3}, "`gate` must name"),
        (Branches, {"gate": "g", "fused": True}, "`gate` must be None where gate and up are one linear"),
        (Branches, {"activation": nn.GELU}, "`activation` must be an attribute's name or map a tensor to one of its"),
    ],
)
def test_wrong_arguments(owner: object, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register_ffn_site(owner, **{"up": "up", "down": "down", **arguments})
    assert registry._REGISTERED == {}


def test_twice_and_never() -> None:
    first = register_ffn_site(Branches, up="up", down="down")
    with pytest.raises(ConfigError, match="is registered already"):
        register_ffn_site(Branches, up="other", down="back")
    with first:
        register_ffn_site(Branches, up="other", down="back", exist_ok=True)
    assert (
        find_sites(decoder(ffn=Branches())).sites[0].up.out_features == 40
    )  # the later one outlives the first's block
    unregister_ffn_site(Branches)
    with pytest.raises(ConfigError, match=r"must be registered, got .*Branches.*; registered: none"):
        unregister_ffn_site(Branches)
