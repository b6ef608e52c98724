"""The law on the device, for captured graphs: integer tensor operations, no host round trip, static shapes.

The compiled controller stays the authority. It puts its law and present thresholds into a *parameter block* of whole
numbers (`rust/sedac-core/src/parameter_block.rs` says what they mean, and how far the result may be from the float
law); `DeviceLaw` holds the block in static buffers and runs it. A risk is quantised once, by a multiplication with a
power of two and a floor; everything behind is exact, so eager mode, compiled graphs and the block's own oracle agree
bit for bit. New thresholds are copied into the same buffers between passes: a captured graph sees them, and nothing is
compiled again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sedac_hf.control.base import Controller
from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf._rust import ParameterBlock

# Of the block's format, as in parameter_block.rs.
RISK_BEYOND = 2**15 - 1
RISK_UNUSABLE = -1
STATE_FAILED = -(2**31)
STATE_SUNK = STATE_FAILED + 1
STATE_LATCHED = 2**31 - 1
_PRODUCT_BITS = 30
_THRESHOLD_BITS = 16
_SHARED_COLUMNS = 6  # in front of the cut points


class DeviceLaw(nn.Module):
    """A controller's law as tensor operations; everything that changes is in buffers, in place.

    One pass: ``state = begin(n)``; at each checkpoint in order ``risk_q = quantise(i, risk)`` and ``state, levels =
    step(i, state, risk_q)``. Any number of tokens; a token's decision depends on its own risks alone.

    Args:
        controller: the compiled engine's; thresholds stay in it.
        device: where risks will be.

    Raises:
        ConfigError: the controller is not the compiled engine's.
    """

    table: Tensor
    risk_scale: Tensor
    version: Tensor

    def __init__(self, controller: Controller, device: torch.device | str) -> None:
        super().__init__()
        if not hasattr(controller, "parameter_block"):
            raise ConfigError(
                f"the law on the device needs the compiled controller, got {type(controller).__name__}: build "
                "sedac_hf._rust (`pip install .`) and use controller='rust' or 'auto', or run eagerly"
            )
        self._controller = controller
        self.blocks: dict[int, ParameterBlock] = {}
        self.n_checkpoints = len(controller.layer_configs)
        self.n_levels = controller.n_levels
        self._uploaded: bytes = b""
        for name, shape, dtype in (
            ("table", (self.n_checkpoints, _SHARED_COLUMNS + self.n_levels), torch.int64),
            ("risk_scale", (self.n_checkpoints,), torch.float32),
            ("version", (1,), torch.int32),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.upload()

    def upload(self) -> int:
        """Bring the controller's present thresholds to the device, in place; call it between passes.

        Returns:
            Number of the block in force; it rises with each change of the thresholds. `blocks` keeps each one until
            `forget`, for the replay of what it decided.
        """
        newest = max(self.blocks, default=0)
        thresholds = self._controller.thresholds.tobytes()
        if thresholds == self._uploaded:
            return newest
        block: ParameterBlock = self._controller.parameter_block()
        self.table.copy_(torch.from_numpy(block.table))
        self.risk_scale.copy_(torch.from_numpy(block.risk_scale))
        self.version.fill_(newest + 1)
        self.blocks[newest + 1] = block
        self._uploaded = thresholds
        return newest + 1

    def forget(self, before: int) -> None:
        """Drop the blocks older than number ``before``: nothing that they decided is waiting for its replay."""
        self.blocks = {version: block for version, block in self.blocks.items() if version >= before}

    def begin(self, n_tokens: int) -> Tensor:
        """The state before the first checkpoint, int32 [n_tokens]."""
        return torch.zeros(n_tokens, dtype=torch.int32, device=self.table.device)

    def quantise(self, checkpoint_idx: int, risk: Tensor) -> Tensor:
        """Risk float32 [n] in steps of the checkpoint's scale: int32 [n], 0..`RISK_BEYOND`; not finite: -1."""
        usable = torch.isfinite(risk)
        # The product is exact but for overflow, which the clamp ends, and underflow, which the floor does.
        steps = (torch.where(usable, risk, 0.0) * self.risk_scale[checkpoint_idx]).floor().clamp(0, RISK_BEYOND)
        return torch.where(usable, steps.to(torch.int32), RISK_UNUSABLE)

    def step(self, checkpoint_idx: int, state: Tensor, risk_q: Tensor) -> tuple[Tensor, Tensor]:
        """One checkpoint.

        Args:
            checkpoint_idx: place in the cascade.
            state: int32 [n], from `begin` or the step before; not changed.
            risk_q: int32 [n], from `quantise` at this checkpoint.

        Returns:
            The next state int32 [n], and the levels int32 [n], 0..n_levels.
        """
        row = self.table[checkpoint_idx]
        threshold, factor, sinks_from, target, decay, latches = row[:_SHARED_COLUMNS].unbind()
        q, before = risk_q.to(torch.int64), state.to(torch.int64)
        distance = threshold - (q << _THRESHOLD_BITS)
        confidence = (before * decay + distance * factor) >> _PRODUCT_BITS
        sunk = (q >= sinks_from) | ((state == STATE_SUNK) & (decay > 0))
        confidence = torch.where(sunk, STATE_SUNK, confidence)

        failed = (q < 0) | (state == STATE_FAILED)
        exited = ~failed & ((confidence >= target) | (state == STATE_LATCHED))
        reached = (confidence.unsqueeze(-1) >= row[_SHARED_COLUMNS:]).sum(dim=-1)
        levels = torch.where(exited, self.n_levels - reached, self.n_levels)
        after = torch.where(exited & (latches != 0), STATE_LATCHED, confidence)
        return torch.where(failed, STATE_FAILED, after).to(torch.int32), levels.to(torch.int32)
