"""Watches the memory of Triton's interpreter: what kernels read and write, and that they may.

TRITON_INTERPRET=1 must be set before triton is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder


@triton.jit
def _steps(COUNT, n):
    count = 0
    for _ in range(0, n, 2):
        count += 1
    tl.store(COUNT, count)


def skip_without_interpreter() -> None:
    """Skip the module that calls this where the interpreter can't run a loop."""
    try:
        _steps[(1,)](torch.zeros(1, dtype=torch.int32), 5)
    except Exception as error:  # of Triton 3.6 with NumPy 2.4, for one
        pytest.skip(f"this Triton's interpreter does not run with this NumPy: {error}", allow_module_level=True)


class Watch:
    """What kernels read and wrote: every load and store of the interpreter is checked against the tensors known.

    An element of a buffer that is read before it was written, or written twice, and any address outside a tensor, is
    an error. Per storage: its first address, a mark for each byte (of inputs: read; of buffers: written), a name.
    """

    def __init__(self) -> None:
        self.inputs: list[tuple[int, np.ndarray, str]] = []
        self.buffers: list[tuple[int, np.ndarray, str]] = []

    def add_input(self, tensor: Tensor) -> np.ndarray:
        """The marks of its storage; views of one storage share them."""
        storage = tensor.untyped_storage()
        for start, read, _ in self.inputs:
            if start == storage.data_ptr():
                return read
        self.inputs.append((storage.data_ptr(), np.zeros(storage.nbytes(), bool), f"input {list(tensor.shape)}"))
        return self.inputs[-1][1]

    def add_buffer(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.buffers.append((storage.data_ptr(), np.zeros(storage.nbytes(), bool), f"buffer {list(tensor.shape)}"))

    def loaded(self, addresses: np.ndarray) -> None:
        if addresses.size == 0:
            return
        found = self._holding(addresses, self.buffers)
        if found is not None:
            start, written, name = found
            assert written[addresses - start].all(), f"unwritten elements of {name} are read"
            return
        found = self._holding(addresses, self.inputs)
        assert found is not None, "an address outside every tensor is read"
        found[1][addresses - found[0]] = True

    def stored(self, addresses: np.ndarray) -> None:
        if addresses.size == 0:
            return
        found = self._holding(addresses, self.buffers)
        assert found is not None, "an address outside every buffer is written"
        start, written, name = found
        assert not written[addresses - start].any(), f"an element of {name} is written twice"
        written[addresses - start] = True

    @staticmethod
    def _holding(
        addresses: np.ndarray, known: list[tuple[int, np.ndarray, str]]
    ) -> tuple[int, np.ndarray, str] | None:
        """The storage that all the addresses lie in: one pointer leads into one tensor."""
        first, last = int(addresses.min()), int(addresses.max())
        for entry in known:
            if entry[0] <= first and last < entry[0] + len(entry[1]):
                return entry
        return None


@contextmanager
def watched(*inputs: Tensor | None) -> Iterator[Watch]:
    """Buffers start as NaN (whole numbers: as large ones), and every access of a kernel is checked."""
    watch = Watch()
    for tensor in inputs:
        if tensor is not None:
            watch.add_input(tensor)
    new_empty, load, store = torch.Tensor.new_empty, InterpreterBuilder.create_masked_load, (
        InterpreterBuilder.create_masked_store
    )  # fmt: skip

    def poisoned(tensor: Tensor, *size: Any, **options: Any) -> Tensor:
        made = new_empty(tensor, *size, **options)
        if made.numel() == 0:
            return made  # the interpreter's own
        watch.add_buffer(made)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max // 2)

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.loaded(pointers.data[mask.data])
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.stored(pointers.data[mask.data])
        return store(self, pointers, value, mask, *rest)

    torch.Tensor.new_empty = poisoned  # type: ignore[method-assign]
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
    try:
        yield watch
    finally:
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store
