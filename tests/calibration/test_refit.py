"""A refit against the dense stream, against least squares and on a decoder."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.calibration.pipeline import calibrate, fitted_dial
from sedac_hf.calibration.refit import corrected
from sedac_hf.runtime import SedacRuntime
from tests.calibration.test_pipeline import SIZES, TOKENIZER, _model, _own_text


def test_a_full_rank_correction_is_the_least_squares_map() -> None:
    generator = torch.Generator().manual_seed(0)
    n, width, d = 5000, 12, 8
    h = torch.randn(n, width, generator=generator) + 1
    u, v = torch.randn(d, d, generator=generator), torch.randn(d, width, generator=generator)
    wanted = torch.randn(d, width, generator=generator)
    error = h @ wanted.T + 3
    mean, drift = h.mean(0), error.mean(0)
    centred = h - mean
    new = corrected(torch.zeros(d), (u, v), mean, centred.T @ centred / n, centred.T @ error / n, drift)
    bias, pair = new.bias(h), new.low_rank(1, h)
    assert bias is not None
    assert pair is not None
    got = h @ (pair[0] @ pair[1]).T + bias[1]
    left = (h @ (u @ v).T + error - got).square().mean() / error.var()
    assert float(left) < 5e-3  # the ridge, and rounding to bfloat16


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_levels_in_use_are_refitted_only_where_that_wins(family: str) -> None:
    model = _model(family)
    text = _own_text(model, documents=64)
    reports, kept = [], []
    for refit in (False, True):
        runtime = SedacRuntime(model)
        sizes = {**SIZES, "refit_compensation": refit}
        reports.append(calibrate(runtime, TOKENIZER, text, share=0.8, objective="throughput", **sizes))
        dial = fitted_dial(runtime, "throughput")
        kept.append(dial.refitted)
        assert all(dial.segments[site] >= 0 for sites in dial.refitted.values() for site in sites)
        runtime.uninstall()
    assert kept[0] == {}
    assert reports[1].spread == 0 or kept[1]
    assert reports[1].needed_bytes == pytest.approx(reports[0].needed_bytes, abs=5e-3)
