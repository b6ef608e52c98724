"""Probes: from the hidden state after a checkpoint layer to the risk of cutting the FFNs behind it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.errors import ConfigError


def _gelu(z: Tensor) -> Tensor:
    """GELU by its formula: for the few numbers of a decode step, torch's own takes 0.1 ms on a CPU."""
    return 0.5 * z * (1 + torch.erf(z * math.sqrt(0.5)))


class RiskProbe(nn.Module):
    """LayerNorm, low-rank projection, GELU, scalar, softplus: hidden state [n, d] -> risk float32 [n], 0 or more.

    The risk's unit is log1p(KL / x0): KL in nats predicted for cutting all FFNs behind the checkpoint to the middle
    level of the schedule, x0 a sixteenth of its median on the calibration text. It computes in float32 whatever the
    base's dtype; parameters hold bfloat16 values, so a probe costs two bytes per parameter.
    """

    def __init__(self, hidden_size: int, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ConfigError(f"`rank` must be 1 or more, got {rank}")
        self.norm = nn.LayerNorm(hidden_size)
        self.down = nn.Linear(hidden_size, rank)
        self.out = nn.Linear(rank, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        norm, down, out = self.norm, self.down, self.out
        x = functional.layer_norm(
            hidden.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
        )
        x = _gelu(functional.linear(x, down.weight.float(), down.bias.float()))
        return functional.softplus(functional.linear(x, out.weight.float(), out.bias.float())).squeeze(-1)

    @torch.no_grad()
    def round_parameters(self) -> None:
        """Round the parameters to bfloat16 values, kept in their dtype."""
        for parameter in self.parameters():
            parameter.copy_(parameter.bfloat16())


class ProbeBank(nn.Module):
    """The probes of a cascade, one per checkpoint layer."""

    def __init__(self, hidden_size: int, rank: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.rank = rank
        self.layers = nn.ModuleDict({str(layer): RiskProbe(hidden_size, rank) for layer in layers})

    def __getitem__(self, layer_idx: int) -> RiskProbe:
        probe = self.layers[str(layer_idx)]
        assert isinstance(probe, RiskProbe)
        return probe

    def risk(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Risk after a layer: hidden [n, d] -> float32 [n], on the hidden state's device."""
        probe = self[layer_idx]
        if probe.out.weight.device != hidden.device:
            if probe.out.weight.is_meta:
                raise ConfigError("the probes must be in memory, and they are offloaded: offload `model.model` alone")
            probe.to(hidden.device)
        risk: Tensor = probe(hidden)
        return risk

    @functools.cached_property
    def parameters_per_token(self) -> int:
        """Parameters that one checkpoint's probe uses for a token."""
        return sum(p.numel() for p in next(iter(self.layers.values())).parameters())

    @staticmethod
    def bytes_of(hidden_size: int, rank: int, n_layers: int) -> int:
        """Bytes that a bank of float32 probes would take."""
        with torch.device("meta"):
            bank = ProbeBank(hidden_size, rank, range(n_layers))
        return sum(p.numel() * p.element_size() for p in bank.parameters())

    @classmethod
    def from_tensors(cls, layers: Sequence[int], tensors: Mapping[str, Tensor]) -> ProbeBank:
        """Probes from a state dict; sizes are read from the tensors.

        Raises:
            ConfigError: a tensor is missing or has another shape.
        """
        weight = tensors.get(f"layers.{layers[0]}.down.weight")
        if weight is None or weight.dim() != 2:
            raise ConfigError(f"a probe for layer {layers[0]} is needed; it is missing or damaged")
        bank = cls(weight.shape[1], weight.shape[0], layers)
        try:
            bank.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ConfigError(f"the probes' tensors do not fit: {error}") from error
        return bank.requires_grad_(False).eval()
