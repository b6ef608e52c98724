"""What is known of torch's products on this machine."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.ops import compiled, onednn
from sedac_hf.ops.compiled import MOST_IN_TURNS, available, most_in_turns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_without_onednn_has_no_products(dtype, monkeypatch):
    assert isinstance(onednn.has_products(dtype), bool)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)  # such a build has not even the question
    assert onednn.has_products.__wrapped__(dtype) is False


@pytest.mark.skipif(not available(), reason="the compiled module is not installed")
def test_kernels_take_any_number_of_rows_where_torch_has_no_products(monkeypatch):
    for products in (True, False):
        monkeypatch.setattr(onednn, "has_products", lambda dtype, products=products: products)
        assert most_in_turns(torch.float32) == MOST_IN_TURNS
        for dtype in (torch.bfloat16, torch.float16):
            assert (most_in_turns(dtype) == MOST_IN_TURNS) == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("isa", ["avx2", "portable", ""])
def test_kernels_stand_in_only_where_they_are_known_to_be_quicker(dtype, products, joined, isa, monkeypatch):
    monkeypatch.setattr(onednn, "has_products", lambda dtype: products)
    monkeypatch.setattr(compiled, "kernels_join_torch", lambda: joined)
    monkeypatch.setattr(compiled, "_isa", lambda: isa)
    assert compiled.stand_in(dtype) == (dtype != torch.float32 and not products and joined and isa == "avx2")
