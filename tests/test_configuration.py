"""`SedacConfig` describes a base and leaves the base's own configuration as it is."""

from __future__ import annotations

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.configuration import SedacConfig
from tests.families import build


@torch.no_grad()
def test_wrapping_leaves_the_implementations_of_nested_configurations():
    # The model chose "sdpa" for its text part and "eager" for itself.
    base, inputs = build("got_ocr2")
    before, logits = implementations(base.config), base(**inputs).logits
    assert len(set(before.values())) > 1
    model = SedacForCausalLM.from_base(base)
    assert implementations(base.config) == before
    with model.disable():
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.unload()(**inputs).logits, logits)


@pytest.mark.parametrize("kind", ["attn", "experts"])
def test_every_part_keeps_its_own_implementation(kind):
    base, _ = build("got_ocr2")
    name = f"_{kind}_implementation"
    setattr(base.config, name, {"": "sdpa", "text_config": "eager", "vision_config": "flash"})
    before = implementations(base.config, name)
    assert len(set(before.values())) == 3
    config = SedacConfig(base.config)
    assert implementations(base.config, name) == before
    assert getattr(config, name) == "sdpa"


def test_an_implementation_that_is_asked_for_goes_to_every_part():
    base, _ = build("got_ocr2")
    SedacConfig(base.config, attn_implementation="eager")
    assert set(implementations(base.config).values()) == {"eager"}


def implementations(config, name: str = "_attn_implementation", path: str = "") -> dict[str, str | None]:
    """The choice of a configuration and of each one nested in it, by path."""
    found = {path: getattr(config, name)}
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            found |= implementations(getattr(config, part), name, f"{path}.{part}")
    return found
