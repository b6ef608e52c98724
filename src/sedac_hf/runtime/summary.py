"""What `print_summary` prints: what is attached, the law, and the totals so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime
    from sedac_hf.runtime.stats import SedacStats


def print_summary(runtime: SedacRuntime, law: Mapping[str, Any], stats: SedacStats) -> None:
    """Print to standard output."""
    console = Console()
    units = sum(site.intermediate_size for site in runtime.sites)
    known = sum(site.plain_forward for site in runtime.sites)
    console.print(
        f"{len(runtime.sites)} FFNs with {units} hidden units in {len(runtime.decoder_layers)} layers; "
        f"{known} run by the FFN engines, {len(runtime.sites) - known} through their linears"
    )
    if runtime.policy is None:
        console.print("not calibrated: nothing is skipped; run `calibrate(tokenizer, texts)`")
        return
    console.print(
        f"cut: {runtime.policy.cut} (for {runtime.policy.objective}), {runtime.policy.n_levels} levels, "
        f"{'soft' if runtime.policy.soft_exit else 'hard'} exit, decay {law['confidence_decay']:.3g}, "
        f"controller {type(runtime.controller).__name__}"
    )
    table = Table("checkpoint after layer", "threshold", "weight", "target", "tokens", "exits", "mean ratio")
    thresholds = runtime.controller.thresholds
    for item, threshold, seen in zip(runtime.policy.layer_configs, thresholds, stats.checkpoints, strict=True):
        table.add_row(
            str(item.layer_idx),
            f"{threshold:.4g}",
            f"{item.confidence_weight:.4g}",
            f"{item.target_exit_rate:.4g}",
            str(seen.tokens),
            str(seen.exits),
            f"{seen.mean_ratio:.3f}",
        )
    console.print(table)
    console.print(
        f"{stats.tokens} tokens in {stats.forward_passes} forward passes: needed share of FFN compute "
        f"{stats.needed_bytes_share:.1%} of bytes, {stats.needed_multiply_adds_share:.1%} of multiply-adds; "
        f"saved in these runs {stats.saved_bytes_share:.1%} of bytes, {stats.saved_multiply_adds_share:.1%} of "
        f"multiply-adds; fail-safe {stats.fail_safe}"
    )
    held = stats.memory
    console.print(
        f"memory: base {_mebibytes(held['base'])}; beside it {_mebibytes(held['extra'])} "
        f"({held['extra'] / max(held['base'], 1):.1%}, at most {_mebibytes(held['cap'])}): shadow "
        f"{_mebibytes(held['shadow'])}, compensation {_mebibytes(held['compensation'])}, probes "
        f"{_mebibytes(held['probes'])}, channel orders {_mebibytes(held['channel_order'])}"
    )
    for kind, origin in stats.strip_costs.items():
        console.print(f"strips are cut by {origin} costs: {kind}")
    for reason, count in stats.masked.items():
        console.print(f"{count} FFN(s) are computed whole and cut by zeroing, which saves nothing: {reason}")
    for choice, count in stats.choices.items():
        console.print(f"generate, {count} call(s): {choice}")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.3g} MiB"
