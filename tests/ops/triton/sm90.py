"""Compiles what the Triton engines launch for sm_90, on any machine: no GPU is needed for that.

The engines run on tensors without memory (device "meta"), their kernels replaced by recorders; what is compiled is
therefore what a GPU would be given, with the same specialisation of pointers, strides and sizes.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sedac_hf.ops.triton import down, select, truncate

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = (
    (truncate, "truncated_hidden"),
    (select, "round_rows"),
    (select, "selected_hidden"),
    (down, "down_tiles"),
    (down, "add_splits"),
)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int8: "i8",
    torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One launch: the kernel and its arguments by name, constants and options among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int | bool]

    @property
    def rows(self) -> int:
        x = self.arguments.get("X", self.arguments.get("Y"))
        return int(x.shape[0])


@dataclass(frozen=True)
class Compiled:
    """What became of a launch: registers a thread, bytes of stack and local memory, shared memory, machine code."""

    registers: int
    stack: int
    local: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.code))

    def widths(self, instruction: str) -> dict[int, int]:
        """How often a load occurs at each width in bits; one that names no width has 32."""
        found: dict[int, int] = {}
        for modifiers in re.findall(rf"\b{instruction}(?=[. ])((?:\.\w+)*)", self.code):
            named = [int(part) for part in re.findall(r"\.[USB]?(8|16|32|64|128)\b", modifiers)]
            width = max(named, default=32)
            found[width] = found.get(width, 0) + 1
        return found


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches of the engines are listed instead of made."""
    calls: list[Call] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*positional: Any, **named: Any) -> None:
                given = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
                arguments = {name: given.pop(name) for name in self.kernel.arg_names}
                calls.append(Call(self.kernel, grid, arguments, given))

            return launch

    patches = [mock.patch.object(module, name, Recorder(getattr(module, name))) for module, name in KERNELS]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def compiled(call: Call, capability: int = 90) -> Compiled:
    """The launch, specialised as Triton does at run time: sizes of 1 are constants, multiples of 16 are known."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    known: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(call.kernel.params):
        value = call.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(place,)] = value
            continue
        signature[parameter.name] = "*" + _TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            known[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=known)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=call.options)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary.asm["cubin"])
        usage = _tool("--dump-resource-usage", file)
        code = _tool("--dump-sass", file)
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL"))
    return Compiled(registers, stack, local, binary.metadata.shared, code)


def _tool(flag: str, file: Path) -> str:
    environment = os.environ | {"PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"}  # it calls nvdisasm
    done = subprocess.run(
        [TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout
