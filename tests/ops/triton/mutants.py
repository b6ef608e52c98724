"""Faults that the checks of the Triton engines must find: one change each to a copy of the kernels' sources."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tests.ops.triton.cases import FILES, SOURCES, Engines


class Mutant(NamedTuple):
    """``old`` occurs once in ``file``.py of the kernels, ``new`` replaces it. ``broken``: only NaN and inf show it."""

    name: str
    file: str
    old: str
    new: str
    broken: bool = False


def engines_with(mutant: Mutant, folder: Path) -> Engines:
    """The engines from sources in ``folder`` with the one change."""
    for file in FILES:
        text = (SOURCES / f"{file}.py").read_text(encoding="utf-8")
        if file == mutant.file:
            assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} must occur once in {file}.py"
            text = text.replace(mutant.old, mutant.new)
        (folder / f"{file}.py").write_text(text, encoding="utf-8")
    return Engines.load(folder)


TRUNCATE_MUTANTS: tuple[Mutant, ...] = (
    Mutant("tokens past the end", "tiles", "exists = token < n", "exists = token < n + 1"),
    Mutant("inputs past the end", "tiles", "inside = i < d", "inside = i <= d"),
    Mutant("last input lost", "tiles", "inside = i < d", "inside = i < d - 1"),
    Mutant("up's bias lost", "tiles", "if UP_BIAS is not None:", "if UP_BIAS is None:"),
    Mutant("gate's bias lost", "tiles", "if GATE_BIAS is not None:", "if GATE_BIAS is None:"),
    Mutant("unused units kept", "tiles", "h = tl.where(used, h, 0.0)", "h = h"),
    Mutant("unused units times 0", "tiles", "tl.where(used, h, 0.0)", "(h * used.to(tl.float32))", True),
    Mutant("gelu's constant", "tiles", "0.7071067811865476", "0.7171067811865476"),
    Mutant("relu drops NaN", "tiles", "tl.where(z < 0.0, 0.0, z)\n", "tl.where(z > 0.0, z, 0.0)\n", True),
    Mutant("widths not clipped", "tiles", "tl.minimum(tl.maximum(widths, 0), f)", "widths"),
    Mutant("h not covered", "down", "tl.cdiv(tl.max(widths, 0), DOWN_UNITS) * DOWN_UNITS", "tl.max(widths, 0)"),
    Mutant("last step lost", "down", "range(split, steps, SPLITS)", "range(split, steps - 1, SPLITS)"),
    Mutant("steps run twice", "down", "range(split, steps, SPLITS)", "range(split, steps, SPLITS - 1)"),
    Mutant("a split less", "down", "tl.minimum(steps, SPLITS), 1)", "tl.minimum(steps, SPLITS - 1), 1)"),
    Mutant("no split for nothing", "down", "tl.minimum(steps, SPLITS), 1)", "tl.minimum(steps, SPLITS), 0)"),
    Mutant("all splits added", "down", "tl.minimum(tl.cdiv(width, DOWN_UNITS), SPLITS)", "SPLITS"),
    Mutant("ragged split not added", "down", "tl.cdiv(width, DOWN_UNITS)", "width // DOWN_UNITS"),
    Mutant("splits share rows", "down", "split.to(tl.int64) * n", "split.to(tl.int64) * (n - 1)"),
    Mutant("columns beyond the widest", "down", "read = unit < widest", "read = unit < f"),
    Mutant("outputs past the end", "down", "< outputs)[:, None] & read", "< outputs + 1)[:, None] & read"),
    Mutant("one width for all", "truncate", "< widths[None, :]", "< (0 * widths + f)[None, :]"),
    Mutant("a unit too many", "truncate", "unit[:, None] < widths[None", "unit[:, None] <= widths[None"),
    Mutant("rows beyond the widest", "truncate", "f if UNITS_ADJACENT else tl.max(widths, 0)", "f"),
    Mutant("last row not read", "truncate", "else tl.max(widths, 0))", "else tl.max(widths, 0) - 1)"),
    Mutant("last unit tile lost", "truncate", "triton.cdiv(f, launch.units)", "f // launch.units"),
)  # fmt: skip

SELECT_MUTANTS: tuple[Mutant, ...] = (
    Mutant("halves away from even", "select", "+ _ROUNDING - _ROUNDING", "+ 0.5"),
    Mutant("broken rows rounded", "select", "tl.where(whole, scale, float(\"nan\"))", "scale"),
    Mutant("x shifted", "select", ".to(tl.float32), 0.0)", ".to(tl.float32) + 1, 0.0)"),
    Mutant("a byte lost", "select", "tl.static_range(8, 32, 8)", "tl.static_range(8, 24, 8)"),
    Mutant("bytes unsigned", "select", "(codes << (24 - shift)) >> 24", "(codes >> shift) & 255"),
    Mutant("offset wrong", "select", "8 * offset", "7 * offset"),
    Mutant("halves mixed up", "select", "high = tl.load(x_group + _WORDS,", "high = tl.load(x_group,"),
    Mutant("groups past the end", "select", "inside = group < groups", "inside = group < groups + 1"),
    Mutant("scale of x lost", "select", "tl.sum(total, 2) * ", "tl.sum(total, 2) + 0 * "),
    Mutant("deciding bias lost", "select", "if DECIDING_BIAS is not None:", "if DECIDING_BIAS is None:"),
    Mutant("norm lost", "select", "(z, ACTIVATION)) * ", "(z, ACTIVATION)) + 0 * "),
    Mutant("sign kept", "select", "tl.abs(activated(z, ACTIVATION))", "activated(z, ACTIVATION)"),
    Mutant("ties cut", "select", "importance < least[:, None]", "importance <= least[:, None]"),
    Mutant("NaN cut", "select", "importance < least[:, None]", "(importance >= least[:, None]) == 0", True),
    Mutant("rows choose for each other", "select", "own & (cut[:, :, None] == 0)", "cut[:, :, None] == 0"),
    Mutant("width forgotten", "select", "& (unit[:, None] < widths[None, :])", "& (unit[:, None] < f)"),
    Mutant("all rows read", "select", "(unit < f) if UNITS_ADJACENT else", "(unit < f) if 1 else"),
    Mutant("shadow past the widest", "select", "exists = unit < tl.max(widths, 0)", "exists = unit < f + 1"),
    Mutant("all columns read", "select", "tl.where(h == 0.0, 0, 1)", "tl.where(h == 0.0, 1, 1)"),
    Mutant("columns of all rows only", "select", "alive = tl.max(", "alive = tl.min("),
    Mutant("columns mixed up", "down", "unit < f, other=0) != 0", "unit < f, other=0) == 0"),
)  # fmt: skip
