"""Cutting through the linears equals masking, whatever the class does between them."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from sedac_hf.ffn.coupled import _Scratch, forward_replacements
from sedac_hf.ffn.deciders import decider, importance_of
from sedac_hf.ffn.shadow import ExactGate, Shadow
from sedac_hf.ffn.sites import FFNSite, find_sites
from sedac_hf.ops import OperatingPoint, SiteCut
from tests.cut_cases import N_LEVELS, Recorder, TableCompensation, even_points, installed, relative_error, site_cut
from tests.ffn.test_shadow import Opaque
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, HIDDEN, tiny_model

ALL = FAMILIES + EXTRA_FAMILIES
MIXED = [8, 3, 0, 5, 5, 1, 8, 2, 7, 4]


class Holder:
    """Stands in for the planner: gives the cut of the call."""

    def __init__(self, cut: SiteCut | None = None) -> None:
        self.cut = cut

    def current(self) -> SiteCut | None:
        return self.cut


def call_owner(site: FFNSite, x: torch.Tensor) -> torch.Tensor:
    """The FFN part alone of any family; OPT has it inside its layer."""
    if isinstance(site.owner, nn.Module) and hasattr(site.owner, "self_attn"):
        return site.down(site.activation(site.up(x)))
    if type(site.owner).__name__ == "BloomMLP":
        return site.owner(x, residual=3 * x)
    return site.owner(x)


def masked(site: FFNSite, x: torch.Tensor, cut: SiteCut) -> torch.Tensor:
    """The FFN with its own forward and its hidden units zeroed by a plain hook on down."""
    importance = None if cut.importance is None else cut.importance(x.reshape(-1, HIDDEN))

    def zero(_, args):
        h = args[0].reshape(cut.plan.n_tokens, -1).clone()
        for token, level in enumerate(cut.plan.levels.tolist()):
            point = cut.points[level]
            h[token, point.width if level else 0 :] = 0
            if point.importance_min > 0 and importance is not None:
                h[token, importance[token] < point.importance_min] = 0
        return (h.reshape(args[0].shape),)

    handle = site.down.register_forward_pre_hook(zero)
    try:
        return call_owner(site, x)
    finally:
        handle.remove()


def linears_only(pairs, site):
    """The replacements without the owner's: what an unrecognised FFN gets."""
    return [(module, forward) for module, forward in pairs if module is not site.owner]


def inputs(n: int = len(MIXED), seed: int = 0) -> torch.Tensor:
    return torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("opaque", [False, True])
def test_hidden_values_decide_where_no_activation_can_be_read(opaque):
    torch.manual_seed(0)
    owner = Unreadable()
    norms = owner.mlp_down.weight.detach().norm(dim=0)
    if opaque:
        owner.mlp_down = Opaque(owner.mlp_down)
    (site,) = find_sites(nn.ModuleDict({"layers": nn.ModuleList([owner])})).sites
    assert site.activation is None
    deciding, x = decider(site, 4), inputs()
    hidden = site.owner.hidden(x).detach()
    importance = hidden.abs() * norms
    torch.testing.assert_close(importance_of(deciding, x, hidden), importance)
    points = even_points(40, float(importance.quantile(0.6)))
    holder = Holder(site_cut(MIXED, points, importance=deciding.importance))
    with torch.no_grad(), installed(forward_replacements(site, holder.current)):
        got = site.owner(x)
    used = importance >= torch.tensor([points[level].importance_min for level in MIXED])[:, None]
    used[MIXED.index(0)] = False
    assert 0.4 < used.float().mean() < 0.9, "the values must choose: the test would show nothing"
    with torch.no_grad():
        assert relative_error(got, site.down(torch.where(used, hidden, 0.0))) < 1e-6


