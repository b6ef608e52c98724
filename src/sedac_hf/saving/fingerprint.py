"""Whether a base has the weights that a policy was made for: a few numbers of each parameter, compared.

Eight values of every parameter are kept, at places that follow from its shape alone. They are compared after both
sides are rounded to both types, so that the same base in bfloat16, float16 or float32 is the same, and one that was
trained further is not, unless all that changed lies between the values kept or below the rounding. A quantised weight
is compared by its dequantised values within half their size: that tells another base, but no light fine-tune, from
quantisation (what such a base leaves in floating point, often embeddings and norms, is compared as ever). Not
compared: weights packed in a form without numbers (4-bit), sharded or offloaded ones, and parameters that one side
alone has by that name.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import LoadError
from sedac_hf.ffn.sharded import is_sharded
from sedac_hf.ops.contract import dense, is_ordinary

logger = logging.get_logger(__name__)

VALUES = 8
QUANTISED = "quantised"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STRIDES = (2654435761, 2246822519, 3266489917, 668265263)  # large primes: places spread over each dimension
_MOST_OFF = 0.5  # of a quantised weight's values, relative to their size; 4-bit rounding is a sixth
_MIXED_RTOL, _MIXED_ATOL = 2.0**-7, 2.0**-24  # between float16 and bfloat16, neither of which holds the other


@dataclass(frozen=True)
class Sample:
    """Of one parameter. dtype: name of the floating type that it is kept in, or "quantised"; values: float32
    [VALUES] on the CPU."""

    shape: tuple[int, ...]
    dtype: str
    values: Tensor


class Fingerprint(dict[str, Sample]):
    """Samples by the name of the parameter."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits for people; the same for float32 and bfloat16 copies of a base, not for quantised
        ones."""
        made = hashlib.sha256()
        for name, item in sorted(self.items()):
            made.update(f"{name} {list(item.shape)} {item.dtype == QUANTISED}\n".encode())
            made.update(item.values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
        return made.hexdigest()[:16]

    def to_json(self) -> str:
        """One line per parameter; values as the hexadecimal digits of little-endian float32."""
        lines = [
            f"{json.dumps(name)}: {json.dumps([list(item.shape), item.dtype, _hex(item.values)])}"
            for name, item in self.items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Read `to_json`'s form.

        Raises:
            ValueError, TypeError: it is another form.
        """
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, got {type(content).__name__}")
        return cls((name, _sample(item)) for name, item in content.items())


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """Of the weights as they are now, which must be in natural order."""
    parts: dict[torch.device, list[tuple[str, tuple[int, ...], str, Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            read = _read(parameter.detach())
            if read is not None:
                parts[read[1].device].append((name, tuple(parameter.shape), *read))
    found: dict[str, Sample] = {}
    for items in parts.values():
        values = torch.stack([item[3] for item in items]).cpu()
        found |= {name: Sample(shape, kind, row) for (name, shape, kind, _), row in zip(items, values, strict=True)}
    return Fingerprint((name, found[name]) for name, _ in model.named_parameters() if name in found)


def differences(expected: Mapping[str, Sample], found: Mapping[str, Sample]) -> tuple[list[str], int]:
    """What differs, in words, shapes first, and how many parameters were compared."""
    common = [name for name in expected if name in found]
    common.sort(key=lambda name: expected[name].shape == found[name].shape)
    pairs = ((name, _difference(expected[name], found[name])) for name in common)
    return [f"{name}: {what}" for name, what in pairs if what is not None], len(common)


def check_base(expected: Fingerprint, base: PreTrainedModel, config: SedacConfig, path: str, *, ignore: bool) -> None:
    """Refuse a base whose weights are not those that the save at ``path`` was made with.

    Args:
        config: the saved configuration, which names the base.
        ignore: warn instead.

    Raises:
        LoadError: they differ.
    """
    found = fingerprint_of(base)
    wrong, compared = differences(expected, found)
    if not compared:
        logger.warning_once(
            f"no weight of the base of {path} can be compared with its fingerprint: it is taken as it is"
        )
    if not wrong:
        return
    named = config.base_model_name_or_path or "the weights in the same folder"
    revision = f", revision {config.base_revision}" if config.base_revision else ""
    message = (
        f"{path} was made for the base {named}{revision}, fingerprint {expected.digest}; got other weights, from "
        f"{base.name_or_path or 'memory'}, fingerprint {found.digest}: {len(wrong)} of {compared} parameters differ "
        f"({'; '.join(wrong[:2])}{'; ...' if len(wrong) > 2 else ''})"
    )
    if not ignore:
        raise LoadError(
            f"{message}. Load that base, or calibrate this one; `ignore_base_mismatch=True` goes on anyway"
        )
    logger.warning(f"{message}; `ignore_base_mismatch=True`: quality is not what was calibrated")


def _read(weight: Tensor) -> tuple[str, Tensor] | None:
    """The type and float32 [VALUES] of a parameter; None where its numbers cannot be seen from here."""
    if is_sharded(weight):
        sharded: Any = weight
        if not all(placement.is_replicate() for placement in sharded.placements):
            return None
        weight = sharded.to_local()
    if weight.is_meta or weight.dtype not in _DTYPES or weight.numel() == 0:
        return None
    places = [
        [(i + 1) * stride % size for i in range(VALUES)]
        for size, stride in zip(weight.shape, _STRIDES * 2, strict=False)
    ]
    if is_ordinary(weight):
        index = tuple(torch.tensor(place, device=weight.device) for place in places)
        values = weight[index] if index else weight.expand(VALUES)
        return str(weight.dtype).removeprefix("torch."), values.float()
    try:
        rows = [dense(weight[row : row + 1])[0] for row in places[0]]
        values = torch.stack([row[tuple(place[i] for place in places[1:])] for i, row in enumerate(rows)])
        return QUANTISED, values.float()
    except Exception:  # whatever a foreign class raises, its numbers cannot be seen
        return None


def _difference(expected: Sample, found: Sample) -> str | None:
    if expected.shape != found.shape:
        return f"shape {list(expected.shape)} expected, got {list(found.shape)}"
    a, b = expected.values, found.values
    if torch.allclose(a, b, 0.0, 0.0, equal_nan=True):
        return None
    if QUANTISED in (expected.dtype, found.dtype):
        off = float((a - b).norm() / a.norm().clamp(min=1e-12))
        return None if off <= _MOST_OFF else f"values differ by {off:.0%} of their size"
    types = (expected.dtype, found.dtype)
    for name in types:
        a, b = (values.to(getattr(torch, name)).float() for values in (a, b))
    mixed = set(types) == {"float16", "bfloat16"}
    if torch.allclose(a, b, _MIXED_RTOL if mixed else 0.0, _MIXED_ATOL if mixed else 0.0, equal_nan=True):
        return None
    worst = int((a - b).abs().nan_to_num(float("inf")).argmax())
    return f"{float(a[worst]):.6g} expected, got {float(b[worst]):.6g} ({' as '.join(dict.fromkeys(types))})"


def _hex(values: Tensor) -> str:
    return values.numpy().astype("<f4").tobytes().hex()


def _sample(item: Any) -> Sample:
    shape, dtype, digits = item
    values = np.frombuffer(bytes.fromhex(digits), "<f4").astype(np.float32)
    if values.shape != (VALUES,) or dtype not in (QUANTISED, *(str(d).removeprefix("torch.") for d in _DTYPES)):
        raise ValueError(f"{VALUES} values of a known type are needed, got {len(values)} of {dtype!r}")
    return Sample(tuple(int(size) for size in shape), dtype, torch.from_numpy(values))
