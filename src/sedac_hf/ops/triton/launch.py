"""Launch shapes of the Triton kernels: a static choice from the call's shapes, in this one place.

Nothing is tuned at run time: inside the capture of a CUDA graph nothing may be, and a choice that changed between two
runs would change the last bits. Every entry is UNMEASURED: chosen by arithmetic (bytes in flight, blocks per
multiprocessor, at most 99 KiB of shared memory, which every GPU since 2020 has) and by what the compiler makes of it
for sm_90. `benchmarks/gpu_ffn.py` is there to replace them by measured ones.
"""

from __future__ import annotations

from typing import NamedTuple

MOST_SELECTING_ROWS = 4
"""Above it the union of what the rows choose is most of the units, and choosing saves nothing."""

_WANTED_WARPS = 2048
"""Warps of the down projection that keep a GPU of some 130 multiprocessors busy, shared memory allowing."""
_MOST_SPLITS = 16


class Launch(NamedTuple):
    """Tile sizes (powers of two) and what each kernel runs with.

    tokens: of a tile, the same in both kernels; units, inputs: tile of gate and up, and its step along the hidden
    size; outputs, down_units: tile of down, and its step along the units; splits: programs that share one tile of
    down, each taking every splits-th step; warps and stages (software pipelining) of the two kernels.
    """

    tokens: int
    units: int
    inputs: int
    outputs: int
    down_units: int
    splits: int
    hidden_warps: int
    hidden_stages: int
    down_warps: int
    down_stages: int


def options(warps: int, stages: int) -> dict[str, int | bool]:
    """Compiler options of a launch. Fused multiply-adds are asked for by name: Triton's default changes."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


# (most tokens of the call, launch for 2-byte weights); splits are filled in by shape.
_TRUNCATE: tuple[tuple[int | None, Launch], ...] = (
    (16, Launch(16, 32, 128, 64, 64, 0, 4, 4, 4, 4)),  # unmeasured
    (32, Launch(32, 32, 128, 64, 64, 0, 4, 4, 4, 4)),  # unmeasured
    (64, Launch(64, 64, 64, 64, 64, 0, 4, 3, 4, 4)),  # unmeasured
    (None, Launch(128, 64, 64, 128, 64, 0, 8, 3, 8, 3)),  # unmeasured
)
# Few units to a program: what they choose differs, and many small programs even that out.
_SELECT = Launch(16, 16, 128, 128, 32, 0, 4, 3, 4, 3)  # unmeasured


def truncate_launch(tokens: int, outputs: int, intermediate_size: int, element_size: int) -> Launch:
    """For ``tokens`` rows that are cut by width alone; element_size: bytes of a weight."""
    launch = next(entry for most, entry in _TRUNCATE if most is None or tokens <= most)
    return _fitted(launch, tokens, outputs, intermediate_size, element_size)


def select_launch(tokens: int, outputs: int, intermediate_size: int, element_size: int) -> Launch:
    """For up to `MOST_SELECTING_ROWS` rows that choose their units."""
    return _fitted(_SELECT, tokens, outputs, intermediate_size, element_size)


def _fitted(launch: Launch, tokens: int, outputs: int, intermediate_size: int, element_size: int) -> Launch:
    if element_size == 4:  # the same bytes of shared memory, and sums in no more registers than there are
        launch = launch._replace(
            inputs=launch.inputs // 2, down_units=launch.down_units // 2, outputs=min(launch.outputs, 64)
        )
    tiles = _tiles(outputs, launch.outputs) * _tiles(tokens, launch.tokens)
    most = min(_MOST_SPLITS, _tiles(intermediate_size, launch.down_units))
    splits = 1
    while splits * 2 <= most and splits * tiles * launch.down_warps < _WANTED_WARPS:
        splits *= 2
    return launch._replace(splits=splits)


def _tiles(size: int, tile: int) -> int:
    return max(1, -(-size // tile))
