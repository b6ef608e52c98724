"""Reading memory for benchmarks: which tensors it takes, and that it takes them whole."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.ops.compiled import available, instruction_sets, read_memory, read_rows

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


def test_reads_rows_of_matrices_in_either_layout() -> None:
    matrices = [torch.randn(9, 6, dtype=torch.bfloat16), torch.randn(6, 9).T.contiguous(), torch.randn(9, 8)[:, 1:7]]
    before = [matrix.clone() for matrix in matrices]
    for rows in ([], [8], [0, 3, 4, 8] * 20):
        read_rows(matrices, torch.tensor(rows, dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))


@pytest.mark.parametrize(
    ("matrix", "rows"),
    [
        (torch.zeros(8, 6).T, torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(8), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(8, 3, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(8, 4, device="meta"), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(8, 4), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(8, 4), torch.full((1,), 8, dtype=torch.int32)),
        (torch.zeros(8, 4), torch.full((1,), -1, dtype=torch.int32)),
    ],
    ids=["transposed", "a vector", "half words", "elsewhere", "other indices", "past the end", "before the start"],
)
def test_refuses_rows_that_it_cannot_read(matrix: torch.Tensor, rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="rows"):
        read_rows([matrix], rows)


def test_every_machine_has_the_portable_set_last() -> None:
    assert instruction_sets()[-1] == "portable"
