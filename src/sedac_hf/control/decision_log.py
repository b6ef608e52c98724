"""What a captured graph decided, in a ring on the device, brought to the host without waiting for it.

The graph writes quantised risks and levels into static buffers, one column per token, at places that a cursor on the
device gives; a token's column is whole when its last checkpoint is written, and only then does the cursor move. The
host copies the ring at times of its own choosing. Copies are queued on the stream that the graphs run on, so that no
column is read while it is written; whoever collects looks at a copy that has arrived and never waits for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sedac_hf.errors import ConfigError

DEFAULT_CAPACITY = 4096


class LoggedPasses(NamedTuple):
    """Tokens that one parameter block decided, in the order they ran.

    version: number of the block; risk_q: int16 [n_checkpoints, n]; levels: uint8 [n_checkpoints, n].
    """

    version: int
    risk_q: NDArray[np.int16]
    levels: NDArray[np.uint8]


class DecisionLog(nn.Module):
    """The ring.

    Args:
        n_checkpoints: of the cascade.
        device: where the graphs run.
        capacity: tokens that the ring holds, a power of two; older ones are overwritten, and counted as dropped if
            nobody had collected them.

    Attributes:
        dropped: tokens that were overwritten before they were collected.
    """

    risk_q: Tensor
    levels: Tensor
    versions: Tensor
    cursor: Tensor

    def __init__(self, n_checkpoints: int, device: torch.device | str, capacity: int = DEFAULT_CAPACITY) -> None:
        super().__init__()
        if capacity < 1 or capacity & (capacity - 1):
            raise ConfigError(f"`capacity` must be a power of two, got {capacity}")
        self.n_checkpoints = n_checkpoints
        self.capacity = capacity
        self.dropped = 0
        self._collected = 0
        self._arriving: tuple[dict[str, Tensor], torch.cuda.Event | None] | None = None
        for name, shape, dtype in (
            ("risk_q", (n_checkpoints, capacity), torch.int16),
            ("levels", (n_checkpoints, capacity), torch.uint8),
            ("versions", (capacity,), torch.int32),
            ("cursor", (1,), torch.int64),
        ):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def write(self, checkpoint_idx: int, risk_q: Tensor, levels: Tensor, version: Tensor) -> None:
        """Log one checkpoint of a pass, inside the graph. The last checkpoint completes the pass.

        Args:
            risk_q, levels: int32 [n]; of more tokens than the ring holds, the last ones stay.
            version: int32 [1], number of the block that decided.
        """
        n = risk_q.shape[0]
        kept = min(n, self.capacity)
        slots = (self.cursor + torch.arange(n - kept, n, device=risk_q.device)) & (self.capacity - 1)
        self.risk_q[checkpoint_idx].index_copy_(0, slots, risk_q[n - kept :].to(torch.int16))
        self.levels[checkpoint_idx].index_copy_(0, slots, levels[n - kept :].to(torch.uint8))
        if checkpoint_idx == self.n_checkpoints - 1:
            self.versions.index_copy_(0, slots, version.expand(kept))
            self.cursor.add_(n)

    def collect(self) -> list[LoggedPasses]:
        """What has arrived of the copy asked for before; then ask for the next one. Waits for nothing."""
        arrived = self._take(wait=False)
        if self._arriving is None:
            self._ask()
        return arrived

    def flush(self) -> list[LoggedPasses]:
        """Everything up to this moment; waits for the device."""
        arrived = self._take(wait=True)
        self._ask()
        return arrived + self._take(wait=True)

    def _ask(self) -> None:
        names = ("risk_q", "levels", "versions", "cursor")
        on_cuda = self.cursor.device.type == "cuda"
        copies = {}
        for name in names:
            source: Tensor = getattr(self, name)
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=on_cuda)
            copies[name] = copy.copy_(source, non_blocking=on_cuda)
        event = None
        if on_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.cursor.device))
        self._arriving = copies, event

    def _take(self, *, wait: bool) -> list[LoggedPasses]:
        if self._arriving is None:
            return []
        copies, event = self._arriving
        if event is not None:
            if wait:
                event.synchronize()
            elif not event.query():
                return []
        self._arriving = None
        written = int(copies["cursor"])
        first = max(self._collected, written - self.capacity)
        self.dropped += first - self._collected
        self._collected = written
        slots = np.arange(first, written) & (self.capacity - 1)
        return list(_by_version(*(copies[name].numpy()[..., slots] for name in ("versions", "risk_q", "levels"))))


def _by_version(
    versions: NDArray[np.int32], risk_q: NDArray[np.int16], levels: NDArray[np.uint8]
) -> Iterator[LoggedPasses]:
    """Runs of columns that one block decided; versions never fall."""
    ends = [*np.flatnonzero(np.diff(versions)) + 1, versions.size] if versions.size else []
    start = 0
    for end in ends:
        part = slice(start, end)
        yield LoggedPasses(
            int(versions[start]), np.ascontiguousarray(risk_q[:, part]), np.ascontiguousarray(levels[:, part])
        )
        start = end
