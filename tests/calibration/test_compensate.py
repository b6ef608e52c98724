"""Compensation against plain least squares."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.calibration.compensate import fit_compensation

D, F, N = 12, 40, 4000


@pytest.fixture(scope="module")
def units() -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated hidden units [n, f] with a mean, and down [d, f]."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(F, F, generator=generator) * torch.linspace(2, 0.2, F)
    h = torch.randn(N, F, generator=generator) @ mix / F**0.5 + torch.randn(F, generator=generator)
    return h, torch.randn(D, F, generator=generator)


def _error(units: tuple[torch.Tensor, torch.Tensor], width: int, rank: int | None) -> float:
    h, down = units
    y = h[:, :width] @ down[:, :width].T
    if rank is not None:
        fitted = fit_compensation(down, h.mean(0), h.T @ h / N, {3: width}, 8, rank)
        bias = fitted.bias(y)
        assert bias is not None
        y = y + bias[3]
        pair = fitted.low_rank(3, y)
        if pair is not None:
            y = y + h[:, :width] @ pair[1].T @ pair[0].T
    return float((y - h @ down.T).square().mean())


def test_bias_is_the_mean_of_what_is_left_out(units: tuple[torch.Tensor, torch.Tensor]) -> None:
    h, down = units
    bias = fit_compensation(down, h.mean(0), None, {2: 16}, 8, 0).bias(h)
    assert bias is not None
    torch.testing.assert_close(bias[2], (h[:, 16:] @ down[:, 16:].T).mean(0), atol=1e-4, rtol=1e-4)
    assert not bias[[0, 1, 3, 8]].any()


def test_more_rank_leaves_less_error_down_to_least_squares(units: tuple[torch.Tensor, torch.Tensor]) -> None:
    h, down = units
    errors = [_error(units, 20, rank) for rank in (None, 0, 2, 6, D)]
    assert errors == sorted(errors, reverse=True)
    design = torch.cat((h[:, :20], torch.ones(N, 1)), dim=1)
    best = torch.linalg.lstsq(design, h @ down.T).solution
    least = float((design @ best - h @ down.T).square().mean())
    assert errors[-1] == pytest.approx(least, rel=0.05)  # ridge and two-byte parameters cost a little


def test_whole_levels_are_left_alone(units: tuple[torch.Tensor, torch.Tensor]) -> None:
    h, down = units
    fitted = fit_compensation(down, h.mean(0), h.T @ h / N, {1: 16, 7: F}, 8, 4)
    assert fitted.low_rank(7, h) is None
    bias = fitted.bias(h)
    assert bias is not None
    assert not bias[7].any()
