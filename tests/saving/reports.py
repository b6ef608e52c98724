"""A calibration report with figures of its own in every field, for tests of what is made of it."""

from __future__ import annotations

from sedac_hf.calibration import CalibrationReport
from sedac_hf.calibration.report import CheckpointReport


def some_report() -> CalibrationReport:
    return CalibrationReport(
        objective="throughput",
        cut="truncate",
        max_ppl_increase=0.0123,
        requested_share=None,
        needed_bytes=0.617,
        needed_multiply_adds=0.634,
        dense_perplexity=7.771,
        perplexity=7.832,
        ppl_increase=0.00785,
        ppl_increase_bound=0.0117,
        confidence=0.95,
        constant_share=0.615,
        constant_ppl_increase=0.0131,
        law_over_constant=(-0.009, -0.001),
        fit_kl=0.011,
        fit_constant_kl=0.014,
        spread=0.5,
        protocol="windows",
        context=256,
        fit_tokens=2048,
        held_out_tokens=4096,
        held_out_documents=31,
        n_levels=8,
        confidence_decay=0.5,
        dtype="float32",
        seconds=12.0,
        checkpoints=(CheckpointReport(1, -10.0, 1.0, 1.0, 0.4, 0.02, 0.3),),
        layer_keep=(1.0, 0.5, 0.25, 0.75),
    )
