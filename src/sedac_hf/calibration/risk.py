"""Risk targets (per-token KL of cutting what is behind a checkpoint) and the probes that predict them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sedac_hf.calibration.collect import stream
from sedac_hf.errors import CalibrationError
from sedac_hf.evaluation import WindowSet, kl_to, scored_logits
from sedac_hf.ops.contract import Compensation, OperatingPoint
from sedac_hf.probes import ProbeBank, RiskProbe
from sedac_hf.runtime import SedacRuntime

_EPOCHS, _BATCH, _RATE, _DECAY, _PATIENCE = 24, 256, 1e-3, 0.3, 5
_NOISE = 0.3  # of each feature's spread, added to the input while fitting: probes overfit within two epochs otherwise
_SCALE = 1 / 16
"""x0 over the median KL. So far below it the risk is log KL but for a constant, for nearly every token, and C is
affine in the risk, as the law's dial wants it."""

_FLOOR = 0.3  # in x0: tokens harmed by less are alike


@dataclass
class RiskTargets:
    """Per checkpoint: hidden bfloat16 [n, d] and KL float32 [n] in nats of the scored tokens, in stream order."""

    hidden: list[Tensor]
    kl: list[Tensor]


def risk_targets(
    runtime: SedacRuntime,
    windows: WindowSet,
    points: Sequence[OperatingPoint],
    compensation: Sequence[Compensation | None] | None,
    *,
    progress: bool,
) -> RiskTargets:
    """KL between full output and output with all FFNs behind a checkpoint at ``points``, for each checkpoint.

    Hidden states after the first checkpoint are read from the cut stream, as probes will see them; of a checkpoint
    that comes several times in a forward, the last time.
    """
    n = len(runtime.checkpoint_layers)
    hidden: list[list[Tensor]] = [[] for _ in range(n)]
    kl: list[list[Tensor]] = [[] for _ in range(n)]
    scored: Tensor = torch.zeros(0)
    wanted: set[int] = set()
    latest: dict[int, Tensor] = {}

    def on_checkpoint(idx: int, states: Tensor) -> None:
        if idx in wanted:
            latest[idx] = states[scored.to(states.device)].bfloat16().cpu()

    def keep() -> None:
        for idx in sorted(latest):
            hidden[idx].append(latest.pop(idx))

    with runtime.observe(on_checkpoint=on_checkpoint):
        for batch in stream(runtime, windows, progress, "risk"):
            last = torch.zeros(batch.scored.shape[0], 1, dtype=torch.bool, device=batch.scored.device)
            scored = torch.cat((batch.scored, last), dim=1).flatten()
            wanted = {0}
            dense = scored_logits(runtime.model, batch)
            keep()
            for idx in range(n):
                wanted = set(range(1, n)) if idx == 0 else set()
                behind = [p if s >= idx else None for p, s in zip(points, runtime.segments, strict=True)]
                with runtime.forced(behind, compensation):
                    kl[idx].append(kl_to(dense, scored_logits(runtime.model, batch), torch.float32).cpu())
                keep()
            del dense  # logits are large: none is held while the next are made
            wanted = set()
    result = RiskTargets([_joined(h) for h in hidden], [torch.cat(k) for k in kl])
    if not all(bool(torch.isfinite(k).all()) for k in result.kl):
        raise CalibrationError("the KL between full and cut output must be finite; got NaN or infinity")
    return result


def _joined(parts: list[Tensor]) -> Tensor:
    """One tensor; the parts are given up, so that no more than one checkpoint's states are held twice."""
    whole = torch.cat(parts)
    parts.clear()
    return whole


def fit_probes(
    targets: RiskTargets, layers: Sequence[int], n_fit: int, *, rank: int, seed: int
) -> tuple[ProbeBank, tuple[float, ...], np.ndarray, tuple[float, ...]]:
    """Fit one probe per checkpoint on the first ``n_fit`` tokens, stop early on the others.

    Returns:
        The probes; x0 per checkpoint (nats); risks of the other tokens float32 [n_checkpoints, n]; Spearman
        rank correlation of predicted and true KL on them.
    """
    generator = torch.Generator().manual_seed(seed)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        bank = ProbeBank(targets.hidden[0].shape[1], rank, layers)
    finally:
        torch.random.set_rng_state(state)
    scales, risks, quality = [], [], []
    for i, layer in enumerate(layers):
        kl = targets.kl[i]
        x0 = max(_SCALE * float(kl[:n_fit].median()), 1e-12)
        _fit_one(bank[layer], targets.hidden[i], kl / x0, n_fit, generator)
        bank[layer].round_parameters()
        with torch.no_grad():
            risk = bank[layer](targets.hidden[i][n_fit:])
        scales.append(x0)
        risks.append(risk.numpy())
        quality.append(rank_correlation(risk.numpy(), kl[n_fit:].numpy()))
    return bank.requires_grad_(False).eval(), tuple(scales), np.stack(risks), tuple(quality)


def _loss(risk: Tensor, harm: Tensor) -> Tensor:
    """Gamma deviance of harm (KL / x0) with mean expm1(risk): learns the mean KL given the hidden state, which is what
    an allocation needs, where squares of the risk would learn the mean of its logarithm."""
    mean = torch.expm1(risk.clamp(max=50)) + _FLOOR
    return (harm / mean + mean.log()).mean()


def _fit_one(probe: RiskProbe, hidden: Tensor, harm: Tensor, n_fit: int, generator: torch.Generator) -> None:
    harm = harm.clamp(max=1e6)
    with torch.no_grad():  # softplus(out.bias) = risk of the mean harm: learning starts from the constant
        probe.out.bias.fill_(float(torch.log(torch.expm1(torch.log1p(harm[:n_fit].mean()).clamp(min=1e-3)))))
        probe.out.weight.mul_(0.1)
    noise = _NOISE * hidden[:n_fit].float().std(dim=0)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=_RATE, weight_decay=_DECAY)
    best, best_state, since = float("inf"), None, 0
    for epoch in range(_EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (1 - epoch / _EPOCHS)
        order = torch.randperm(n_fit, generator=generator)
        for part in order.split(_BATCH):
            with torch.enable_grad():
                inputs = hidden[part].float()
                inputs = inputs + noise * torch.randn(inputs.shape, generator=generator)
                loss = _loss(probe(inputs), harm[part])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
        with torch.no_grad():
            error = float(_loss(probe(hidden[n_fit:]), harm[n_fit:]))
        if error < best:
            best, since = error, 0
            best_state = {name: value.clone() for name, value in probe.state_dict().items()}
        else:
            since += 1
            if since == _PATIENCE:
                break
    if best_state is not None:
        probe.load_state_dict(best_state)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of them is constant."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(np.float64) for values in (a, b)]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])
