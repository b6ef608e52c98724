"""Cut by width in Triton: each token's unit count is read from the device's memory.

    h[t, j] = act(gate_j . x[t]) * up_j . x[t]   for j < width[t], else 0        (plain MLP: act(up_j . x[t]))
    y[t]    = down h[t] + down_bias

The grid depends on shapes alone, so the launches can be captured in a CUDA graph and replayed with other counts: a
program whose units no token of its tile has ends at once. Rows of the weights beyond the widest token are not read.
Within one `Launch` a token's bits depend on its own x and width alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sedac_hf.ops.contract import FFNWeights
from sedac_hf.ops.triton.down import covered_units, project_down
from sedac_hf.ops.triton.launch import Launch, options, truncate_launch
from sedac_hf.ops.triton.tiles import NUMBER_OF_TOKENS, hidden_tile, tile_widths


@triton.jit(do_not_specialize=NUMBER_OF_TOKENS)
def truncated_hidden(
    X, GATE, UP, GATE_BIAS, UP_BIAS, WIDTHS, H, n, d, f,
    x_token, gate_unit, gate_input, up_unit, up_input, h_token,
    ACTIVATION: tl.constexpr, UNITS_ADJACENT: tl.constexpr, TOKENS: tl.constexpr, UNITS: tl.constexpr,
    INPUTS: tl.constexpr, DOWN_UNITS: tl.constexpr,
):  # fmt: skip
    """Program (token tile, unit tile). Writes h up to the end of the last step that `down_tiles` reads."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * UNITS
    widths = tile_widths(WIDTHS, token, n, f)
    if first < covered_units(widths, DOWN_UNITS):
        unit = first + tl.arange(0, UNITS)
        used = unit[:, None] < widths[None, :]
        # Along adjacent elements a bound that is no multiple of 16 would forbid 16-byte loads.
        read = unit < (f if UNITS_ADJACENT else tl.max(widths, 0))
        hidden_tile(
            X, GATE, UP, GATE_BIAS, UP_BIAS, H, used, read, unit, token, n, d, f,
            x_token, gate_unit, gate_input, up_unit, up_input, h_token, ACTIVATION, INPUTS,
        )  # fmt: skip


def truncated(x: Tensor, widths: Tensor, weights: FFNWeights, activation: str, launch: Launch | None = None) -> Tensor:
    """x [n, d] -> [n, outputs] in x's dtype; widths int32 [n] on x's device; ``activation`` names the weights' one."""
    n, d = x.shape
    f = weights.intermediate_size
    launch = launch or truncate_launch(n, weights.down.shape[0], f, x.element_size())
    x = x if x.stride(1) == 1 else x.contiguous()
    up, gate = weights.up, weights.gate
    gate_strides = (0, 0) if gate is None else gate.stride()
    with torch.cuda.device_of(x):
        h = x.new_empty(n, f)
        truncated_hidden[(triton.cdiv(n, launch.tokens), triton.cdiv(f, launch.units))](
            x, gate, up, weights.gate_bias, weights.up_bias, widths, h, n, d, f,
            x.stride(0), *gate_strides, *up.stride(), h.stride(0),
            ACTIVATION=activation, UNITS_ADJACENT=up.stride(1) != 1, TOKENS=launch.tokens, UNITS=launch.units,
            INPUTS=launch.inputs, DOWN_UNITS=launch.down_units,
            **options(launch.hidden_warps, launch.hidden_stages),
        )  # fmt: skip
        return project_down(h, widths, None, weights.down, weights.down_bias, launch)
