"""What SEDAC holds in memory beside the base, and the cap on it.

The cap (`SedacConfig.extra_memory`, a share of the base's bytes) is over the sum: shadows, compensation, probes and
channel orders. Calibration stays below it: it takes the most bits for the shadow that fit (4, 3, 2, else the exact
gate decides, which holds nothing) and the largest rank of the compensation that fits. On loading, compensation and
probes are what the policy was judged with, so they fit or the policy is refused; a shadow that does not fit gives way
to the exact gate, which decides no worse and saves less, and a warning says so. A tensor-parallel base is counted as a
whole, all ranks together, so that what was calibrated in one process fits any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from transformers.utils import logging

from sedac_hf.configuration import SHADOW_BITS
from sedac_hf.errors import ConfigError
from sedac_hf.ffn.deciders import bytes_for
from sedac_hf.ffn.linears import stored_bytes
from sedac_hf.ffn.policy import Policy
from sedac_hf.ffn.sharded import is_sharded
from sedac_hf.ffn.sites import FFNSite

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of the base, and of what lies beside it."""

    base: int
    shadow: int
    compensation: int
    probes: int
    channel_order: int
    cap: int

    @property
    def extra(self) -> int:
        """All that is not the base's."""
        return self.shadow + self.compensation + self.probes + self.channel_order

    def to_dict(self) -> dict[str, int]:
        """Plain types, for JSON."""
        return {**asdict(self), "extra": self.extra}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once; of a sharded one all parts."""
    each = {id(tensor): tensor for tensor in tensors}.values()
    return sum(t.numel() * t.element_size() if is_sharded(t) else stored_bytes(t) for t in each)


def base_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; offloaded ones are counted as if they were here."""
    return bytes_of([*model.parameters(), *model.buffers()])


def running_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def memory_use(model: nn.Module, policy: Policy | None, shadow: int, share: float) -> MemoryUse:
    """What is held with a policy (or would be, while none is installed) and so many bytes of shadows."""
    dtype = running_dtype(model)
    base = base_bytes(model)
    return MemoryUse(
        base=base,
        shadow=shadow,
        compensation=sum(
            item.bytes_in(dtype) for item in ((policy and policy.compensation) or ()) if item is not None
        ),
        probes=0 if policy is None else bytes_of(policy.probes.parameters()),
        channel_order=bytes_of(order for order in ((policy and policy.channel_order) or ()) if order is not None),
        cap=int(share * base),
    )


def shadow_bytes(sites: Sequence[FFNSite], bits: int) -> int:
    """Bytes of the shadows of all FFNs, on all ranks."""
    own = [site for site in sites if site.origin is None]  # tied weights have one shadow
    return sum(bytes_for(site, bits) * (1 if site.shard is None else site.shard.ranks) for site in own)


def shadow_bits_within(sites: Sequence[FFNSite], budget: int) -> int:
    """The most bits of a shadow of all FFNs that a number of bytes allows; 0: none."""
    for bits in SHADOW_BITS:
        if shadow_bytes(sites, bits) <= budget:
            return bits
    return 0


def bits_allowed(model: nn.Module, sites: Sequence[FFNSite], policy: Policy, extra_memory: float) -> int:
    """A policy's shadow bits, or 0 where the cap has no room for them.

    Raises:
        ConfigError: its tables alone do not fit.
    """
    use = memory_use(model, policy, 0, extra_memory)
    remedy = "raise `extra_memory` in the SedacConfig that the model is made with, or calibrate again on this base"
    if use.extra > use.cap:
        raise ConfigError(
            f"compensation ({use.compensation} bytes), probes ({use.probes}) and channel orders "
            f"({use.channel_order}) must fit into {extra_memory:g} of the base's {use.base} bytes, which is "
            f"{use.cap}: {remedy}"
        )
    if policy.cut != "select" or policy.shadow_bits == 0:
        return 0
    wanted = shadow_bytes(sites, policy.shadow_bits)
    if use.extra + wanted <= use.cap:
        return policy.shadow_bits
    logger.warning_once(
        f"the {policy.shadow_bits}-bit shadow needs {wanted} bytes, more than {extra_memory:g} of the base's "
        f"{use.base} bytes leaves: the exact gates decide, which reads more and saves less; {remedy}"
    )
    return 0
