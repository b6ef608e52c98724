"""Recognising activations by what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from sedac_hf.ops.activations import KNOWN, name_of


@pytest.mark.parametrize("name", KNOWN)
def test_each_known_function_is_itself_and_no_other(name: str) -> None:
    assert name_of(KNOWN[name]) == name


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu_squared"),
        ("mish", None),
        ("relu6", None),
        ("gelu_10", None),
    ],
)
def test_activations_of_transformers(key: str, name: str | None) -> None:
    assert name_of(ACT2FN[key]) == name


def test_a_callable_that_fails_or_learns_is_none_of_them() -> None:
    assert name_of(nn.PReLU()) is None
    assert name_of(nn.Linear(3, 3)) is None
    assert name_of(lambda z: z[:3]) is None
    assert name_of(lambda z: torch.nn.functional.silu(1.01 * z)) is None