class Unreadable(nn.Module):
    """Its activation is no attribute, and scales the product: neither is its formula."""

    def __init__(self):
        super().__init__()
        self.mlp_up, self.mlp_gate, self.mlp_down = nn.Linear(HIDDEN, 40), nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)

    def hidden(self, x):
        gate = self.mlp_gate(x)
        return (self.mlp_up(x) + 1) * gate * torch.sigmoid(1.7 * gate)

    def forward(self, x):
        return self.mlp_down(self.hidden(x))


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("family", ALL)
def test_equals_masking(family, chooses, coupled):
    site = find_sites(tiny_model(family)).sites[1]
    f, x = site.intermediate_size, inputs()
    importance = Shadow.build(site).importance
    points = even_points(f, float(importance(x).quantile(0.6)) if chooses else 0.0)
    holder, record = Holder(), Recorder()
    pairs = forward_replacements(site, holder.current)
    pairs = linears_only(pairs, site) if coupled else pairs
    with torch.no_grad():
        full = call_owner(site, x)
        for levels in (MIXED, [3] * 10, [1] * 10, [0] * 10, [5, 2] * 5, [8] * 10):
            cut = site_cut(levels, points, importance=importance, record=record)
            wanted = masked(site, x, cut)
            holder.cut = cut
            with installed(pairs):
                flat = call_owner(site, x)
                folded = call_owner(site, x.reshape(2, 5, HIDDEN))
            assert relative_error(flat, wanted) < 1e-5
            torch.testing.assert_close(folded.reshape(-1, HIDDEN), flat)
            if levels == [8] * 10:
                assert torch.equal(flat, full)  # the untouched forward ran
        holder.cut = None
        with installed(pairs):
            assert torch.equal(call_owner(site, x), full)
        assert torch.equal(call_owner(site, x), full)
    engines = {call["engine"] for call in record.calls}
    if coupled or not site.plain_forward:
        assert engines <= {"coupled", "mask"}
        assert "coupled" in engines or chooses  # some widths were really not computed
    else:
        assert engines <= {"strips", "masked"}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_compensation(family):
    site = find_sites(tiny_model(family)).sites[0]
    f, x = site.intermediate_size, inputs()
    g = torch.Generator().manual_seed(1)
    table = torch.randn(N_LEVELS + 1, HIDDEN, generator=g)
    pairs_by_level = {
        level: (torch.randn(HIDDEN, 3, generator=g), torch.randn(3, f * level // N_LEVELS, generator=g))
        for level in (2, 5)
    }
    holder = Holder(site_cut(MIXED, even_points(f), compensation=TableCompensation(table, pairs_by_level)))
    seen = []
    with torch.no_grad():
        plain = masked(site, x, site_cut(MIXED, even_points(f)))
        handle = site.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        call_owner(site, x)
        handle.remove()
        wanted = plain.clone()
        for token, level in enumerate(MIXED):
            if level < N_LEVELS:
                wanted[token] += table[level]
            if level in pairs_by_level:
                u, v = pairs_by_level[level]
                wanted[token] += u @ (v @ seen[0].reshape(len(MIXED), -1)[token, : v.shape[1]])
        pairs = forward_replacements(site, holder.current)
        for chosen in (pairs, linears_only(pairs, site)):
            with installed(chosen):
                assert relative_error(call_owner(site, x), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt"])
def test_units_beyond_the_widest_token_are_not_read(family):
    site = find_sites(tiny_model(family)).sites[0]
    f, x = site.intermediate_size, inputs()
    cut = site_cut([4, 1, 3, 2, 0] * 2, even_points(f))
    with torch.no_grad():
        wanted = masked(site, x, cut)
        pairs = linears_only(forward_replacements(site, Holder(cut).current), site)
        width = f // 2
        rows = (lambda m: m.weight.T) if isinstance(site.up, Conv1D) else (lambda m: m.weight)
        for linear in site.linears[:-1]:
            for start in (0, f)[: 2 if site.kind == "fused" else 1]:
                rows(linear)[start + width : start + f] = float("nan")
        rows(site.down)[:, width:] = float("nan")
        with installed(pairs):
            assert relative_error(call_owner(site, x), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "bloom"])
def test_another_number_of_rows_runs_whole_and_says_so(family):
    site = find_sites(tiny_model(family)).sites[0]
    record, x = Recorder(), inputs(7)
    holder = Holder(site_cut([2, 3], even_points(site.intermediate_size), record=record))
    with torch.no_grad(), installed(forward_replacements(site, holder.current)):
        got = call_owner(site, x)
    assert torch.equal(got, call_owner(site, x))
    assert [(call["engine"], call["tokens"]) for call in record.calls] == [("mismatch", 7)]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_no_tokens(family):
    site = find_sites(tiny_model(family)).sites[0]
    holder = Holder(site_cut([], even_points(site.intermediate_size)))
    with torch.no_grad(), installed(forward_replacements(site, holder.current)):
        assert call_owner(site, torch.empty(0, HIDDEN)).shape == (0, HIDDEN)
        assert call_owner(site, torch.empty(1, 0, HIDDEN)).shape == (1, 0, HIDDEN)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "opt"])
