"""Cut by importance in Triton, for one to a few rows: the 4-bit shadow decides, then only chosen rows are loaded.

    z[t, j]  = scale_x[t] * sum over groups of scale[j, g] * (codes[j, g] . codes_x[t, g]) + deciding_bias[j]
    used     = j < width[t]  and not |act(z)| * unit_norm[j] < importance_min[t]

as `sedac_hf.ops.low_bit` defines them: groups of 64 inputs, their products whole numbers. One program reads the shadow
of its units, decides, and loads those rows of gate and up that some row of x chose, by masks: the grid is static,
nothing is compacted, nothing returns to the host. Down's columns are picked in the same way where they lie in one
piece (`weight.T` contiguous); in a Linear's own layout picking single elements would save no memory traffic, and all
columns up to the width are read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops.contract import FFNWeights, ShadowTables
from sedac_hf.ops.packing import GROUP
from sedac_hf.ops.triton.down import covered_units, project_down
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS, Launch, options, select_launch
from sedac_hf.ops.triton.tiles import INLINE_PTX, NUMBER_OF_TOKENS, activated, hidden_tile, tile_widths

_GROUP = tl.constexpr(GROUP)
_WORDS = tl.constexpr(GROUP // 8)  # words of 32 bits that hold a group in 4 bits
_STEP_GROUPS = tl.constexpr(16)  # groups of a unit that are read at a time
_ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it to a small float32 rounds that half to even


@triton.jit
def round_rows(X, CODES, GROUP_SUMS, SCALES, d, groups, x_token, GROUPS: tl.constexpr):
    """Program (row): `low_bit.int8_rows`. CODES int8 [n, groups * 64], zeros beyond d; GROUP_SUMS int32 [n, groups];
    SCALES float32 [n], NaN for a row that is not finite."""
    row = tl.program_id(0)
    x_row = X + row.to(tl.int64) * x_token
    group = tl.arange(0, GROUPS)
    element = tl.arange(0, _GROUP)
    largest = tl.zeros((GROUPS, _GROUP), tl.float32)
    broken = tl.zeros((GROUPS, _GROUP), tl.int32)
    for start in range(0, groups, GROUPS):
        i = (start + group)[:, None] * _GROUP + element[None, :]
        size = tl.abs(tl.load(x_row + i, mask=i < d, other=0.0).to(tl.float32))
        finite = size < float("inf")
        largest = tl.maximum(largest, tl.where(finite, size, 0.0))
        broken = tl.maximum(broken, tl.where(finite, 0, 1))
    scale = tl.div_rn(tl.max(tl.max(largest, 1), 0), 127.0)
    whole = tl.max(tl.max(broken, 1), 0) == 0
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for start in range(0, groups, GROUPS):
        i = (start + group)[:, None] * _GROUP + element[None, :]
        x = tl.where(whole, tl.load(x_row + i, mask=i < d, other=0.0).to(tl.float32), 0.0)
        rounded = tl.div_rn(x, tl.broadcast_to(divisor, x.shape)) + _ROUNDING - _ROUNDING
        codes = tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int32)
        inside = start + group < groups
        tl.store(CODES + row.to(tl.int64) * groups * _GROUP + i, codes.to(tl.int8), mask=inside[:, None])
        tl.store(GROUP_SUMS + row * groups + start + group, tl.sum(codes, 1), mask=inside)
    tl.store(SCALES + row, tl.where(whole, scale, float("nan")))


@triton.jit
def dot4(nibbles, codes):
    """Sum over the four bytes of a word: unsigned in ``nibbles`` (0..15 each), signed in ``codes``; int32."""
    if INLINE_PTX:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, 0;", "=r,r,r", [nibbles, codes], dtype=tl.int32, is_pure=True, pack=1
        )
    total = (nibbles & 15) * ((codes << 24) >> 24)
    for shift in tl.static_range(8, 32, 8):
        total += ((nibbles >> shift) & 15) * ((codes << (24 - shift)) >> 24)
    return total


@triton.jit
def shadow_product(CODES, SCALES, X_CODES, X_GROUP_SUMS, X_SCALES, unit, read, row, n, groups):
    """z [rows, units] without bias. CODES, X_CODES: words of 32 bits; units that are not in ``read`` give 0."""
    word = tl.arange(0, _WORDS)
    unit_words = CODES + unit.to(tl.int64)[None, :, None, None] * groups * _WORDS + word[None, None, None, :]
    x_words = X_CODES + row[:, None, None, None] * groups * 2 * _WORDS + word[None, None, None, :]
    total = tl.zeros((row.shape[0], unit.shape[0], _STEP_GROUPS), tl.float32)
    for start in range(0, groups, _STEP_GROUPS):
        group = start + tl.arange(0, _STEP_GROUPS)
        inside = group < groups
        known = read[None, :, None] & inside[None, None, :]
        x_known = (row < n)[:, None, None] & inside[None, None, :]
        packed = tl.load(unit_words + group[None, None, :, None] * _WORDS, mask=known[:, :, :, None], other=0)
        x_group = x_words + group[None, None, :, None] * 2 * _WORDS
        low = tl.load(x_group, mask=x_known[:, :, :, None], other=0)
        high = tl.load(x_group + _WORDS, mask=x_known[:, :, :, None], other=0)
        # Byte i of a group holds element i and, in its high half, element i + 32; both plus 8.
        sums = tl.sum(dot4(packed & 0x0F0F0F0F, low) + dot4((packed >> 4) & 0x0F0F0F0F, high), 3)
        offset = tl.load(X_GROUP_SUMS + row[:, None, None] * groups + group[None, None, :], mask=x_known, other=0)
        scales = tl.load(
            SCALES + unit.to(tl.int64)[None, :, None] * groups + group[None, None, :], mask=known, other=0.0
        )
        total += (sums - 8 * offset).to(tl.float32) * scales.to(tl.float32)
    return tl.sum(total, 2) * tl.load(X_SCALES + row, mask=row < n, other=0.0)[:, None]


@triton.jit(do_not_specialize=NUMBER_OF_TOKENS)
def selected_hidden(
    X, GATE, UP, GATE_BIAS, UP_BIAS, WIDTHS, LEAST, CODES, SCALES, DECIDING_BIAS, UNIT_NORM, X_CODES, X_GROUP_SUMS,
    X_SCALES, H, ALIVE, COUNTS, n, d, f, groups, x_token, gate_unit, gate_input, up_unit, up_input, h_token,
    ACTIVATION: tl.constexpr, UNITS_ADJACENT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    UNITS: tl.constexpr, INPUTS: tl.constexpr, DOWN_UNITS: tl.constexpr,
):  # fmt: skip
    """Program (unit tile); ROWS >= n rows in one tile of tokens. ALIVE int8 [f]: units that are not 0 for all rows.
    COUNTS int32 [2] or None: gains the units used, summed over rows, and the units that some row uses."""
    token = tl.arange(0, TOKENS)
    row = tl.arange(0, ROWS)
    first = tl.program_id(0) * UNITS
    widths = tile_widths(WIDTHS, token, n, f)
    if first < covered_units(widths, DOWN_UNITS):
        unit = first + tl.arange(0, UNITS)
        exists = unit < tl.max(widths, 0)
        z = shadow_product(CODES, SCALES, X_CODES, X_GROUP_SUMS, X_SCALES, unit, exists, row, n, groups)
        if DECIDING_BIAS is not None:
            z += tl.load(DECIDING_BIAS + unit, mask=exists, other=0.0)[None, :]
        importance = tl.abs(activated(z, ACTIVATION)) * tl.load(UNIT_NORM + unit, mask=exists, other=0.0)[None, :]
        least = tl.load(LEAST + row, mask=row < n, other=0.0)
        # Not "at least": a NaN keeps its unit, so that a broken token does not look healthy.
        cut = importance < least[:, None]
        own = row[:, None, None] == token[None, None, :]
        chosen = tl.max(tl.where(own & (cut[:, :, None] == 0), 1, 0), 0)
        used = (chosen != 0) & (unit[:, None] < widths[None, :])
        wanted = tl.max(used.to(tl.int32), 1)
        if COUNTS is not None:
            tl.atomic_add(COUNTS, tl.sum(tl.sum(used.to(tl.int32), 1), 0))  # whole numbers: any order gives the same
            tl.atomic_add(COUNTS + 1, tl.sum(wanted, 0))
        read = (unit < f) if UNITS_ADJACENT else (wanted != 0)
        h = hidden_tile(
            X, GATE, UP, GATE_BIAS, UP_BIAS, H, used, read, unit, token, n, d, f,
            x_token, gate_unit, gate_input, up_unit, up_input, h_token, ACTIVATION, INPUTS,
        )  # fmt: skip
        alive = tl.max(tl.where(h == 0.0, 0, 1), 1)
        tl.store(ALIVE + unit, alive.to(tl.int8), mask=unit < f)


def rounded(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, d], rows contiguous, as `low_bit.int8_rows` rounds it: codes int8 [n, groups * 64], their sums by group
    int32 [n, groups], scales float32 [n]; a row that is not finite has a NaN scale."""
    n, d = x.shape
    groups = triton.cdiv(d, GROUP)
    codes = x.new_empty(n, groups * GROUP, dtype=torch.int8)
    sums = x.new_empty(n, groups, dtype=torch.int32)
    scales = x.new_empty(n, dtype=torch.float32)
    step = min(64, triton.next_power_of_2(groups))
    round_rows[(n,)](x, codes, sums, scales, d, groups, x.stride(0), GROUPS=step, **options(8, 1))
    return codes, sums, scales


