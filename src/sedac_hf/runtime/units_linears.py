"""Down's linear maps while their weights lie by units: a layout that torch's products take longer with.

A prompt of some dozen tokens, or a batch of as many, runs whole FFNs by their own modules. Down's is given the
compiled product there, so that the layout costs such calls nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from sedac_hf.ffn.linears import original_forward
from sedac_hf.ffn.sites import FFNSite
from sedac_hf.ops.rust_product import accepts, available, product


class UnitsLinear:
    """The forward of one linear map: by the compiled product where that is quicker, else by the module's own."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module
        self.original = original_forward(module)

    def forward(self, input: Tensor) -> Any:  # named as nn.Linear names it
        held = self.module._parameters
        weight, bias = held.get("weight"), held.get("bias")
        if weight is None or not accepts(input, weight, bias):
            return self.original(input)
        return product(input, weight, bias)


def units_linears(sites: Iterable[FFNSite]) -> Iterator[UnitsLinear]:
    """Those of FFNs that run by their own modules where they are whole."""
    if not available():
        return
    for down in {id(site.down): site.down for site in sites if site.plain_forward}.values():
        if type(down) is nn.Linear:
            yield UnitsLinear(down)
