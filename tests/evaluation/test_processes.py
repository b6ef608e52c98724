"""Several processes give the figure of one, and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.processes import gather, gather_in_order, leave, share_of_this_process

ROOT = Path(__file__).parents[2]
PPL = ["-m", "sedac_hf.cli.main", "eval", "ppl", "demo", "--stdlib", "--max-tokens", "1500", "--context", "128",
       "--batch-size", "3", "--device", "cpu", "--json"]  # fmt: skip


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(*command: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    values: dict[str, Any] = json.loads(done.stdout)  # and nothing but: the other process prints nothing
    return values


def test_accelerate_launch_gives_the_figure_of_one_process() -> None:
    one = run(sys.executable, *PPL)
    machine = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", str(free_port())]
    launch = ["-m", "accelerate.commands.launch", *machine, "--mixed_precision", "no", "--dynamo_backend", "no"]
    two = run(sys.executable, *launch, *PPL)
    assert one["cut"]["tokens"] == two["cut"]["tokens"] == 1500
    for name in ("dense", "cut"):
        assert abs(two[name]["mean_nll"] / one[name]["mean_nll"] - 1) < 1e-9
        for single, shared in zip(one[name]["documents"], two[name]["documents"], strict=True):
            assert single["name"] == shared["name"]
            assert abs(shared["nll"] / single["nll"] - 1) < 1e-9
    assert two["interval"] == one["interval"]
    assert two["stats"]["tokens"] == one["stats"]["tokens"]


def work_in_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    mine = share_of_this_process(7)
    squares = gather_in_order(lambda n: n * n, mine)

    def fail_at_three(n: int) -> int:
        if n == 3:
            raise EvaluationError("window 3 is broken")
        return n

    try:
        gather_in_order(fail_at_three, mine)
        error = ""
    except EvaluationError as caught:
        error = str(caught)
    values = {"mine": list(mine), "squares": squares, "error": error, "ranks": gather(rank)}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(values))
    leave()


def test_results_in_order_and_errors_in_all_processes(tmp_path: Path) -> None:
    mp.spawn(work_in_process, args=(free_port(), str(tmp_path)), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [values.pop("mine") for values in found] == [[0, 2, 4, 6], [1, 3, 5]]
    assert found[0] == found[1]
    assert found[0] == {"squares": [n * n for n in range(7)], "error": "window 3 is broken", "ranks": [0, 1]}


def test_one_process_does_everything_itself() -> None:
    assert list(share_of_this_process(3)) == [0, 1, 2]
    assert gather_in_order(str, range(3)) == ["0", "1", "2"]
    assert gather("x") == ["x"]
