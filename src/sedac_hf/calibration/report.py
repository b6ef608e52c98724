"""What a calibration found, as figures, a table and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint: its law, and how well its probe orders tokens.

    rank_correlation: Spearman, predicted risk against true KL on tokens that the probe was not fitted on.
    risk_scale: x0, nats; mean_ratio: mean share skipped behind it on the held-out part.
    """

    layer_idx: int
    target: float
    threshold: float
    weight: float
    rank_correlation: float
    risk_scale: float
    mean_ratio: float


@dataclass(frozen=True)
class CalibrationReport:
    """Figures of one calibration.

    Shares are of all FFNs: ``needed_bytes`` and ``needed_multiply_adds`` count shadow, probes and compensation.
    Perplexities are those of the held-out part; ``ppl_increase_bound`` is the upper confidence bound over documents.
    ``constant_*``: the best constant level at the same share (without probes), same text; ``law_over_constant``: 95%
    interval, over documents, of the law's perplexity relative to it. ``fit_kl``, ``fit_constant_kl``: mean KL of both
    at the share asked for, on tokens that no probe was fitted on.
    """

    objective: str
    cut: str
    max_ppl_increase: float | None
    requested_share: float | None
    needed_bytes: float
    needed_multiply_adds: float
    dense_perplexity: float
    perplexity: float
    ppl_increase: float
    ppl_increase_bound: float
    confidence: float
    constant_share: float
    constant_ppl_increase: float
    law_over_constant: tuple[float, float]
    fit_kl: float
    fit_constant_kl: float
    spread: float
    protocol: str
    context: int
    fit_tokens: int
    held_out_tokens: int
    held_out_documents: int
    n_levels: int
    confidence_decay: float
    dtype: str
    seconds: float
    checkpoints: tuple[CheckpointReport, ...] = ()
    layer_keep: tuple[float, ...] = ()
    tried: tuple[tuple[float, float, float], ...] = field(default=())
    notes: tuple[str, ...] = ()

    @property
    def constant_wins(self) -> bool:
        """Whether the constant level is better than the law: by KL when chosen, or plainly so on the held-out part."""
        return self.spread == 0 or self.law_over_constant[0] > 0

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {**dataclasses.asdict(self), "constant_wins": self.constant_wins}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CalibrationReport:
        """Read `to_dict`'s form.

        Raises:
            TypeError, KeyError: a figure is missing.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        own = {name: value for name, value in values.items() if name in known}
        own["checkpoints"] = tuple(CheckpointReport(**item) for item in values["checkpoints"])
        own["law_over_constant"] = tuple(values["law_over_constant"])
        own["tried"] = tuple(tuple(item) for item in values["tried"])
        own["layer_keep"] = tuple(values["layer_keep"])
        own["notes"] = tuple(values["notes"])
        return cls(**own)

    @property
    def title(self) -> str:
        return f"Calibration: {self.cut} ({self.objective})"

    def rows(self) -> list[tuple[str, str]]:
        """The figures in words: (what, value)."""
        asked = (
            f"needed share {self.requested_share:.0%}"
            if self.requested_share is not None
            else f"perplexity at most +{self.max_ppl_increase or 0:.2%}"
        )
        rows = [
            ("asked for", asked),
            ("FFN bytes not needed", f"{1 - self.needed_bytes:.1%} (costs counted, bf16 base)"),
            ("FFN multiply-adds not needed", f"{1 - self.needed_multiply_adds:.1%}"),
            ("perplexity", f"{self.dense_perplexity:.3f} -> {self.perplexity:.3f} ({self.ppl_increase:+.2%})"),
            (
                "upper bound",
                f"{self.ppl_increase_bound:+.2%} at {self.confidence:.0%} over {self.held_out_documents} documents",
            ),
            (
                "constant level, same share",
                f"{self.constant_ppl_increase:+.2%} ({1 - self.constant_share:.1%} not needed)",
            ),
            ("law against constant", self._verdict()),
            ("spread, decay", f"{self.spread:g}, {self.confidence_decay:g}"),
        ]
        for item in self.checkpoints:
            rows.append(
                (
                    f"checkpoint at layer {item.layer_idx}",
                    f"threshold {item.threshold:.3g}, weight {item.weight:.3g}, mean ratio {item.mean_ratio:.2f}, "
                    f"probe rank correlation {item.rank_correlation:.2f}",
                )
            )
        rows.append(("kept per FFN (mean point)", " ".join(f"{keep:.2f}" for keep in self.layer_keep)))
        rows.append(
            (
                "measured on",
                f"{self.held_out_tokens} held-out tokens, {self.protocol}, context {self.context}, {self.dtype}; "
                f"fitted on {self.fit_tokens}; {self.seconds:.0f} s",
            )
        )
        for note in self.notes:
            rows.append(("note", note))
        return rows

    def table(self) -> Table:
        """`rows` as a rich table."""
        table = Table(title=self.title, show_header=False)
        for name, value in self.rows():
            table.add_row(name, value)
        return table

    def _verdict(self) -> str:
        if self.spread == 0:
            return "the constant level won on the fit text: every token has the same level, no probe runs"
        low, high = self.law_over_constant
        if low > 0:
            verdict = "the constant level did better"
        else:
            verdict = "the law did better" if high < 0 else "no difference that this text can show"
        gain = 1 - self.fit_kl / self.fit_constant_kl
        return f"{verdict}: perplexity {low:+.2%} .. {high:+.2%} (95%); {gain:.0%} less KL on fit tokens"

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=120).print(self.table())
        return out.getvalue().rstrip()
