"""One evaluation shared by the processes of `accelerate launch`; with one process everything here is a plain loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from sedac_hf.errors import EvaluationError

T = TypeVar("T")


def _state() -> Any | None:
    """accelerate's state where several processes run, else None; joins the group that the launcher described."""
    import torch.distributed as dist

    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not launched and not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    from accelerate import PartialState

    # gloo on a CPU; accelerate asks for the flag where a GPU is visible but not meant
    state = PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true"))
    return state if state.num_processes > 1 else None


def is_main_process() -> bool:
    """Whether this process should print."""
    state = _state()
    return state is None or bool(state.is_main_process)


def local_device() -> Any | None:
    """The device that the launcher gave this process, None for a single process."""
    state = _state()
    return None if state is None else state.device


def leave() -> None:
    """Wait for the other processes and close the group; a program's last act.

    A process that ends with its group open can be aborted by the group's threads.
    """
    state = _state()
    if state is not None:
        state.wait_for_everyone()
        state.destroy_process_group()


def share_of_this_process(n: int) -> range:
    """Which of n pieces of work are this process's: every n-th, so that long and short ones are spread."""
    state = _state()
    return range(n) if state is None else range(state.process_index, n, state.num_processes)


def gather_in_order(work: Callable[[int], T], numbers: Iterable[int]) -> list[T]:
    """Does this process's pieces of work; all processes get all results, in the order of their numbers.

    Raises:
        EvaluationError: one of any process, raised in all, so that none waits for one that has stopped.
    """
    state = _state()
    if state is None:
        return [work(number) for number in numbers]
    from accelerate.utils import gather_object

    done: list[tuple[int, T]] = []
    error: str | None = None
    try:
        for number in numbers:
            done.append((number, work(number)))
    except EvaluationError as caught:
        error = str(caught)
    gathered: list[tuple[str | None, list[tuple[int, T]]]] = gather_object([(error, done)])
    for message, _ in gathered:
        if message is not None:
            raise EvaluationError(message)
    return [result for _, result in sorted((pair for _, part in gathered for pair in part), key=lambda pair: pair[0])]


def gather(value: T) -> list[T]:
    """One value of each process, in the order of the processes."""
    if _state() is None:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))
