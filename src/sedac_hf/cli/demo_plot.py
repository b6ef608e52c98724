"""The demo's picture: perplexity against FFN compute not needed. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from sedac_hf.evaluation.quality import QualityRow


def draw(rows: list[QualityRow], path: Path) -> None:
    """Write a PNG; one line per kind of row, in order of the share."""
    figure = Figure(figsize=(8, 5), dpi=120)
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row.kind for row in rows if row.kind != "dense"))
    for kind in kinds:
        points = sorted((row.bytes_not_needed, row.increase, row.low, row.high) for row in rows if row.kind == kind)
        x = [100 * point[0] for point in points]
        y = [100 * point[1] for point in points]
        error = [[100 * (p[1] - p[2]) for p in points], [100 * (p[3] - p[1]) for p in points]]
        ours = kind.startswith("SEDAC")
        axes.errorbar(
            x, y, yerr=error, marker="o", capsize=3, linewidth=2.2 if ours else 1, linestyle="-" if ours else "--",
            label=kind,
        )  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=3, linscale=2)  # linear where one would want to be
    axes.set_ylim(bottom=min(-0.3, *(100 * row.low for row in rows)))
    axes.set_yticks([0, 1, 2, 3, 5, 10, 20, 50, 100], ["0", "1", "2", "3", "5", "10", "20", "50", "100"], minor=False)
    axes.minorticks_off()
    axes.set_ylim(top=1.3 * max(5.0, *(100 * row.high for row in rows)))
    axes.set_xlabel("share of all FFN weight bytes not needed, % (what decides counted as cost)")
    axes.set_ylabel("perplexity increase, % (linear to 3, then log)")
    axes.set_title("Embedded decoder: quality against FFN compute")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
