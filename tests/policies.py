"""Policies for tiny random decoders: every part present and active, none of it fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from sedac_hf.configuration import Cut
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.deciders import decider, importance_of
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.schedule import WidthSchedule, align_width
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.layer_config import LayerConfig
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.probes import ProbeBank
from sedac_hf.runtime import SedacRuntime
from tests.tiny_models import token_ids

N_LEVELS = 8


def random_policy(runtime: SedacRuntime, cut: Cut, *, seed: int = 0, compensate: bool = True) -> Policy:
    """A policy whose tokens spread over the levels; also the FFNs before the first checkpoint are cut."""
    generator = torch.Generator().manual_seed(seed)
    importance = _importance(runtime) if cut == "select" else None
    rows, compensations = [], []
    for i, site in enumerate(runtime.sites):
        f = site.intermediate_size
        row = [OperatingPoint(0)]
        for level in range(1, N_LEVELS):
            kept = 0.75 if runtime.segments[i] < 0 else level / N_LEVELS
            if importance is None:
                row.append(OperatingPoint(align_width(kept * f, f)))
            elif importance[i] is None:
                row.append(OperatingPoint(f))
            else:
                row.append(OperatingPoint(f, float(importance[i][importance[i] > 0].quantile(1 - kept))))
        rows.append((*row, OperatingPoint(f)))
        rank = 2 if site.experts is None else 0
        compensations.append(_compensation(rows[-1], site.hidden_size, generator, rank) if compensate else None)
    layers = runtime.checkpoint_layers
    order = tuple(None if site.origin is not None else _random_order(site, generator) for site in runtime.sites)
    return Policy(
        cut=cut,
        objective="latency" if cut == "select" else "throughput",
        layer_configs=tuple(LayerConfig(layer, -10.0, 1.0, 1.0) for layer in layers),
        confidence_decay=0.5,
        schedule=WidthSchedule(N_LEVELS, tuple(rows)),
        probes=spread_probes(runtime, generator),
        risk_scale=tuple(1.0 for _ in layers),
        channel_order=None if cut == "select" else order,
        compensation=tuple(compensations) if compensate else None,
        typical_level=4,
    )


def _random_order(site: FFNSite, generator: torch.Generator) -> Tensor:
    f = site.intermediate_size
    if site.experts is None:
        return torch.randperm(f, generator=generator)
    return torch.stack([torch.randperm(f, generator=generator) for _ in range(site.experts.count)])


def spread_probes(runtime: SedacRuntime, generator: torch.Generator) -> ProbeBank:
    """Probes whose risks differ from token to token, around the law's threshold of 1."""
    bank = ProbeBank(runtime.hidden_size, 8, runtime.checkpoint_layers)
    hidden: dict[int, Tensor] = {}
    with runtime.observe(on_checkpoint=hidden.__setitem__), torch.no_grad():
        runtime.model(token_ids(4, 16, seed=98))
        for idx, layer in enumerate(runtime.checkpoint_layers):
            if idx not in hidden:  # a layer that does not run
                continue
            probe = bank[layer]
            probe.down.bias.zero_()
            probe.down.weight.copy_(torch.randn(probe.down.weight.shape, generator=generator))
            probe.out.weight.copy_(torch.randn(probe.out.weight.shape, generator=generator))
            probe.out.bias.zero_()
            risk = probe(hidden[idx]).clamp(min=1e-6)
            raw = risk + torch.log1p(-torch.exp(-risk))  # what softplus was given
            probe.out.weight.div_(raw.std())
            probe.out.bias.fill_(-float(raw.mean() / raw.std()))
            probe.round_parameters()
    return bank.requires_grad_(False).eval()


def _importance(runtime: SedacRuntime) -> list[Tensor | None]:
    """Importance of the units of each FFN for random tokens; None for one that does not run."""
    shadows = [decider(site, 4) for site in runtime.sites]
    seen: dict[int, Tensor] = {}

    def keep(site: int, x: Tensor, h: Tensor) -> None:
        seen[site] = importance_of(shadows[site], x, h).flatten()

    def keep_expert(site: int, expert: int, x: Tensor, h: Tensor, weights: Tensor) -> None:
        values = (shadows[site].importance(x, expert, h) * weights.abs()[:, None]).flatten()
        seen[site] = torch.cat((seen.get(site, values[:0]), values))

    with runtime.observe(on_ffn=keep, on_expert=keep_expert), torch.no_grad():
        runtime.model(token_ids(4, 16, seed=99))
    return [seen.get(i) for i in range(len(runtime.sites))]


def _compensation(
    points: tuple[OperatingPoint, ...], hidden_size: int, generator: torch.Generator, rank: int
) -> LevelCompensation:
    bias = torch.randn(N_LEVELS + 1, hidden_size, generator=generator) * 0.05
    bias[N_LEVELS] = 0
    low_rank = {
        level: (
            torch.randn(hidden_size, rank, generator=generator) * 0.05,
            torch.randn(rank, points[level].width, generator=generator) * 0.05,
        )
        for level in ((2, 5) if rank else ())
    }
    return LevelCompensation(bias, low_rank, N_LEVELS)
