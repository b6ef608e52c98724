"""Refit compensation against the dense stream: from layer to layer, on inputs as the cut network makes them.

A fit per FFN (`compensate`) puts right what that FFN leaves out. What earlier FFNs left out has by then moved the
residual stream: with inputs from the cut stream and the dense stream's layer output as the target, a correction takes
some of that back as well. At a level, layer by layer: ``E = dense output - cut output``, regressed on the kept units
of the cut stream, added to the pair ``U V`` and brought back to its rank (reduced-rank regression, Izenman 1975); so
the cost at run time and the memory stay as they were. A level is kept only where it lowers the KL on other tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sedac_hf.calibration.collect import stream
from sedac_hf.calibration.dial import Dial, prepared
from sedac_hf.calibration.spread import Reference
from sedac_hf.errors import UnsupportedModelError
from sedac_hf.evaluation import Batch, WindowSet
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.replay import LayerReplay

_LEAST_USE = 0.02  # of the tokens, at some checkpoint
_RIDGE = 3e-2  # of the mean variance of the kept units


def refit_levels(runtime: SedacRuntime, dial: Dial, fit: WindowSet, check: WindowSet, share: float) -> None:
    """Refit the levels that the law uses at a needed share where that wins; those done before are left.

    They are put into ``dial.refitted``. Decoders whose layers cannot be run one by one are left as they are.

    Args:
        runtime: must be bare; it is bare afterwards.
        fit: windows to fit on: many times as many tokens as an FFN has units.
        check: other windows, to judge by.

    Raises:
        CalibrationError: a KL is not finite.
    """
    levels = [level for level in dial.levels_in_use(share, _LEAST_USE) if level not in dial.refitted]
    by_layer = {site.layer_idx: i for i, site in enumerate(runtime.sites)}
    if not levels or len(by_layer) < len(runtime.sites):
        return
    with prepared(runtime, dial):
        try:
            replay = LayerReplay(runtime, (_arguments(batch) for batch in stream(runtime, fit, False, "layers")))
            runs = [_Run(runtime, dial, level, share, replay.first) for level in levels]
            dense = replay.first
            for layer_idx in range(len(runtime.decoder_layers)):
                dense = replay.run(layer_idx, dense)
                for run in runs:
                    run.advance(replay, layer_idx, by_layer.get(layer_idx), dense)
        except UnsupportedModelError:
            return
        reference = Reference(runtime, check)
        for run in runs:
            before, _ = reference.kl(runtime.forced(run.points, run.original))
            after, _ = reference.kl(runtime.forced(run.points, run.compensation))
            wins = after < before
            dial.refitted[run.level] = {site: run.compensation[site] for site in run.changed} if wins else {}


def _arguments(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}


class _Run:
    """One level on its way through the layers."""

    def __init__(self, runtime: SedacRuntime, dial: Dial, level: int, share: float, first: list[Tensor]) -> None:
        self.runtime = runtime
        self.level = level
        self.points, self.original = dial.level_points(level, share)
        self.compensation = list(self.original)
        self.governed = set(dial.governed)
        self.hidden = first
        self.changed: list[int] = []

    def advance(self, replay: LayerReplay, layer_idx: int, site: int | None, dense: list[Tensor]) -> None:
        """Through one layer, its FFN's compensation refitted on the way."""
        if site is not None and site in self.governed:
            old = self.compensation[site]
            if old is not None and old.low_rank(1, self.hidden[0]) is not None:
                self.compensation[site] = self._refitted(replay, layer_idx, site, old, dense)
                self.changed.append(site)
        with self.runtime.forced(self.points, self.compensation):
            self.hidden = replay.run(layer_idx, self.hidden)

    def _refitted(
        self,
        replay: LayerReplay,
        layer_idx: int,
        site: int,
        old: LevelCompensation,
        dense: list[Tensor],
    ) -> LevelCompensation:
        d, width = dense[0].shape[-1], self.points[site].width
        device = dense[0].device
        total, drift = torch.zeros(width, device=device), torch.zeros(d, device=device)
        moment, cross = (
            torch.zeros(width, width, device=device),
            torch.zeros(width, d, device=device),
        )
        kept: list[Tensor] = []

        def keep(i: int, x: Tensor, h: Tensor) -> None:
            if i == site:
                kept.append(h[:, :width].float().to(device))

        n = 0
        with self.runtime.forced(self.points, self.compensation), self.runtime.observe(on_ffn=keep):
            for batch, (x, wanted) in enumerate(zip(self.hidden, dense, strict=True)):
                got = replay.run_batch(layer_idx, batch, x)
                error = (wanted - got).reshape(-1, d).float().to(device)
                h = kept.pop()
                n += h.shape[0]
                total += h.sum(0)
                drift += error.sum(0)
                moment.addmm_(h.T, h)  # in place: a product of its own would be as large
                cross.addmm_(h.T, error)
        mean, drift = total / n, drift / n
        moment.div_(n).sub_(torch.outer(mean, mean))
        cross.div_(n).sub_(torch.outer(mean, drift))
        pair = old.low_rank(1, mean)
        bias = old.bias(mean)
        assert pair is not None
        assert bias is not None
        return corrected(bias[1], pair, mean, moment, cross, drift)


def corrected(
    bias: Tensor, pair: tuple[Tensor, Tensor], mean: Tensor, moment: Tensor, cross: Tensor, drift: Tensor
) -> LevelCompensation:
    """Level 1 of two levels: ``bias + U V h`` with the regression of an error on h added, at the rank of U V.

    Args:
        bias: [d]; pair: (U [d, r], V [r, width]); mean: E[h] [width]; moment: covariance of h [width, width];
        cross: E[(h - mean) error^T] [width, d]; drift: E[error] [d].
    """
    u, v = (part.float() for part in pair)
    ridged = moment.clone()
    ridged.diagonal().add_(_RIDGE * moment.diagonal().mean().clamp(min=1e-12))
    factor = torch.linalg.cholesky(ridged)
    whitened = torch.linalg.solve_triangular(factor, cross, upper=False).T + u @ (v @ factor)
    left, s, right = torch.linalg.svd(whitened, full_matrices=False)
    r = u.shape[1]
    new_u = (left[:, :r] * s[:r].sqrt()).bfloat16()  # stored, and counted, at two bytes per parameter
    new_v = torch.linalg.solve_triangular(factor, right[:r], upper=False, left=False) * s[:r, None].sqrt()
    new_v = new_v.bfloat16()
    shift = u @ (v @ mean) - new_u.float() @ (new_v.float() @ mean)
    table = torch.stack((torch.zeros_like(bias), bias + drift + shift, torch.zeros_like(bias)))
    return LevelCompensation(table.cpu(), {1: (new_u.cpu(), new_v.cpu())}, 2)
