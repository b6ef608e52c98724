"""The list of model types says what is so: some types are looked at anew."""

from __future__ import annotations

import pytest
import transformers

from sedac_hf.cli.models import page, read_list
from tests.families import MODEL_TYPES
from tests.families.supported import PAGE, facts

KNOWN = read_list()
# One or two of each sort: kinds, ways of cutting, left whole, refused, not built.
SOME = (
    "llama", "phi3", "gpt2", "opt", "bert", "apertus", "rwkv", "bitnet", "gemma3n_text", "mixtral", "gpt_oss",
    "llama4_text", "nemotron_h", "jetmoe", "inkling_text", "blt", "mamba", "dbrx", "gemma3n",
)  # fmt: skip


@pytest.mark.parametrize("model_type", [name for name in SOME if name in MODEL_TYPES])
def test_a_type_is_cut_as_listed(model_type: str) -> None:
    found = facts(model_type)
    if "not_built" in found and transformers.__version__ != KNOWN["transformers"]:
        pytest.skip(found["not_built"])
    assert found == KNOWN["types"][model_type], "run `make models`"


def test_every_type_is_listed() -> None:
    if transformers.__version__ == KNOWN["transformers"]:
        assert sorted(KNOWN["types"]) == MODEL_TYPES, "run `make models`"


def test_the_page_is_made_of_the_list() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(KNOWN), "run `make models`"
