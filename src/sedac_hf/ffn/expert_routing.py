"""What the call of a module of experts asks of which expert: the ways in which classes are called.

Which of them a module has is tried on numbers, see `sedac_hf.ffn.finding_experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Routing(NamedTuple):
    """What a call asks of its experts.

    x: [m, d], the rows; expert: int64 [m, k], those of each, of `Experts.count` and above: none; weights: [m, k].
    copies: rows that each token has, a whole set of the tokens behind another, of which the caller makes the sum.
    added: [d], what the module adds to each output row; or None.
    """

    x: Tensor
    expert: Tensor
    weights: Tensor
    copies: int = 1
    added: Tensor | None = None


class Reading(Protocol):
    """How a module is called. ``rank``: dimensions of its first argument; its output has the shape of that."""

    takes: ClassVar[int]

    @property
    def rank(self) -> int: ...

    def arguments(self, count: int, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """The arguments of a call for tokens x [n, d], their experts [n, k] and weights [n, k], as far as it is the
        caller who says which experts these are."""

    def routing(self, module: nn.Module, count: int, *given: Tensor) -> Routing | None:
        """What a call with such arguments asks; None for one of another kind."""

    def tokens(self, count: int, x: Tensor) -> int:
        """How many tokens a call has, of which x is the first argument."""


@dataclass(frozen=True)
class Routed:
    """``(x [.., d], index [n, k], weights [n, k])``: transformers' experts interface."""

    rank: int = 2
    takes: ClassVar[int] = 3

    def arguments(self, count: int, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return _of_rank(x, self.rank), index, weights

    def routing(self, module: nn.Module, count: int, *given: Tensor) -> Routing | None:
        x, index, weights = given
        return Routing(x.reshape(-1, x.shape[-1]), index, weights)

    def tokens(self, count: int, x: Tensor) -> int:
        return x.shape[:-1].numel()


@dataclass(frozen=True)
class AllUsed(Routed):
    """``(x [.., d], weights [.., E])``: every token uses all of the experts."""

    takes: ClassVar[int] = 2

    def arguments(self, count: int, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return _of_rank(x, self.rank), _by_expert(count, index, weights)

    def routing(self, module: nn.Module, count: int, *given: Tensor) -> Routing | None:
        x, weights = given
        rows = x.reshape(-1, x.shape[-1])
        if weights.numel() != count * rows.shape[0]:
            return None
        index = torch.arange(count, device=x.device).expand(rows.shape[0], count)
        return Routing(rows, index, weights.reshape(-1, count))


@dataclass(frozen=True)
class Weighted:
    """``(x [E * n, d])``: all tokens for each expert in turn, weighted before they come in. Rows of zeros are of
    tokens that the expert is not for, and give zeros."""

    rank: int = 2
    takes: ClassVar[int] = 1

    def arguments(self, count: int, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return ((_by_expert(count, index, weights).T[:, :, None] * x).flatten(0, 1),)

    def routing(self, module: nn.Module, count: int, *given: Tensor) -> Routing | None:
        (x,) = given
        if x.shape[0] % count:
            return None
        index = torch.arange(count, device=x.device).repeat_interleave(x.shape[0] // count)
        index = torch.where(x.detach().any(dim=1), index, count)
        return Routing(x, index[:, None], x.new_ones(x.shape[0], 1), copies=count)

    def tokens(self, count: int, x: Tensor) -> int:
        return x.shape[0] // count


@dataclass(frozen=True)
class OwnRouter(Routed):
    """``(x [B, S, d])``: the module asks its own router, which gives (pairs of token and expert in the order of the
    experts, int64 [n * k], their tokens, their weights, how many each expert has, ..)."""

    rank: int = 3
    router: str = "router"
    takes: ClassVar[int] = 1

    def arguments(self, count: int, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return (_of_rank(x, self.rank),)

    def routing(self, module: nn.Module, count: int, *given: Tensor) -> Routing | None:
        rows = given[0].reshape(-1, given[0].shape[-1])
        order, _, weights, sizes, *_ = module.get_submodule(self.router)(rows)
        back = order.argsort()
        experts = torch.arange(count, device=order.device).repeat_interleave(torch.as_tensor(sizes).to(order.device))
        shape = (rows.shape[0], -1)
        return Routing(rows, experts[back].view(shape), weights[back].view(shape), added=getattr(module, "bias", None))


def _of_rank(x: Tensor, rank: int) -> Tensor:
    return x if rank == 2 else x[None]


def _by_expert(count: int, index: Tensor, weights: Tensor) -> Tensor:
    """The weights [n, k] as [n, E], of 0 for experts that a token does not use."""
    return weights.new_zeros(weights.shape[0], count).scatter(1, index, weights)
