"""`sedac-hf models`: which model types of transformers are cut, and how, as they were seen when the list was made.

The list, ``assets/models.json``, is made by ``make models`` from a small decoder of each type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

LIST = Path(__file__).parents[1] / "assets" / "models.json"
COLUMNS = ("model type", "FFNs", "cut by", "select", "remarks")
TRY_IT = (
    "The rules are structural, whatever a type is called: try another one by SedacForCausalLM.from_pretrained, which "
    "refuses what it cannot cut"
)


def command(
    model_type: Annotated[str | None, typer.Option("--type", help="This type alone.", show_default=False)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the model types that were tried, and how each is cut."""
    known = read_list()
    types: dict[str, Any] = known["types"]
    if model_type is not None:
        types = {name: facts for name, facts in types.items() if name == model_type}
    if json_output:
        typer.echo(json.dumps({**known, "types": types}, indent=2))
        return
    if not types:
        typer.echo(f"{model_type} is none of the causal types of transformers {known['transformers']}. {TRY_IT}.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS)
    for row in rows(types):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"Seen with transformers {known['transformers']}. {TRY_IT}.")


def read_list() -> dict[str, Any]:
    """``transformers``: the version; ``types``: by model type ``cut`` (a list of ``kind``, ``by``, ``select``: whether
    a low-bit copy can decide, and for masking ``why``, for each sort of FFN) with ``whole`` (what is left so), or else
    ``refused`` or ``not_built``: why.
    """
    found: dict[str, Any] = json.loads(LIST.read_text(encoding="utf-8"))
    return found


def rows(types: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's cells, one row for each sort of FFN of a type."""
    for name, facts in types.items():
        for number, sort in enumerate(facts.get("cut", ())):
            remarks = [sort["why"]] if "why" in sort else []
            remarks += [f"whole: {facts['whole']}"] if facts.get("whole") and not number else []
            yield name, sort["kind"], sort["by"], "yes" if sort["select"] else "down alone", "; ".join(remarks)
        if "cut" not in facts:
            what = "refused" if "refused" in facts else "not tried"
            yield name, "", what, "", facts.get("refused") or facts["not_built"]


def page(known: dict[str, Any]) -> str:
    """The list as a Markdown page."""
    cells = [COLUMNS, ("---",) * len(COLUMNS), *rows(known["types"])]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)
    return f"""# Model types

Made by `make models` from a small random decoder of each causal type of transformers {known["transformers"]};
`sedac-hf models` prints the same. The tests cut each of them and compare with masking.

{TRY_IT}.

- *FFNs*: gated (gate, up, down), fused (gate and up in one linear), plain (up, down), experts (of a mixture).
- *Cut by*: **kernels**: the formula was recognised, and the compiled kernels run it in decode steps (weights that lie
  the other way round, Conv1D and some experts, under `select` alone); **engines**: it was recognised, and torch runs
  it; **linears**: the class's own forward, or of experts its own activation, stays, and the linears emit fewer units;
  **masking**: all is computed and what is cut is zeroed, which saves nothing, for the reason in the remarks.
- *select*: whether a low-bit copy can decide which units a token needs. **down alone**: no activation can be read, so
  the units' own values decide. Gate and up are computed whole, down is needed in part, and since the rest is zeroed
  nothing is saved. `truncate` works for all.

{table}
"""
