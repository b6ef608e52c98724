"""How each model type is cut, as seen on a small decoder of it: writes the list that `sedac-hf models` prints.

``python -m tests.families.supported`` (``make models``) writes ``src/sedac_hf/assets/models.json`` and
``docs/models.md``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from sedac_hf.cli.models import LIST, page
from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ffn.site import FFNSite
from sedac_hf.ffn.sites import find_sites
from sedac_hf.ffn.slicing import why_masked
from sedac_hf.ops.activations import name_of
from tests.families.builder import MODEL_TYPES, build, is_ffn_weight
from tests.families.exceptions import NOT_BUILT

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def facts(model_type: str) -> dict[str, Any]:
    """What `sedac_hf.cli.models.read_list` gives for a type."""
    if model_type in NOT_BUILT:
        return {"not_built": NOT_BUILT[model_type]}
    model, _ = build(model_type)
    try:
        sites = find_sites(model).sites
    except UnsupportedModelError as error:
        return {"refused": _short(str(error))}
    sorts = [_sort(site) for site in sites]
    whole = _whole(model, sites)
    found = [sort for i, sort in enumerate(sorts) if sort not in sorts[:i]]
    return {"cut": found, "whole": whole} if whole else {"cut": found}


def _sort(site: FFNSite) -> dict[str, Any]:
    activation = site.activation if site.experts is None else site.experts.activation
    known = activation is not None and (site.plain_forward or site.experts is not None)
    why = why_masked(site)
    by = "masking" if why else "linears" if not known else "kernels" if _for_kernels(activation) else "engines"
    return {"kind": site.kind, "by": by, "select": activation is not None, **({"why": why} if why else {})}


def _for_kernels(activation: Any) -> bool:
    return name_of(activation) is not None


def _whole(model: nn.Module, sites: tuple[FFNSite, ...]) -> str:
    """What of the decoder's FFNs no site covers; "" where all are covered."""
    covered = {id(linear.weight) for site in sites for linear in site.linears}
    covered |= {id(p) for site in sites if site.experts for p in site.experts.parameters}
    covered |= {id(parameter.value) for site in sites for parameter in site.beside}
    left = [p for name, p in model.named_parameters() if is_ffn_weight(name, p) and id(p) not in covered]
    return ", ".join(sorted({"experts" if p.dim() == 3 else "other FFNs" for p in left}))


def _short(message: str) -> str:
    """The part of a refusal that says what was seen."""
    found = re.search(r"can be cut; (.*?)\. Looked for", message)
    experts = "Its experts" in message
    text = found[1] if found else message
    return f"{text}; its experts have a forward of their own" if experts else text


def write() -> None:
    known = {"transformers": transformers.__version__, "types": {name: facts(name) for name in MODEL_TYPES}}
    lines = [f'    "{name}": {json.dumps(each)}' for name, each in known["types"].items()]
    text = f'{{\n  "transformers": "{known["transformers"]}",\n  "types": {{\n' + ",\n".join(lines) + "\n  }\n}\n"
    LIST.write_text(text, encoding="utf-8")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    write()
