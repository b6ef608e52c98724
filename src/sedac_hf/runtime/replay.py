"""Run decoder layers one at a time, each over all batches, so that a fit can go from layer to layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.runtime.forward_pass import ForwardPass, current_pass
from sedac_hf.runtime.hooks import Attachment
from sedac_hf.runtime.observation import hidden_of

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime

_Call = tuple[tuple[Any, ...], dict[str, Any]]
_HIDDEN = "hidden_states"
_RELATIVE_ERROR = 1e-3  # between a replayed and a plain forward, of the largest hidden value


class LayerReplay:
    """A decoder's layers, callable with the other arguments (masks, positions) that a plain forward gave them.

    Args:
        runtime: must be bare; ``batches``: keyword arguments of forward calls, which must not use a cache.

    Attributes:
        first: input of the first layer per batch, [B, S, d].

    Raises:
        UnsupportedModelError: layer by layer this decoder does not give what its forward gives.
    """

    def __init__(self, runtime: SedacRuntime, batches: Iterable[Mapping[str, Any]]) -> None:
        self._runtime = runtime
        self._calls: list[list[_Call]] = [[] for _ in runtime.decoder_layers]
        self.first: list[Tensor] = []
        last: list[Tensor | None] = []
        attachment = Attachment()
        try:
            for idx, layer in enumerate(runtime.decoder_layers):
                attachment.around_forward(layer, functools.partial(self._keep, idx), _nothing)
            attachment.after_forward(runtime.decoder_layers[-1], lambda module, args, out: last.append(hidden_of(out)))
            with torch.no_grad():
                for batch in batches:
                    runtime.model(**batch)
        finally:
            attachment.detach()
        if any(len(calls) != len(self.first) for calls in self._calls):
            raise UnsupportedModelError("each decoder layer must run once per forward, with a hidden state")
        hidden = self.first[:1]
        for idx in range(len(self._calls)):
            hidden = self.run(idx, hidden)
        plain = last[0] if last else None
        if plain is None or plain.shape != hidden[0].shape:
            raise UnsupportedModelError("the last decoder layer must give the hidden state")
        if float((hidden[0] - plain).abs().max()) > _RELATIVE_ERROR * float(plain.abs().max()):
            raise UnsupportedModelError("the decoder layers do not pass on the hidden state alone")

    def run(self, layer_idx: int, hidden: list[Tensor]) -> list[Tensor]:
        """A layer's output for each batch's hidden state; the FFN is cut as the runtime stands."""
        return [self.run_batch(layer_idx, n, x) for n, x in enumerate(hidden)]

    def run_batch(self, layer_idx: int, batch: int, hidden: Tensor) -> Tensor:
        """The same for one batch: [B, S, d] to [B, S, d]."""
        args, kwargs = self._calls[layer_idx][batch]
        token = current_pass.set(ForwardPass(self._runtime, hidden.shape[0] * hidden.shape[1]))
        try:
            with torch.no_grad():
                output = hidden_of(self._runtime.decoder_layers[layer_idx](hidden, *args, **kwargs))
        finally:
            current_pass.reset(token)
        if output is None or output.shape != hidden.shape:
            raise UnsupportedModelError(f"decoder layer {layer_idx} must give a hidden state like its input")
        return output

    def _keep(self, idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        others = dict(kwargs)
        hidden = others.pop(_HIDDEN) if _HIDDEN in others else (args[0] if args else None)
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            self._calls[idx].append((args if _HIDDEN in kwargs else args[1:], others))
            if idx == 0:
                self.first.append(hidden.detach())


def _nothing(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Nothing is wanted after the forward."""
