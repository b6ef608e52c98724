"""On which threads the compiled kernels run: torch's own where they can be entered, else a pool beside them.

After a parallel region the workers of torch's OpenMP runtime spin for milliseconds, waiting for the next one. A second
pool would fight them for the cores: a decode step gained 9% where it gains 93% without that fight (AMD EPYC, two
cores, 0.5B shape in float32). So kernels enter the same runtime; nothing needs to be set before, nor undone after.
Where that runtime is another than GCC's, kernels have threads of their own, and torch is kept to one thread while a
decode step runs.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from pathlib import Path

import torch

_MAPS = Path("/proc/self/maps")
_SYMBOL = "GOMP_parallel"


@functools.cache
def parallel_address() -> int:
    """Address of the function that runs a region on torch's threads; 0 where there is none that we know.

    Known is GCC's runtime, which torch ships on Linux. Elsewhere kernels have threads of their own.
    """
    library = _runtime_in_use()
    if library is None:
        return 0
    try:
        # Loaded already: this only finds it. The library stays loaded as long as torch does.
        return ctypes.cast(getattr(ctypes.CDLL(library), _SYMBOL), ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def kernels_join_torch() -> bool:
    """Whether kernels run on torch's own threads, so that the two can take turns without cost."""
    return parallel_address() != 0


def _runtime_in_use() -> str | None:
    if "OpenMP" not in torch.__config__.parallel_info() or not _MAPS.exists():
        return None
    paths = {line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text(errors="replace").splitlines()}
    found = sorted(path for path in paths if Path(path).name.startswith("libgomp"))
    # Other packages may bring a copy of their own; torch's lies with torch, or is the system's.
    with_torch = [path for path in found if Path(torch.__file__).parent in Path(path).parents or "torch.libs" in path]
    return next(iter([*with_torch, *found]), None)


class _Alone:
    """Decode steps that run now while torch is kept to one thread, and what it had before the first of them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.steps = 0
        self.before = 1


class _Own(threading.local):
    """The same of one thread: OpenMP keeps the number of threads per thread."""

    steps = 0
    before = 1


_alone, _own = _Alone(), _Own()


def kernel_threads() -> int:
    """How many threads a kernel takes: as many as torch has, or had before it was kept to one."""
    return _own.before if _alone.steps and _own.steps else torch.get_num_threads()


def begin_step() -> bool:
    """Before a decode step by kernels: keep torch to one thread if the kernels' threads are others than torch's.

    Returns whether `end_step` must be called afterwards, by the same thread, whatever happens in between.
    """
    if parallel_address():
        return False
    with _alone.lock:
        if not _own.steps:
            now = torch.get_num_threads()
            # A thread that meets torch for the first time while another decodes inherits that one's single thread.
            _own.before = _alone.before if _alone.steps and now == 1 else now
            if not _alone.steps:
                _alone.before = now
            torch.set_num_threads(1)
        _own.steps += 1
        _alone.steps += 1
    return True


def end_step() -> None:
    """Give torch its threads back after this thread's last decode step that runs."""
    with _alone.lock:
        _own.steps -= 1
        _alone.steps -= 1
        if not _own.steps:
            torch.set_num_threads(_own.before)


def _forget_steps() -> None:
    """In a forked child: steps of the parent's other threads will not end here, nor will a lock be given back."""
    _alone.lock = threading.Lock()
    _alone.steps = _own.steps


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_steps)
