"""Probes: their formula, dtype, causality and their way through tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sedac_hf.errors import ConfigError
from sedac_hf.probes import ProbeBank, RiskProbe


@pytest.fixture
def bank() -> ProbeBank:
    torch.manual_seed(0)
    return ProbeBank(32, 8, [3, 6])


def test_formula_and_sign(bank: ProbeBank) -> None:
    x = 5 * torch.randn(50, 32)
    probe = bank[3]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + probe.norm.eps).sqrt()
    hidden = functional.gelu(normed @ probe.down.weight.T + probe.down.bias)
    wanted = torch.log1p(torch.exp(hidden @ probe.out.weight[0] + probe.out.bias))
    risk = bank.risk(3, x)
    torch.testing.assert_close(risk, wanted, rtol=1e-5, atol=1e-5)
    assert risk.shape == (50,)
    assert (risk >= 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_risk_is_float32_whatever_the_stream_and_the_probe_are(bank: ProbeBank, dtype: torch.dtype) -> None:
    x = torch.randn(7, 32).to(dtype)
    wanted = bank.risk(3, x.float())
    bank.to(dtype if dtype != torch.float64 else torch.float32)
    bank[3].round_parameters()
    risk = bank.risk(3, x)
    assert risk.dtype == torch.float32
    torch.testing.assert_close(risk, wanted, rtol=0.05, atol=0.02)


def test_a_row_alone_has_the_risk_that_it_has_among_others(bank: ProbeBank) -> None:
    x = torch.randn(9, 32)
    torch.testing.assert_close(bank.risk(6, x[4:5])[0], bank.risk(6, x)[4])


def test_a_broken_stream_gives_a_risk_that_shows_it(bank: ProbeBank) -> None:
    x = torch.randn(3, 32)
    x[1, 5] = float("nan")
    assert bank.risk(3, x).isfinite().tolist() == [True, False, True]


def test_tensors_there_and_back(bank: ProbeBank) -> None:
    read = ProbeBank.from_tensors([3, 6], bank.state_dict())
    x = torch.randn(5, 32)
    assert torch.equal(read.risk(6, x), bank.risk(6, x))
    assert read.parameters_per_token == sum(p.numel() for p in bank[3].parameters())
    tensors = dict(bank.state_dict())
    del tensors["layers.6.out.bias"]
    with pytest.raises(ConfigError, match=r"(?s)do not fit.*layers\.6\.out\.bias"):
        ProbeBank.from_tensors([3, 6], tensors)
    with pytest.raises(ConfigError, match="missing or damaged"):
        ProbeBank.from_tensors([4], bank.state_dict())


def test_a_rank_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        RiskProbe(32, 0)
