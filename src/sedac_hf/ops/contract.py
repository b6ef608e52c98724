"""What a cut FFN is given and what it must give back: the contract of every engine in this folder.

Shapes: n = tokens of the call (batch x sequence, flattened in order), d = hidden size, f = intermediate size (units).
A level l counts keep levels, 0..n_levels; level n_levels is the whole FFN, level 0 is down's bias alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.strips.plan import PlannerClass


class OperatingPoint(NamedTuple):
    """What a level means in one FFN.

    ``width`` units of the channel order exist for the token; of those it uses the ones whose importance is at
    least ``importance_min`` (0.0: all of them).
    """

    width: int
    importance_min: float = 0.0


def is_ordinary(weight: Tensor) -> bool:
    """Whether a weight is a tensor and no subclass with a life of its own."""
    return type(weight) in (Tensor, torch.nn.Parameter) and type(weight.data) is Tensor


def dense(weight: Tensor) -> Tensor:
    """A weight as an ordinary floating tensor; a copy where it is kept in another form, so ask for a part of it."""
    return weight if is_ordinary(weight) else weight.dequantize()


@dataclass(frozen=True)
class FFNWeights:
    """Views of one FFN's live weights, all in ``nn.Linear`` layout; nothing is copied. See ``ordinary``.

    gate, up: [f, d] (gate is None for a plain MLP); down: [d, f]; biases [f], [f], [d] or None.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]

    @property
    def hidden_size(self) -> int:
        return self.up.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.up.shape[0]

    @property
    def matrices(self) -> int:
        """3 with a gate, 2 without."""
        return 2 if self.gate is None else 3

    @property
    def ordinary(self) -> bool:
        """Whether all weights are ordinary tensors, whose memory a kernel may read and index.

        Others (quantised) take slices and `torch.nn.functional.linear`, nothing else.
        """
        return all(is_ordinary(weight) for weight in (self.gate, self.up, self.down) if weight is not None)

    @property
    def learns(self) -> bool:
        """Whether some weight wants a gradient; views made without gradients do not say so themselves."""
        parts = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return any(
            part.requires_grad or (part._base is not None and part._base.requires_grad)
            for part in parts
            if part is not None
        )

    def hidden(self, x: Tensor, lo: int = 0, hi: int | None = None) -> Tensor:
        """Hidden units lo..hi for x [n, d] -> [n, hi - lo]: ``act(gate x) * up x``, or ``act(up x)``."""
        hi = self.intermediate_size if hi is None else hi
        rows = slice(lo, hi)
        up = torch.nn.functional.linear(x, self.up[rows], None if self.up_bias is None else self.up_bias[rows])
        if self.gate is None:
            return self.activation(up)
        gate = torch.nn.functional.linear(x, self.gate[rows], None if self.gate_bias is None else self.gate_bias[rows])
        return self.activation(gate) * up


class ShadowTables(NamedTuple):
    """A 4-bit shadow as kernels read it: codes and scales of a `sedac_hf.ops.low_bit.LowBitMatrix`, interleaved for
    the CPU kernels, row by row for the Triton kernels.

    bias: float32 [f] or None; unit_norm: float32 [f]. All contiguous, on the weights' device.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    unit_norm: Tensor


class DecodeKernel(Protocol):
    """One FFN's compiled kernel for a few rows: `sedac_hf.ops.rust_cpu.CpuFFN` on a CPU,
    `sedac_hf.ops.triton.engine.TritonFFN` on CUDA.

    engine: name in dispatch.py of the engine that runs it; selects: it can choose units by importance; truncates: it
    is the way to run a call in which no token chooses.
    """

    engine: str
    selects: bool
    truncates: bool
    weights: FFNWeights

    def accepts(self, x: Tensor, *, in_turns: bool = False) -> bool:
        """Whether it can run this input; in_turns: more rows than it takes at once may take turns."""


class Compensation(Protocol):
    """What stands in for the units that a level leaves out; the whole FFN (level n_levels) is never compensated."""

    def bias(self, like: Tensor) -> Tensor | None:
        """[n_levels + 1, d] on ``like``'s device and dtype, added to the output by level; None: nothing to add."""

    def parameters(self, level: int) -> int:
        """How many parameters a token at this level uses, for counting cost."""

    def low_rank(self, level: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(U [d, r], V [r, width]) of a level: the output gains ``U @ (V @ h)``, h being the units used; or None."""


class Record(Protocol):
    """Told once per FFN call what it needed and what it spent."""

    def __call__(
        self,
        *,
        engine: str,
        tokens: int,
        needed: int | Tensor,
        read: int,
        computed: int,
        whole_read: int | None = None,
    ) -> None:
        """needed: units used, summed over tokens; read: units whose weights were read; computed: unit x token products
        that were spent; whole_read: units that the FFN would have read at full width, None: all that it has. A 0-d
        tensor is allowed where a number would cost a device round trip."""


@dataclass(frozen=True)
class SiteCut:
    """One FFN's part in one forward call: levels, what they mean here, and how to run them.

    points: one operating point per level, 0..n_levels; importance: x [n, d] -> float32 [n, f], needed where a point
    has importance_min > 0 (of experts: see `sedac_hf.ops.experts.cut_experts`); engine: "auto" or a name in
    dispatch.py; kernel: the FFN's compiled kernel, if it has one and may use it; strip_planner: what cuts a batch of
    mixed widths, None: the planner in Python.
    """

    points: tuple[OperatingPoint, ...]
    plan: LevelPlan
    importance: Callable[..., Tensor] | None
    compensation: Compensation | None
    engine: str
    record: Record
    kernel: DecodeKernel | None = None
    strip_planner: PlannerClass | None = None

    # What follows is worked out once where a cut is used again from step to step.

    @cached_property
    def chooses(self) -> bool:
        """Whether some token of this call picks its units by importance."""
        per_level = np.diff(self.plan.at_least[::-1], prepend=0)[::-1].tolist()
        return any(n and level and self.points[level].importance_min > 0 for level, n in enumerate(per_level))

    @cached_property
    def kernel_alone(self) -> bool:
        """Whether the compiled kernel gives the whole result."""
        return (
            self.kernel is not None
            and self.engine in ("auto", self.kernel.engine)
            and self.compensation is None
            and (self.kernel.selects if self.chooses else self.kernel.truncates)
        )

    @cached_property
    def token_points(self) -> list[OperatingPoint]:
        """The operating point of each token, widths from 0 up; level 0 uses nothing."""
        nothing = OperatingPoint(0)
        points = [nothing, *(OperatingPoint(max(point.width, 0), point.importance_min) for point in self.points[1:])]
        return [points[level] for level in self.plan.levels.tolist()]

    @cached_property
    def _device_points(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def points_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`token_points` on a device, copied once: widths int32 [n], importance minima float32 [n]."""
        if device not in self._device_points:
            widths = torch.tensor([point.width for point in self.token_points], dtype=torch.int32, device=device)
            least = [point.importance_min for point in self.token_points]
            self._device_points[device] = widths, torch.tensor(least, dtype=torch.float32, device=device)
        return self._device_points[device]
