"""Reading memory for benchmarks: which tensors it takes, and that it takes them whole."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.ops.compiled import available, instruction_sets, read_memory

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")


@pytest.mark.parametrize("n", [0, 1, 3, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_reads_any_size_and_changes_nothing(n: int, dtype: torch.dtype) -> None:
    tensor = torch.arange(n).to(dtype)
    before = tensor.clone()
    read_memory(tensor)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, 8).T[:4],
        torch.zeros(8)[::2],
        torch.zeros(8, dtype=torch.bfloat16)[1:],
        torch.zeros(2, device="meta"),
    ],
    ids=["transposed", "gaps", "between words", "elsewhere"],
)
def test_refuses_what_it_cannot_read_in_one_run(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous CPU tensor"):
        read_memory(tensor)


def test_every_machine_has_the_portable_set_last() -> None:
    assert instruction_sets()[-1] == "portable"
