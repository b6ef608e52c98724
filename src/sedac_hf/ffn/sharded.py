"""Tensor-parallel bases: each rank holds some hidden units of every FFN, and cuts those.

transformers shards gate and up along their output and down along its input (`DTensor`); a rank computes with its own
part, and the sum of the ranks' outputs is the FFN's. Were a channel order laid over the ranks as they lie, rank 0
would hold all that matters and the others would wait for it. So units are *dealt*: rank r holds ``order[r::R]``, a
prefix of k units is ``ceil((k - r) / R)`` of rank r's, and the ranks' widths differ by one unit at most. The dealt
order depends on R and is made when a policy is installed; what is saved is the plain order.

Each unit is decided by the one rank that holds it, with the shadow rows and norms that one process would have. The
sum of the ranks rounds otherwise than one process does, though: where that moves an int8 code of the shadow's input,
all importances of the token move, and a unit near its minimum may be used in one and not in the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError

_CHUNK = 1 << 21  # elements that one exchange between the ranks gathers


@dataclass(frozen=True, eq=False)
class Shard:
    """This process's part of an FFN: rank r of R, each with ``units / R`` of its ``units`` hidden units."""

    rank: int
    ranks: int
    units: int
    group: Any = field(repr=False)

    @property
    def held(self) -> int:
        """Units that this rank holds."""
        return self.units // self.ranks

    def width(self, width: int) -> int:
        """How many of this rank's units a prefix of ``width`` dealt units is."""
        return max(0, -(-(width - self.rank) // self.ranks))

    def dealt(self, order: Tensor) -> Tensor:
        """The order as it lies over the ranks, rank 0's units first: int64 [units]."""
        return torch.cat([order[rank :: self.ranks] for rank in range(self.ranks)])

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a process group is not copied

    def sum(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' ``partial``, on each of them."""
        total: Tensor = _SumOfRanks.apply(partial, self.group)
        return total

    def agreed(self, values: Tensor) -> Tensor:
        """Rank 0's ``values`` on every rank. What all compute alike may still differ in its last bit, by the alignment
        of memory alone; what decides must not."""
        values = values.contiguous()
        dist.broadcast(values, src=dist.get_global_rank(self.group, 0), group=self.group)
        return values

    def shared(self, x: Tensor) -> Tensor:
        """An input that all ranks have alike; its gradient is the sum of theirs."""
        return _SharedByRanks.apply(x, self.group) if torch.is_grad_enabled() and x.requires_grad else x

    @torch.no_grad()
    def permute(self, local: Tensor, order: Tensor, dim: int) -> None:
        """Let the ranks' parts, one behind the other along ``dim``, be permuted by ``order``; in place, bit for bit.

        A collective: every rank must call it. It gathers a bounded part of the matrix at a time.
        """
        mine = order.view(self.ranks, self.held)[self.rank].to(local.device)
        across = 1 - dim if local.dim() == 2 else None
        size = 1 if across is None else local.shape[across]
        step = max(1, _CHUNK // self.units)
        for lo in range(0, size, step):
            piece = local if across is None else local.narrow(across, lo, min(step, size - lo))
            sent = piece.movedim(dim, 0).contiguous()
            parts = [torch.empty_like(sent) for _ in range(self.ranks)]
            dist.all_gather([_as_bytes(part) for part in parts], _as_bytes(sent), group=self.group)
            piece.copy_(torch.cat(parts).index_select(0, mine).movedim(0, dim))


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Any) -> Tensor:
        total = partial.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SharedByRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as bytes: every backend can move those, and no bit changes on the way."""
    return tensor.view(-1).view(torch.uint8)


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a `DTensor`: it lies, in parts or as a whole, on several processes."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def local_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight; the weight itself where that is all of it."""
    held: Any = weight
    part: Tensor = held.to_local() if is_sharded(weight) else weight
    return part


def shard_of(name: str, inner: tuple[nn.Module, ...], down: nn.Module, units: int) -> Shard | None:
    """How an FFN is dealt out over processes: None where this process holds all of it.

    Args:
        name: of the FFN, for messages.
        inner: gate and up, or the one linear of both.

    Raises:
        UnsupportedModelError: it is sharded in another way than along its hidden units, evenly.
    """
    weights = [getattr(linear, "weight", None) for linear in (*inner, down)]
    meshes = [_sharded_dims(weight) for weight in weights]
    if not any(meshes):
        return None
    wanted = [(0,)] * len(inner) + [(1,)]
    if [tuple(dim for _, dim in found) for found in meshes] != wanted or len({found[0][0] for found in meshes}) != 1:
        raise UnsupportedModelError(
            f"a tensor-parallel FFN must have gate and up split by their outputs and down by its inputs over one set "
            f"of ranks; {name!r} has placements {[str(getattr(weight, 'placements', None)) for weight in weights]}"
        )
    mesh: Any = weights[-1].device_mesh  # type: ignore[union-attr]
    place = meshes[-1][0][0]
    ranks = mesh.size(place)
    if units % ranks:
        raise UnsupportedModelError(
            f"the {units} hidden units of {name!r} must divide evenly over the {ranks} tensor-parallel ranks: choose "
            "a number of ranks that divides them"
        )
    for linear, weight in zip(inner, weights, strict=False):
        part = local_part(weight)  # type: ignore[arg-type]
        with torch.no_grad():
            emitted = linear(torch.zeros(1, part.shape[1], dtype=part.dtype, device=part.device)).shape[-1]
        if emitted != part.shape[0]:
            raise UnsupportedModelError(
                f"each rank must keep its own hidden units from gate and up to down; {name!r} gathers all of them in "
                "between (as classes with one linear for gate and up do), so a rank has none to leave out: load this "
                "decoder without `tp_plan`"
            )
    return Shard(mesh.get_local_rank(place), ranks, units, mesh.get_group(place))


def _sharded_dims(weight: Any) -> list[tuple[int, int]]:
    """(dimension of the mesh, dimension of the weight) for each split of a weight into more than one part."""
    if not isinstance(weight, Tensor) or not is_sharded(weight):
        return []
    held: Any = weight
    return [
        (place, placement.dim % weight.dim())
        for place, placement in enumerate(held.placements)
        if placement.is_shard() and held.device_mesh.size(place) > 1
    ]
