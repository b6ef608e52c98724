"""The model card, ``README.md``: what the folder holds, its base, the figures of its calibration, how to load it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from sedac_hf.configuration import SedacConfig

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport

_TAGS = ("sedac", "adaptive-computation")
_MARK = "<!-- Written by sedac-hf, and written again by the next save: delete this line to keep your own text. -->"

_BODY = """
{mark}

# {name}

{what}

{base}

## Calibration

{figures}

## Use

```python
from sedac_hf import SedacForCausalLM

model = SedacForCausalLM.from_pretrained("{name}")
```

`model.disable()` is a `with` block in which the base runs as it was, `model.stats()` says what was saved.
"""


def is_ours(path: Path) -> bool:
    """Whether a save may write the card here: there is none, or one of ours that nobody took over."""
    return not path.exists() or _MARK in path.read_text(encoding="utf-8", errors="replace")


def model_card(config: SedacConfig, report: CalibrationReport | None, name: str, tags: list[str] | None = None) -> str:
    """The text of the card.

    Args:
        config: as it is saved; an adapter's names its base.
        report: None for a model that was not calibrated here.
        name: folder or hub id that it is loaded by.
        tags: further ones.
    """
    base = config.base_model_name_or_path
    on_hub = base is not None and not os.path.isabs(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="sedac-hf",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*_TAGS, *(tags or ())])),
    )
    body = _BODY.format(
        mark=_MARK, name=name, what=_what(config), base=_base(config), figures=_figures(config, report)
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))


def _what(config: SedacConfig) -> str:
    kind = "model" if config.base_model_name_or_path is None else "adapter, without the base's weights"
    run = (
        f"cuts the feed-forward layers by `{config.cut}`" if config.calibrated else "is uncalibrated: it skips nothing"
    )
    return (
        f"A SEDAC {kind}: a decoder whose feed-forward layers compute, for each token, only the part that the token "
        f"needs. It {run}."
    )


def _base(config: SedacConfig) -> str:
    fingerprint = f"; fingerprint of its weights `{config.base_fingerprint}`" if config.base_fingerprint else ""
    kind = getattr(config.text_config, "model_type", "unknown")
    if config.base_model_name_or_path is None:
        return f"Base: type `{kind}`, its weights are in this folder{fingerprint}."
    revision = f", revision `{config.base_revision}`" if config.base_revision else ""
    return f"Base: `{config.base_model_name_or_path}`{revision}, type `{kind}`{fingerprint}."


def _figures(config: SedacConfig, report: CalibrationReport | None) -> str:
    if report is None:
        return "No report: the policy was not fitted by `calibrate`." if config.calibrated else "None."
    rows = "\n".join(f"| {name} | {value} |" for name, value in report.rows())
    return (
        f"| {report.title} | |\n|---|---|\n{rows}\n\n"
        "These are figures for the calibration text: another kind of text gets other ones. `calibration_report.json` "
        "has all of them."
    )
