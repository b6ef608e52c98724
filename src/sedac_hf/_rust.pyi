"""The compiled core; use it through `sedac_hf.control` and `sedac_hf.ops`, which hold the contracts."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_ROWS",
    "CascadeController",
    "FfnKernel",
    "ForwardPass",
    "LinearKernel",
    "ParameterBlock",
    "ProbeKernel",
    "StripPlanner",
    "instruction_sets",
    "product",
    "read_memory",
    "read_rows",
    "set_openmp",
]

MAX_ROWS: int

@final
class CascadeController:
    def __new__(
        cls,
        layers: list[tuple[int, float, float, float]],
        alpha: float,
        confidence_decay: float,
        soft_exit: bool,
        n_levels: int,
    ) -> CascadeController: ...
    @property
    def thresholds(self) -> NDArray[np.float32]: ...
    @property
    def cut_points(self) -> NDArray[np.float32]: ...
    def begin(self, n_tokens: int) -> ForwardPass: ...
    def owns(self, state: ForwardPass) -> bool: ...
    def step(self, state: ForwardPass, checkpoint_idx: int, risk: NDArray[np.float32]) -> NDArray[np.uint8]: ...
    def evaluate_batch(
        self, risk: NDArray[np.float32]
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8]]: ...
    def update_threshold(self, checkpoint_idx: int, samples: NDArray[np.float32], quantile: float) -> float: ...
    def set_thresholds(self, values: NDArray[np.float32]) -> None: ...
    def parameter_block(self) -> ParameterBlock: ...
    def plan(self, levels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...

@final
class ForwardPass:
    @property
    def n_tokens(self) -> int: ...
    @property
    def next_checkpoint(self) -> int: ...
    @property
    def confidence(self) -> NDArray[np.float32]: ...
    @property
    def exit_layer(self) -> NDArray[np.int64]: ...
    @property
    def ratio(self) -> NDArray[np.float32]: ...
    @property
    def exited(self) -> NDArray[np.bool_]: ...
    @property
    def failed(self) -> NDArray[np.bool_]: ...

@final
class ParameterBlock:
    @property
    def table(self) -> NDArray[np.int64]: ...
    @property
    def risk_scale(self) -> NDArray[np.float32]: ...
    @property
    def unit(self) -> float: ...
    @property
    def distance(self) -> NDArray[np.float64]: ...
    def quantise(self, checkpoint_idx: int, risk: NDArray[np.float32]) -> NDArray[np.int16]: ...
    def dequantise(self, checkpoint_idx: int, risk_q: NDArray[np.int16]) -> NDArray[np.float32]: ...
    def step(
        self, checkpoint_idx: int, states: NDArray[np.int32], risk_q: NDArray[np.int16]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8]]: ...
    def replay(
        self, risk_q: NDArray[np.int16], levels: NDArray[np.uint8]
    ) -> tuple[int, NDArray[np.bool_], NDArray[np.float32]]: ...

def instruction_sets() -> list[str]: ...
def set_openmp(address: int) -> None: ...
def product(
    matrix: tuple[int, int, int, int],
    bias: int,
    x: int,
    y: int,
    rows: int,
    threads: int,
    isa_name: str | None = None,
) -> None: ...
def read_memory(address: int, bytes: int, threads: int) -> float: ...
def read_rows(matrices: list[tuple[int, int, int, int]], rows: int, n_rows: int, threads: int) -> float: ...

@final
class FfnKernel:
    def __new__(
        cls,
        dtype: str,
        activation: str,
        gate: tuple[int, int, int, int] | None,
        up: tuple[int, int, int, int],
        down: tuple[int, int, int, int],
        down_by_columns: bool,
        biases: tuple[int, int, int],
        shadow: tuple[int, ...] | None,
        isa_name: str | None = None,
    ) -> FfnKernel: ...
    def run(
        self, x: int, y: int, points: Sequence[tuple[int, float]], threads: int, hidden: int = 0
    ) -> tuple[int, int]: ...

@final
class LinearKernel:
    def __new__(
        cls, dtype: str, weight: tuple[int, int, int, int], bias: int, isa_name: str | None = None
    ) -> LinearKernel: ...
    def run(self, x: int, y: int, rows: int, threads: int) -> None: ...

@final
class ProbeKernel:
    def __new__(
        cls, dtype: str, norm: tuple[int, int, float], down: tuple[int, int, int, int], rest: tuple[int, int, int]
    ) -> ProbeKernel: ...
    def run(self, x: int, rows: int) -> NDArray[np.float32]: ...

@final
class StripPlanner:
    def __new__(
        cls,
        tokens: NDArray[np.float64],
        units: NDArray[np.float64],
        prior: NDArray[np.float64],
        measured: NDArray[np.float64] | None = None,
    ) -> StripPlanner: ...
    def seconds(self, tokens: int, units: int) -> float: ...
    def strips(self, ends: list[tuple[int, int]]) -> list[tuple[int, int, int, int]]: ...
    def groups(self, ends: list[tuple[int, int]]) -> list[tuple[int, int, int]]: ...
