"""The Triton engines without a GPU: right in the interpreter, and compiled for sm_90 into what a GPU needs.

Nothing here says how fast they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sedac_hf.ops import FFNWeights
from sedac_hf.ops.contract import ShadowTables
from sedac_hf.ops.triton.launch import MOST_SELECTING_ROWS, select_launch, truncate_launch

ROOT = Path(__file__).parents[3]
if find_spec("triton") is None:
    pytest.skip("needs triton, which PyTorch brings along for Linux only", allow_module_level=True)

from sedac_hf.ops.triton.select import selected  # noqa: E402
from sedac_hf.ops.triton.truncate import truncated  # noqa: E402
from tests.ops.triton.sm90 import TOOLS, Call, Compiled, compiled, recorded  # noqa: E402

HIDDEN, UNITS = 4096, 14336  # an 8B decoder
SHARED_MEMORY = 99 * 1024  # bytes that every GPU since 2020 gives to a program


@pytest.mark.parametrize("file", ["interpreted.py", "engine_interpreted.py"])
def test_in_the_interpreter(file: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rs",
        "-p",
        "no:cacheprovider",
        f"tests/ops/triton/{file}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "does not run with" in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(rows: int, *, selects: bool, by_columns: bool, bias: bool = False, gated: bool = True) -> list[Call]:
    """What a call on an 8B decoder's FFN launches."""
    down = meta(UNITS, HIDDEN).T if by_columns else meta(HIDDEN, UNITS)
    biases = [meta(size) if bias else None for size in (UNITS, UNITS, HIDDEN)]
    gate = meta(UNITS, HIDDEN) if gated else None
    weights = FFNWeights(gate, meta(UNITS, HIDDEN), down, biases[0] if gated else None, *biases[1:], torch.relu)
    x, widths = meta(rows, HIDDEN), meta(rows, dtype=torch.int32)
    with recorded() as calls:
        if selects:
            float32 = torch.float32
            decides = meta(UNITS, dtype=float32) if bias else None
            shadow = ShadowTables(
                meta(UNITS, HIDDEN // 2, dtype=torch.uint8), meta(UNITS, HIDDEN // 64), decides,
                meta(UNITS, dtype=float32),
            )  # fmt: skip
            selected(x, widths, meta(rows, dtype=float32), shadow, weights, "silu")
        else:
            truncated(x, widths, weights, "silu")
    return calls


@pytest.mark.skipif(
    not all((TOOLS / tool).exists() for tool in ("ptxas", "cuobjdump", "nvdisasm")),
    reason="this build of triton brings no ptxas, cuobjdump or nvdisasm along",
)
@pytest.mark.parametrize(
    "call",
    [
        *launches(1, selects=True, by_columns=True),
        *launches(4, selects=True, by_columns=True, bias=True)[1:],
        launches(2, selects=True, by_columns=False)[2],
        *launches(1, selects=False, by_columns=False),
        *launches(16, selects=False, by_columns=True, gated=False, bias=True),
        *launches(32, selects=False, by_columns=False)[:2],
        *launches(64, selects=False, by_columns=True)[:2],
        *launches(512, selects=False, by_columns=False)[:2],
        launches(512, selects=False, by_columns=True)[1],
    ],
    ids=lambda call: f"{call.kernel.__name__}-{call.rows}",
)
def test_compiled_for_sm_90(call: Call) -> None:
    code = compiled(call)
    assert code.stack == code.local == 0
    assert code.count(r"\bLDL") == code.count(r"\bSTL") == 0
    assert code.shared <= SHARED_MEMORY
    assert bulk_loads(call, code) > 0
    if call.kernel.__name__ in ("truncated_hidden", "selected_hidden", "down_tiles"):
        # Tiles go to shared memory without passing through registers: 16 bytes each, but for h of few rows.
        narrow = {width for width in code.widths("LDGSTS") if width != 128}
        assert narrow <= ({64} if call.kernel.__name__ == "down_tiles" else set())
        assert code.count(r"\bH(G)?MMA\b") > 0
    if call.kernel.__name__ == "selected_hidden":
        assert code.count(r"\bIDP\.4A\.U8\.S8\b") > 0


def bulk_loads(call: Call, code: Compiled) -> int:
    """Loads of 16 bytes."""
    return code.widths("LDGSTS").get(128, 0) + code.widths("LDG").get(128, 0)


def test_launches_do_not_depend_on_what_is_cut() -> None:
    for rows in (1, 3, MOST_SELECTING_ROWS):
        assert select_launch(rows, HIDDEN, UNITS, 2) == select_launch(1, HIDDEN, UNITS, 2)  # the same bits in a batch
    assert truncate_launch(1, HIDDEN, UNITS, 2) == truncate_launch(16, HIDDEN, UNITS, 2)


@pytest.mark.parametrize("rows", [1, 17, 64, 65, 4096])
@pytest.mark.parametrize(("d", "f"), [(4096, 14336), (896, 4864), (8, 24), (3584, 18944)])
@pytest.mark.parametrize("element_size", [2, 4])
def test_launch_shapes_fit(rows: int, d: int, f: int, element_size: int) -> None:
    launch = truncate_launch(rows, d, f, element_size)
    assert all(size > 0 and size & (size - 1) == 0 for size in launch[:6])
    assert min(launch.tokens, launch.units, launch.inputs, launch.down_units) >= 16  # the least that products take
    assert launch.splits == 1 or launch.splits * launch.down_units <= f
