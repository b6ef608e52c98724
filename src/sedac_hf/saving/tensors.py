"""``sedac.safetensors``, with a checksum in its metadata: a weight with a flipped bit is a number like any other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sedac_hf.errors import LoadError

_KEY = "sha256"


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors of the CPU."""
    save_file(dict(tensors), path, metadata={"format": "pt", _KEY: _checksum(tensors)})


def read_tensors(path: str) -> dict[str, Tensor]:
    """Read what `write_tensors` wrote.

    Raises:
        LoadError: the file is damaged, or has no checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
            expected = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise LoadError(f"{path} is damaged: {error}; copy or download it again") from error
    found = _checksum(tensors)
    if found != expected:
        raise LoadError(
            f"{path} is damaged: its tensors must have the SHA-256 that its metadata names, {expected}, got {found}; "
            "copy or download it again"
        )
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        made.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()
