"""Show what flows by inside a model, for calibration, tests and pictures; nothing is changed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sedac_hf.ffn.experts import Experts
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.experts import grouped
from sedac_hf.runtime.forward_pass import call_shape
from sedac_hf.runtime.hooks import Attachment

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

OnCheckpoint = Callable[[int, Tensor], None]
"""Called with (checkpoint_idx, hidden [n, d]), where layers run in a loop each time."""
OnFFN = Callable[[int, Tensor, Tensor], None]
"""Called with (site, x [n, d], h [n, f]): an FFN's input, and what its down projection would be given at full width,
in the current channel order. Experts are shown by `OnExpert` instead."""
OnExpert = Callable[[int, int, Tensor, Tensor, Tensor], None]
"""Called with (site, expert, x [m, d], h [m, f], weights [m]) for each expert that some row uses: its rows' inputs,
hidden values at full width in the current channel order, and the router's weights."""
OnDecision = Callable[[int, np.ndarray, np.ndarray], None]
"""Called with (checkpoint_idx, ratio float32 [n], levels uint8 [n]); prompt tokens at full width have ratio 0."""


@contextmanager
def observing(
    runtime: SedacRuntime,
    on_checkpoint: OnCheckpoint | None,
    on_ffn: OnFFN | None,
    on_decision: OnDecision | None,
    on_expert: OnExpert | None = None,
) -> Iterator[None]:
    """Call these during the forwards of a ``with`` block."""
    attachment = Attachment()
    before, runtime.on_decision = runtime.on_decision, on_decision or runtime.on_decision
    try:
        if on_checkpoint is not None:
            call: list[tuple[int, int] | None] = [None]
            attachment.around_forward(runtime.model, functools.partial(_keep_shape, call), _nothing)
            for idx, layer in enumerate(runtime.checkpoint_layers):
                attachment.after_forward(
                    runtime.decoder_layers[layer],
                    functools.partial(_show_checkpoint, on_checkpoint, idx, runtime.hidden_size, call),
                )
        if on_ffn is not None:
            for i, site in enumerate(runtime.sites):
                if site.experts is None:
                    _watch(attachment, on_ffn, i, site)
        if on_expert is not None:
            for i, site in enumerate(runtime.sites):
                if site.experts is not None:
                    show = functools.partial(_show_experts, on_expert, i, site.experts)
                    attachment.around_forward(site.owner, show, _nothing)
        yield
    finally:
        attachment.detach()
        runtime.on_decision = before


@contextmanager
def counting_layers(runtime: SedacRuntime) -> Iterator[list[int]]:
    """How often each decoder layer runs during a ``with`` block, [n_layers]: not every layer runs once per forward."""
    runs, attachment = [0] * len(runtime.decoder_layers), Attachment()
    try:
        for idx, layer in enumerate(runtime.decoder_layers):
            attachment.after_forward(layer, functools.partial(_count, runs, idx))
        yield runs
    finally:
        attachment.detach()


def token_rows(output: Any, hidden_size: int, shape: tuple[int, int] | None) -> Tensor | None:
    """The hidden state of each token, [n, d], in a decoder layer's output; None where it cannot be told.

    Several residual streams, [m, B, S, d], [B, S, m, d] or [B, S, m * d], are averaged. Where B = S = m nothing tells
    the first two from each other.

    Args:
        shape: (B, S) of the model's call, where it is known.
    """
    hidden = hidden_of(output)
    if hidden is None or not hidden.shape[-1] or hidden.shape[-1] % hidden_size:
        return None
    if hidden.dim() < 4 and hidden.shape[-1] == hidden_size:
        return hidden.reshape(-1, hidden_size)
    if hidden.dim() < 4:
        return hidden.reshape(-1, hidden.shape[-1] // hidden_size, hidden_size).mean(1)
    if hidden.dim() > 4 or hidden.shape[-1] != hidden_size or shape is None:
        return None
    first, last = tuple(hidden.shape[1:3]) == shape, tuple(hidden.shape[:2]) == shape
    if hidden.numel() == shape[0] * shape[1] * hidden_size and (first or last):  # a single stream
        return hidden.reshape(-1, hidden_size)
    return None if first == last else hidden.mean(0 if first else 2).reshape(-1, hidden_size)


def hidden_of(output: Any) -> Tensor | None:
    """The hidden state in a decoder layer's output; None where it cannot be told."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.dim() >= 2 else None


def _watch(attachment: Attachment, show: OnFFN, i: int, site: FFNSite) -> None:
    if site.plain_forward:
        attachment.before_forward(site.owner, functools.partial(_show_plain, show, i, site))
        return
    seen: list[Tensor] = []
    first = site.up if site.gate is None else site.gate
    attachment.before_forward(first, functools.partial(_keep_input, seen))
    attachment.before_forward(site.down, functools.partial(_show_pair, show, i, seen))


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _count(runs: list[int], idx: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    runs[idx] += 1


def _keep_shape(
    call: list[tuple[int, int] | None], module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    call[0] = call_shape(args, dict(kwargs))


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Nothing is wanted after the forward."""


def _show_checkpoint(
    show: OnCheckpoint,
    idx: int,
    hidden_size: int,
    call: list[tuple[int, int] | None],
    module: nn.Module,
    args: tuple[Any, ...],
    output: Any,
) -> None:
    hidden = token_rows(output, hidden_size, call[0])
    if hidden is not None:
        show(idx, hidden.detach())


def _show_experts(
    show: OnExpert,
    i: int,
    experts: Experts,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    given = experts.given(args, kwargs)
    with torch.no_grad():
        routing = None if given is None else experts.routing(given)
        if routing is None:
            return
        x, index, weights = (part.detach() for part in routing[:3])
        for group in grouped(index, experts.count)[1]:
            rows = x[group.rows]
            show(i, group.expert, rows, experts.hidden(group.expert, rows), weights.reshape(-1)[group.pairs])


def _show_plain(show: OnFFN, i: int, site: FFNSite, module: nn.Module, args: tuple[Any, ...]) -> None:
    x = _rows(args[0])
    show(i, x, site.weights().hidden(x))


def _keep_input(seen: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    seen[:] = [_rows(args[0])]


def _show_pair(show: OnFFN, i: int, seen: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    if seen:
        show(i, seen.pop(), _rows(args[0]))
