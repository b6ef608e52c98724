"""The channel order is lossless, stays in its storages, and is undone bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.channel_order import apply_order, can_reorder, undo_order
from sedac_hf.ffn.sites import find_sites
from tests.tiny_models import FAMILIES, INTERMEDIATE, tiny_model, token_ids


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=3)
@given(seed=st.integers(0, 2**31))
def test_lossless_in_place_and_undone_bit_for_bit(family: str, seed: int) -> None:
    model = tiny_model(family)
    sites = find_sites(model).sites
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    storages = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        dense = model(token_ids()).logits
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(site.intermediate_size, generator=generator) for site in sites]
    for site, order in zip(sites, orders, strict=True):
        apply_order(site, order)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert len(changed) >= 2 * len(sites)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()).logits, dense, rtol=1e-4, atol=1e-4)
    for site, order in zip(sites, orders, strict=True):
        undo_order(site, order)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.data_ptr() == storages[name], name


def test_units_go_where_the_order_says() -> None:
    site = find_sites(tiny_model("llama")).sites[0]
    gate, up, down = (linear.weight.detach().clone() for linear in site.linears)
    order = torch.randperm(INTERMEDIATE, generator=torch.Generator().manual_seed(1))
    apply_order(site, order)
    now = [linear.weight for linear in site.linears]
    assert torch.equal(now[0][5], gate[order[5]])
    assert torch.equal(now[1][5], up[order[5]])
    assert torch.equal(now[2][:, 5], down[:, order[5]])


@pytest.mark.parametrize(
    "order", [torch.arange(INTERMEDIATE - 1), torch.zeros(INTERMEDIATE, dtype=torch.int64), torch.arange(1, 177)]
)
def test_what_is_no_permutation_is_refused_and_nothing_moves(order: torch.Tensor) -> None:
    site = find_sites(tiny_model("llama")).sites[0]
    before = site.down.weight.detach().clone()
    with pytest.raises(ValueError, match="must be a permutation of the 176 units"):
        apply_order(site, order)
    assert torch.equal(site.down.weight, before)


def test_weights_that_are_not_here_are_refused() -> None:
    site = find_sites(tiny_model("llama")).sites[0]
    site.down.to("meta")
    assert not can_reorder(site)
    with pytest.raises(UnsupportedModelError, match="latency"):
        apply_order(site, torch.arange(INTERMEDIATE))
