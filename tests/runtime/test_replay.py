"""Layer by layer, each family gives what its forward gives, whole and cut."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.errors import UnsupportedModelError
from sedac_hf.ops.contract import OperatingPoint
from sedac_hf.runtime import SedacRuntime
from sedac_hf.runtime.replay import LayerReplay
from tests.tiny_models import EXTRA_FAMILIES, FAMILIES, tiny_model, token_ids


def _last_output(runtime: SedacRuntime, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor)
        seen.append(first)

    handle = runtime.decoder_layers[-1].register_forward_hook(keep)
    try:
        with torch.no_grad():
            runtime.model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", [*FAMILIES, *EXTRA_FAMILIES])
def test_layers_one_by_one_are_the_forward(family: str) -> None:
    runtime = SedacRuntime(tiny_model(family))
    batches = [token_ids(2, 40, seed=1), token_ids(3, 7, seed=2)]
    replay = LayerReplay(runtime, ({"input_ids": ids, "use_cache": False} for ids in batches))
    points = [OperatingPoint(site.intermediate_size // 2) for site in runtime.sites]
    for setting in ([None] * len(points), points):
        with runtime.forced(setting):
            hidden = replay.first
            for layer in range(len(runtime.decoder_layers)):
                hidden = replay.run(layer, hidden)
            for got, ids in zip(hidden, batches, strict=True):
                torch.testing.assert_close(got, _last_output(runtime, ids), rtol=1e-4, atol=1e-4)


def test_layers_that_pass_on_more_than_the_hidden_state_are_refused() -> None:
    model = tiny_model("llama")
    runtime = SedacRuntime(model)
    layer = runtime.decoder_layers[1]
    plain, calls = layer.forward, []

    def counting(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        return plain(*args, **kwargs) * len(calls)  # what it gives depends on more than its input

    layer.forward = counting
    with pytest.raises(UnsupportedModelError, match="hidden state alone"):
        LayerReplay(runtime, [{"input_ids": token_ids(), "use_cache": False}])
    assert not layer._forward_hooks
