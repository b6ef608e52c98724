"""Which of the standard library's held-out files the demo calibrates on, and which it evaluates on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sedac_hf.evaluation import Document


def calibration_documents() -> list[Document]:
    """Held-out files (never trained on) whose name hashes to an even number."""
    return [document for document in _heldout() if _hash(document.name) % 2 == 0]


def evaluation_documents() -> list[Document]:
    """The other held-out files."""
    return [document for document in _heldout() if _hash(document.name) % 2 == 1]


def _heldout() -> list[Document]:
    from sedac_hf.evaluation import stdlib_documents

    return stdlib_documents("heldout")


def _hash(name: str) -> int:
    # The split into training and held-out text used the remainder by 20: this uses what is left of the number.
    return int(hashlib.md5(name.encode()).hexdigest(), 16) // 20