def test_opaque_linears_are_masked(family, exact):
    """Weights that can't be sliced: everything is computed, and the cut is right all the same."""
    model = tiny_model(family)
    site = find_sites(model).sites[0]
    shadow = Shadow.build(site)
    for name, child in list(site.owner.named_children()):
        if isinstance(child, nn.Linear):
            setattr(site.owner, name, Opaque(child))
    site, x, record = find_sites(model).sites[0], inputs(), Recorder()
    assert not site.plain_forward
    importance = ExactGate(site).importance if exact else shadow.importance
    least = float(importance(x).quantile(0.5))
    points = tuple(OperatingPoint(site.intermediate_size * lv // 8, (8 - lv) * least / 8) for lv in range(9))
    cut = site_cut(MIXED, points, importance=importance, record=record)
    with torch.no_grad():
        wanted = masked(site, x, cut)
        with installed(forward_replacements(site, Holder(cut).current)):
            assert relative_error(call_owner(site, x), wanted) < 1e-5
    assert [call["engine"] for call in record.calls] == ["mask"]


def test_a_forward_that_mixes_the_units_is_not_sliced():
    class Mixing(nn.Module):
        """Statistics over all hidden units, as in activation sparsity by a Gaussian cut-off."""

        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 176), nn.Linear(64, 176), nn.Linear(176, 64)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            gate = self.gate_proj(x)
            gate = torch.relu(gate - gate.mean(-1, keepdim=True))
            return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    model = nn.Module()
    model.layers = nn.ModuleList([Mixing()])
    site, x, record = find_sites(model).sites[0], inputs(), Recorder()
    cut = site_cut([3, 2] * 5, even_points(176), record=record)
    with torch.no_grad():
        wanted = masked(site, x, cut)
        with installed(forward_replacements(site, Holder(cut).current)):
            assert relative_error(call_owner(site, x), wanted) < 1e-5
    assert [call["engine"] for call in record.calls] == ["mask"]


def test_interleaved_halves_are_not_sliced():
    class Interleaved(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(64, 352), nn.Linear(176, 64)

        def forward(self, x):
            both = self.gate_up_proj(x)
            return self.down_proj(functional.silu(both[..., ::2]) * both[..., 1::2])

    model = nn.Module()
    model.layers = nn.ModuleList([Interleaved()])
    site, x = find_sites(model).sites[0], inputs()
    cut = site_cut([3, 2] * 5, even_points(176))
    with torch.no_grad():
        wanted = masked(site, x, cut)
        with installed(forward_replacements(site, Holder(cut).current)):
            assert relative_error(call_owner(site, x), wanted) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_offloaded_weights(family):
    """With accelerate the weights are real only inside each linear's own forward."""
    accelerate = pytest.importorskip("accelerate")
    plain = tiny_model(family)
    model = accelerate.cpu_offload(tiny_model(family), execution_device=torch.device("cpu"))
    site, other = find_sites(model).sites[0], find_sites(plain).sites[0]
    assert site.up.weight.is_meta
    x, record = inputs(), Recorder()
    points = even_points(site.intermediate_size)
    with torch.no_grad():
        wanted = masked(other, x, site_cut([3, 2] * 5, points))
        kept = []
        cut = site_cut([3, 2] * 5, points, record=record)
        for module, forward in forward_replacements(site, Holder(cut).current):
            kept.append((module, module._old_forward))
            module._old_forward = forward
        got = call_owner(site, x)
        for module, forward in kept:
            module._old_forward = forward
        whole = call_owner(site, x)
    assert relative_error(got, wanted) < 1e-5
    assert relative_error(whole, call_owner(other, x)) < 1e-6
    assert [call["engine"] for call in record.calls] == ["coupled"]
    assert site.up.weight.is_meta


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_deep_copy_is_cut_by_itself(family):
    model = tiny_model(family)
    site = find_sites(model).sites[0]
    x = inputs()
    holder = Holder(site_cut(MIXED, even_points(site.intermediate_size)))
    with torch.no_grad(), installed(forward_replacements(site, holder.current)):
        wanted = call_owner(site, x)
        twin = copy.deepcopy(model)
        twin_site = find_sites(twin).sites[0]
        for parameter in model.parameters():
            parameter.zero_()
        assert relative_error(call_owner(twin_site, x), wanted) < 1e-6
        holder.cut = None  # the copy keeps a cut of its own
        assert relative_error(call_owner(twin_site, x), wanted) < 1e-6
        assert pickle.loads(pickle.dumps(_Scratch())).x is None


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_two_threads_run_one_model(family):
    site = find_sites(tiny_model(family)).sites[0]
    f, x = site.intermediate_size, inputs()
    importance = Shadow.build(site).importance
    points = even_points(f, float(importance(x).quantile(0.7)))
    cuts = [site_cut(levels, points, importance=importance) for levels in (MIXED, MIXED[::-1])]
    xs = [x, 2 * x]
    here = threading.local()
    with torch.no_grad():
        wanted = [masked(site, each, cut) for each, cut in zip(xs, cuts, strict=True)]
    errors: list[float] = []

    def work(which: int) -> None:
        here.cut = cuts[which]
        with torch.no_grad():
            errors.append(max(relative_error(call_owner(site, xs[which]), wanted[which]) for _ in range(60)))

    pairs = linears_only(forward_replacements(site, lambda: here.cut), site)
    with installed(pairs):
        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 2
    assert max(errors) < 1e-5


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("coupled", [True, False])
def test_gradients(family, coupled):
    site = find_sites(tiny_model(family, dtype=torch.float64)).sites[0]
    x = inputs().double().requires_grad_()
    cut = site_cut([3, 2, 0, 5, 1] * 2, even_points(site.intermediate_size))
    leaves = [x, site.up.weight, site.down.weight]
    wanted = torch.autograd.grad(masked(site, x, cut).square().sum(), leaves)
    pairs = forward_replacements(site, Holder(cut).current)
    with installed(linears_only(pairs, site) if coupled else pairs):
        got = torch.autograd.grad(call_owner(site, x).square().sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_callers_may_change_the_output_in_place():
    for family in ("llama", "bloom"):
        site = find_sites(tiny_model(family)).sites[0]
        x = inputs()
        for levels in (MIXED, [0] * 10, [3] * 10):
            cut = site_cut(levels, even_points(site.intermediate_size))
            with torch.no_grad(), installed(forward_replacements(site, Holder(cut).current)):
                first = call_owner(site, x).clone()
                call_owner(site, x).add_(5)
                assert torch.equal(call_owner(site, x), first)
                assert torch.equal(x, inputs())


def test_training_keeps_the_dropout_of_the_class():
    model = tiny_model("gpt2", resid_pdrop=0.5).train()
    site = find_sites(model).sites[0]
    x, record = inputs(), Recorder()
    holder = Holder(site_cut(MIXED, even_points(site.intermediate_size), record=record))
    with torch.no_grad(), installed(forward_replacements(site, holder.current)):
        y = call_owner(site, x)
    assert 0.3 < float((y == 0).float().mean()) < 0.7
    assert [call["engine"] for call in record.calls] == ["mask"]