def selected(
    x: Tensor, widths: Tensor, importance_min: Tensor, shadow: ShadowTables, weights: FFNWeights, activation: str,
    launch: Launch | None = None, *, hidden: Tensor | None = None, counts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [n, d] -> [n, outputs] in x's dtype, n up to `MOST_SELECTING_ROWS`; widths int32 [n] and importance_min
    float32 [n] on x's device; ``activation`` names the weights' one.

    hidden: zeros [n, f] in x's dtype, receives the values of the units in use; counts: zeros int32 [2], receives the
    units used, summed over rows, and the units that some row uses.

    Raises:
        ConfigError: more rows, or a shadow that is not in this layout.
    """
    n, d = x.shape
    f = weights.intermediate_size
    groups = triton.cdiv(d, GROUP)
    if n > MOST_SELECTING_ROWS:
        raise ConfigError(f"these kernels select for 1 to {MOST_SELECTING_ROWS} rows, got {n}: truncate, or mask")
    if shadow.codes.shape != (f, groups * GROUP // 2) or shadow.scales.shape != (f, groups):
        raise ConfigError(
            f"a 4-bit shadow of [{f}, {d}] must have codes [{f}, {groups * GROUP // 2}] and scales [{f}, {groups}], "
            f"got {list(shadow.codes.shape)} and {list(shadow.scales.shape)}"
        )
    launch = launch or select_launch(n, weights.down.shape[0], f, x.element_size())
    x = x if x.stride(1) == 1 else x.contiguous()
    up, gate = weights.up, weights.gate
    gate_strides = (0, 0) if gate is None else gate.stride()
    with torch.cuda.device_of(x):
        x_codes, x_sums, x_scales = rounded(x)
        h = x.new_empty(n, f) if hidden is None else hidden
        alive = x.new_empty(f, dtype=torch.int8)
        selected_hidden[(triton.cdiv(f, launch.units),)](
            x, gate, up, weights.gate_bias, weights.up_bias, widths, importance_min, shadow.codes.view(torch.int32),
            shadow.scales, shadow.bias, shadow.unit_norm, x_codes.view(torch.int32), x_sums, x_scales, h, alive,
            counts, n, d, f, groups, x.stride(0), *gate_strides, *up.stride(), h.stride(0),
            ACTIVATION=activation, UNITS_ADJACENT=up.stride(1) != 1, ROWS=triton.next_power_of_2(n),
            TOKENS=launch.tokens, UNITS=launch.units, INPUTS=launch.inputs, DOWN_UNITS=launch.down_units,
            **options(launch.hidden_warps, launch.hidden_stages),
        )  # fmt: skip
        return project_down(h, widths, alive, weights.down, weights.down_bias, launch)
