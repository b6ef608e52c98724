"""Cuts for tests: level plans, weights and a masking reference in float64 that shares no code with the engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sedac_hf.ops import FFNWeights, LevelPlan, OperatingPoint, SiteCut

N_LEVELS = 8


def level_plan(levels: Sequence[int], n_levels: int = N_LEVELS) -> LevelPlan:
    array = np.asarray(levels, dtype=np.uint8)
    order = np.argsort(-array.astype(np.int64), kind="stable").astype(np.int64)
    at_least = np.array([(array >= level).sum() for level in range(n_levels + 1)], dtype=np.int64)
    return LevelPlan(array, order, at_least)


class Recorder:
    """Collects what engines report."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **what: Any) -> None:
        self.calls.append({key: int(value) if isinstance(value, Tensor) else value for key, value in what.items()})


class TableCompensation:
    """A bias per level and a low-rank pair for some levels."""

    def __init__(self, table: Tensor | None, pairs: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.table = table
        self.pairs = pairs or {}

    def bias(self, like: Tensor) -> Tensor | None:
        return None if self.table is None else self.table.to(like.device, like.dtype)

    def low_rank(self, level: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        pair = self.pairs.get(level)
        return None if pair is None else (pair[0].to(like.dtype), pair[1].to(like.dtype))


def even_points(f: int, importance_min: float = 0.0, n_levels: int = N_LEVELS) -> tuple[OperatingPoint, ...]:
    """Widths f * l / n_levels, or all units and a minimum that falls with the level."""
    if importance_min == 0:
        return tuple(OperatingPoint(f * level // n_levels) for level in range(n_levels + 1))
    steps = (importance_min * (n_levels - level) / n_levels for level in range(n_levels + 1))
    return tuple(OperatingPoint(f, step) for step in steps)


def site_cut(
    levels: Sequence[int],
    points: tuple[OperatingPoint, ...],
    *,
    importance: Callable[[Tensor], Tensor] | None = None,
    compensation: TableCompensation | None = None,
    engine: str = "auto",
    record: Recorder | None = None,
) -> SiteCut:
    plan = level_plan(levels, len(points) - 1)
    return SiteCut(points, plan, importance, compensation, engine, record or Recorder())


def random_weights(
    d: int, f: int, *, gated: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> FFNWeights:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    biases = [draw(size) * 3 if bias else None for size in (f, f, d)]
    activation = functional.silu if gated else functional.gelu
    gate = draw(f, d) if gated else None
    return FFNWeights(gate, draw(f, d), draw(d, f), biases[0] if gated else None, biases[1], biases[2], activation)


def masked(
    x: Tensor,
    weights: FFNWeights,
    cut: SiteCut,
    dtype: torch.dtype = torch.float64,
    columns: Tensor | None = None,
) -> Tensor:
    """The definition, token by token in the naive way, at ``dtype``; inputs are summed in the order ``columns``."""

    def at(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    gate, up = at(weights.gate), weights.up.to(dtype)
    if columns is not None:
        gate, up = None if gate is None else gate[:, columns], up[:, columns]
    w = FFNWeights(
        gate, up, weights.down.to(dtype), at(weights.gate_bias), at(weights.up_bias), at(weights.down_bias),
        weights.activation,
    )  # fmt: skip
    importance = None if cut.importance is None else cut.importance(x)
    rows = []
    for token, level in enumerate(cut.plan.levels.tolist()):
        point = cut.points[level]
        row = x[token : token + 1].to(dtype)
        h = w.hidden(row if columns is None else row[:, columns])
        keep = torch.arange(h.shape[1])[None] < (point.width if level else 0)
        if importance is not None and point.importance_min > 0:
            keep = keep & (importance[token : token + 1] >= torch.tensor(point.importance_min))
        h = h.masked_fill(~keep, 0)
        y = functional.linear(h, w.down, w.down_bias)
        if cut.compensation is not None and level < len(cut.points) - 1:
            table = cut.compensation.bias(y)
            y = y if table is None else y + table[level]
            pair = cut.compensation.low_rank(level, y)
            y = y if pair is None else y + h[:, : pair[1].shape[1]] @ pair[1].T @ pair[0].T
        rows.append(y)
    return torch.cat(rows) if rows else torch.zeros(0, w.down.shape[0], dtype=dtype)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    size, error = float(wanted.norm()), float((got - wanted).norm())
    return error / size if size > 0 else error


def assert_as_good_as_plain(got: Tensor, x: Tensor, weights: FFNWeights, cut: SiteCut) -> None:
    """Error against float64 at most twice that of masking in the same precision, beside what the roundings of three
    steps (sums, activation, sums) explain alone: with one unit in use masking may be exact by luck.

    Masking sums in several orders: where products cancel, one order alone may be right by luck.
    """
    assert got.dtype == x.dtype
    assert got.shape == (x.shape[0], weights.down.shape[0])
    exact = masked(x, weights, cut)
    generator = torch.Generator().manual_seed(0)
    orders = [None, *(torch.randperm(x.shape[1], generator=generator) for _ in range(16))]
    plain = max(relative_error(masked(x, weights, cut, x.dtype, order), exact) for order in orders)
    assert relative_error(got, exact) <= 2 * plain + 3 * torch.finfo(x.dtype).eps


@contextmanager
def installed(pairs: list[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace forwards, and put back what was there."""
    kept = [(module, module.__dict__.get("forward")) for module, _ in pairs]
    for module, forward in pairs:
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in reversed(kept):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
