"""A policy: all that a runtime needs to run a decoder cut. Calibration makes one, a saved model holds one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sedac_hf.configuration import SHADOW_BITS, Cut, Objective
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.channel_order import check_order
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.schedule import WidthSchedule
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.layer_config import DEFAULT_ALPHA, LayerConfig
from sedac_hf.probes import ProbeBank

_PROBES, _ORDER, _COMPENSATION = "probes.", "channel_order.", "compensation."


@dataclass
class Policy:
    """Law, schedule and what they rest on.

    Args:
        cut: "select", "truncate" or "mask" (the reference: truncates by zeroing).
        objective: what it was calibrated for.
        layer_configs: the law's checkpoints.
        schedule: operating points per FFN and level.
        probes: one per checkpoint layer.
        risk_scale: x0 per checkpoint, nats.
        channel_order: per FFN int64 [f] or None (natural; or its origin's, where its weights are tied to an earlier
            FFN's); None: all natural.
        compensation: per FFN; None: none at all.
        typical_level: the level that most calibration tokens were given.
        shadow_bits: of the shadow that its thresholds on the importance are for; 0: the exact gate.
    """

    cut: Cut
    objective: Objective
    layer_configs: tuple[LayerConfig, ...]
    confidence_decay: float
    schedule: WidthSchedule
    probes: ProbeBank
    risk_scale: tuple[float, ...]
    soft_exit: bool = True
    alpha: float = DEFAULT_ALPHA
    channel_order: tuple[Tensor | None, ...] | None = None
    compensation: tuple[LevelCompensation | None, ...] | None = None
    typical_level: int = 1
    shadow_bits: int = SHADOW_BITS[0]

    @property
    def n_levels(self) -> int:
        return self.schedule.n_levels

    def _check_finite(self) -> None:
        for name, tensor in self.to_tensors().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ConfigError(f"a policy's tensors must be finite numbers; {name!r} is not: is the file damaged?")

    def check(self, sites: Sequence[FFNSite], checkpoint_layers: Sequence[int]) -> None:
        """Raise ConfigError unless the policy is for a decoder with these FFNs and checkpoint layers."""
        self.schedule.check([site.total_units for site in sites])
        self._check_finite()
        layers = [item.layer_idx for item in self.layer_configs]
        if layers != list(checkpoint_layers):
            raise ConfigError(f"the policy has checkpoints at layers {layers}, the model at {list(checkpoint_layers)}")
        if self.probes.hidden_size != sites[0].hidden_size:
            raise ConfigError(
                f"the probes are for a hidden size of {self.probes.hidden_size}, the model has {sites[0].hidden_size}"
            )
        for name in ("channel_order", "compensation"):
            values = getattr(self, name)
            if values is not None and len(values) != len(sites):
                raise ConfigError(f"`{name}` needs one entry per FFN: {len(sites)}, got {len(values)}")
        for site, order in zip(sites, self.channel_order or (), strict=False):
            if order is not None and site.origin is not None:
                raise ConfigError(
                    f"`channel_order` must be None for {site.name!r}, which has its weights, and so its order, from "
                    f"{site.origin.name!r}; got one of its own"
                )
            if order is not None:
                check_order(site, order)
        for site, item, row in zip(sites, self.compensation or (), self.schedule.points, strict=False):
            if item is not None:
                item.check(site.hidden_size, row)

    def dealt(self, sites: Sequence[FFNSite]) -> Policy:
        """The policy as this process runs it: of a tensor-parallel FFN, this rank's part of every width.

        An FFN whose widths cut it is put in a dealt order also where it has none of its own: a prefix of the natural
        order would lie with the first ranks.
        """
        if all(site.shard is None for site in sites):
            return self
        rows, orders, compensations = [], [], []
        for i, (site, row) in enumerate(zip(sites, self.schedule.points, strict=True)):
            order = None if self.channel_order is None else self.channel_order[i]
            compensation = None if self.compensation is None else self.compensation[i]
            if site.shard is not None:
                shard = site.shard
                if order is None and site.origin is None and any(0 < point.width < shard.units for point in row):
                    order = torch.arange(shard.units)
                row = tuple(point._replace(width=shard.width(point.width)) for point in row)
                compensation = compensation and compensation.part(shard, dealt=order is not None)
            rows.append(row)
            orders.append(order)
            compensations.append(compensation)
        return dataclasses.replace(
            self,
            schedule=WidthSchedule(self.n_levels, tuple(rows)),
            channel_order=tuple(orders),
            compensation=tuple(compensations),
        )

    def to_config(self) -> dict[str, Any]:
        """The part that a configuration holds, JSON types only."""
        return {
            "cut": self.cut,
            "objective": self.objective,
            "layer_configs": [dataclasses.asdict(item) for item in self.layer_configs],
            "confidence_decay": self.confidence_decay,
            "soft_exit": self.soft_exit,
            "alpha": self.alpha,
            "n_levels": self.n_levels,
            "probe_rank": self.probes.rank,
            "schedule": {**self.schedule.to_dict(), "typical_level": self.typical_level},
            "risk_scale": list(self.risk_scale),
            "shadow_bits": self.shadow_bits,
        }

    def to_tensors(self) -> dict[str, Tensor]:
        """The part that a safetensors file holds."""
        tensors = {_PROBES + name: tensor for name, tensor in self.probes.state_dict().items()}
        for i, order in enumerate(self.channel_order or ()):
            if order is not None:
                tensors[f"{_ORDER}{i}"] = order
        for i, compensation in enumerate(self.compensation or ()):
            if compensation is not None:
                tensors |= compensation.to_tensors(f"{_COMPENSATION}{i}.")
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_saved(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Policy:
        """Put `to_config` and `to_tensors` together again.

        Raises:
            ConfigError: they do not fit each other.
        """
        layer_configs = tuple(LayerConfig(**item) for item in config["layer_configs"])
        schedule = WidthSchedule.from_dict(config["schedule"])
        n_sites = len(schedule.points)
        if config["n_levels"] != schedule.n_levels:
            raise ConfigError(f"`n_levels` must be the schedule's {schedule.n_levels}, got {config['n_levels']}")
        layers = [item.layer_idx for item in layer_configs]
        orders = tuple(tensors.get(f"{_ORDER}{i}") for i in range(n_sites))
        for i, order in enumerate(orders):
            if order is not None and order.dtype != torch.int64:
                raise ConfigError(f"the channel order of FFN {i} must be int64, got {order.dtype}")
        compensation = tuple(
            LevelCompensation.from_tensors(_below(tensors, f"{_COMPENSATION}{i}."), schedule.n_levels)
            for i in range(n_sites)
        )
        return cls(
            cut=config["cut"],
            objective=config["objective"],
            layer_configs=layer_configs,
            confidence_decay=config["confidence_decay"],
            soft_exit=config["soft_exit"],
            alpha=config["alpha"],
            schedule=schedule,
            probes=ProbeBank.from_tensors(layers, _below(tensors, _PROBES)),
            risk_scale=tuple(config["risk_scale"]),
            channel_order=None if all(order is None for order in orders) else orders,
            compensation=None if all(item is None for item in compensation) else compensation,
            typical_level=int(config["schedule"].get("typical_level", 1)),
            shadow_bits=config["shadow_bits"],
        )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
