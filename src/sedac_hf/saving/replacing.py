"""Putting a folder in another's place, so that whoever looks, also after a crash, sees the old one or the new one."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def move_into_place(folder: Path, target: Path, replaced: Callable[[str], bool]) -> None:
    """Make ``folder`` the folder ``target``; what else lies in the old one stays.

    On Linux the two change places in one step of the file system. Elsewhere there is a moment between two renames in
    which ``target`` is not there, and the old folder lies beside it.

    Args:
        folder: complete, on the same file system; what is left of it at the end may be deleted.
        target: need not exist.
        replaced: whether a file of this name in the old folder goes, though the new one has none.
    """
    if not target.exists():
        shutil.copymode(target.parent, folder)
        os.rename(folder, target)
        return
    shutil.copymode(target, folder)
    others = [path for path in target.iterdir() if not replaced(path.name) and not (folder / path.name).exists()]
    files = {path for path in others if path.is_file() and not path.is_symlink()}
    folders = [path for path in others if path not in files]  # and links: they cannot lie in two places
    for path in files:
        _link(path, folder / path.name)
    inside = os.path.exists(os.curdir) and os.path.samefile(os.curdir, target)
    try:
        _exchange(folder, target)
        if inside:
            os.chdir(target)  # or this process would stay in the old one
        for path in folders:
            os.rename(folder / path.name, path)
    except BaseException:
        if any(os.path.lexists(folder / path.name) for path in folders):  # not ours, so not to be deleted
            os.rename(folder, tempfile.mkdtemp(prefix=f"{target.name}.old.", dir=target.parent))
        raise


def _link(path: Path, copy: Path) -> None:
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(path, copy)


def _exchange(a: Path, b: Path) -> None:
    if _exchanged_at_once(a, b):
        return
    spare = a.with_name(f"{a.name}.old")
    os.rename(b, spare)
    try:
        os.rename(a, b)
    except BaseException:
        os.rename(spare, b)
        raise
    os.rename(spare, a)


def _exchanged_at_once(a: Path, b: Path) -> bool:
    """Let the system exchange two folders; False where it cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0)
