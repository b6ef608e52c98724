"""Tiny quantised decoders by way of transformers' `TorchAoConfig`, from a saved folder as a user loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.ffn.linears import inner_tensors
from tests.tiny_models import tiny_model


def torchao_config(kind: str) -> object:
    """int8 or float8 (weights only), int8_dynamic (activations rounded too), int8_groups (a scale per 16 inputs)."""
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    makers: dict[str, Callable[[], object]] = {
        "int8": ao.Int8WeightOnlyConfig,
        "float8": ao.Float8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "int8_groups": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
    }
    return makers[kind]()


def quantised_model(
    family: str, kind: str, folder: Path, dtype: torch.dtype = torch.float32, **overrides: object
) -> SedacForCausalLM:
    """A wrapped, quantised decoder; ``folder`` then holds the float one, which an adapter names as its base."""
    config = torchao_config(kind)
    tiny_model(family, **overrides).save_pretrained(folder)
    return SedacForCausalLM.from_pretrained(
        folder,
        sedac_config=SedacConfig(extra_memory=0.5),  # of a quarter of the bytes: a random policy's tables are large
        quantization_config=TorchAoConfig(config),
        dtype=dtype,
    )


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the ordinary tensors that a model's weights are kept in."""
    return {
        f"{name}.{i}": part.detach().clone().view(torch.uint8) if part.element_size() == 1 else part.detach().clone()
        for name, parameter in model.named_parameters()
        for i, part in enumerate(inner_tensors(parameter))
    }
