"""Probes of a decode step by their kernel: torch's risks to within rounding, made anew when something changed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedac_hf import SedacForCausalLM
from sedac_hf.ops.compiled import MAX_ROWS, available
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime.decode_probes import DecodeProbes
from tests.kernel_cases import DTYPES
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")


def bank_of(hidden_size: int, rank: int, seed: int = 0) -> ProbeBank:
    bank = ProbeBank(hidden_size, rank, (1,)).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in bank.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    bank[1].round_parameters()
    return bank


@settings(max_examples=60, deadline=None)
@given(
    hidden_size=st.integers(1, 300),
    rank=st.integers(1, 70),
    rows=st.integers(1, MAX_ROWS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_kernel_gives_the_probes_risks(hidden_size, rank, rows, dtype, seed):
    bank = bank_of(hidden_size, rank, seed)
    hidden = torch.randn(rows, 1, hidden_size, generator=torch.Generator().manual_seed(seed)).mul(3).to(dtype)
    found = DecodeProbes().risks(bank, 1, hidden)
    assert found is not None
    assert found.dtype == np.float32
    exact = copy.deepcopy(bank[1]).double()
    wanted = _in_float64(exact, hidden.reshape(rows, -1))
    plain = bank.risk(1, hidden.reshape(rows, -1))
    # As good as torch in float32, give or take where torch happens to be lucky.
    limit = 2 * (plain.double() - wanted).abs().max() + 1e-5 * (1 + wanted.abs().max())
    assert (torch.from_numpy(found).double() - wanted).abs().max() <= limit


def _in_float64(probe, hidden):
    x = torch.nn.functional.layer_norm(
        hidden.double(), probe.norm.normalized_shape, probe.norm.weight, probe.norm.bias, probe.norm.eps
    )
    x = torch.nn.functional.gelu(probe.down(x))
    return torch.nn.functional.softplus(probe.out(x)).squeeze(-1)


def test_other_calls_are_left_to_torch():
    bank, probes = bank_of(16, 4), DecodeProbes()
    for hidden in (
        torch.randn(MAX_ROWS + 1, 16),
        torch.randn(0, 16),
        torch.randn(1, 15),
        torch.randn(1, 16).double(),
        torch.randn(2, 32)[:, ::2],
        torch.randn(1, 16, device="meta"),
    ):
        assert probes.risks(bank, 1, hidden) is None
    assert probes.risks(bank.half(), 1, torch.randn(1, 16)) is None


def test_a_changed_probe_is_noticed():
    bank, probes, hidden = bank_of(16, 4), DecodeProbes(), torch.randn(1, 16)
    first = probes.risks(bank, 1, hidden)
    bank[1].out.bias.add_(1.0)
    second = probes.risks(bank, 1, hidden)
    bank[1].out.bias = torch.nn.Parameter(bank[1].out.bias + 1.0, requires_grad=False)
    third = probes.risks(bank, 1, hidden)
    assert first[0] < second[0] < third[0]
    other = bank_of(16, 4, seed=1)
    assert probes.risks(other, 1, hidden)[0] == DecodeProbes().risks(other, 1, hidden)[0]
    assert copy.deepcopy(probes).risks(other, 1, hidden)[0] == probes.risks(other, 1, hidden)[0]


@torch.no_grad()
def test_a_decode_step_uses_the_kernel_and_counts_the_probe(monkeypatch):
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "select"))
    assert model.runtime.probes_decide
    by_torch: list[int] = []
    risk = ProbeBank.risk

    def seen(self, layer_idx, hidden):
        by_torch.append(hidden.shape[0])
        return risk(self, layer_idx, hidden)

    monkeypatch.setattr(ProbeBank, "risk", seen)
    figures = []
    for rows in (2, MAX_ROWS + 1):
        model.reset_stats()
        model(token_ids(rows, 1))
        figures.append(model.runtime.tally._totals.extra_multiply_adds / rows)
    assert by_torch == [MAX_ROWS + 1] * len(model.runtime.checkpoint_layers)
    assert figures[0] > 0


@torch.no_grad()
def test_a_hidden_state_that_is_broken_means_full_width():
    model = SedacForCausalLM.from_base(tiny_model("llama"))
    model.install(random_policy(model.runtime, "select"))
    model.model.get_input_embeddings().weight[3] = float("nan")
    model.reset_stats()
    model(torch.tensor([[3]]))
    assert model.stats().fail_safe == len(model.runtime.checkpoint_layers)
