"""Members that make a wrapper class look like its base to `generate` and to everyone who reads signatures.

`GenerationMixin` looks arguments up in the signatures of ``forward`` and ``prepare_inputs_for_generation``, and calls
further methods that some models override; a wrapper with signatures of its own loses arguments silently.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

# What `generate` asks of a model class beyond `forward`; the base's own version of each must be the one that runs.
_DELEGATED = (
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_prepare_position_ids_for_generation",
    "_update_model_kwargs_for_generation",
    "_reorder_cache",
    "_expand_inputs_for_generation",
    "_get_initial_cache_position",
)
_COPIED = ("_supports_default_dynamic_cache", "_is_stateful", "_no_split_modules")


def mirrored_members(base_class: type[Any]) -> dict[str, Any]:
    """Class members of a wrapper that holds a ``base_class`` object as ``self.model``."""
    members = {name: getattr(base_class, name) for name in _COPIED if hasattr(base_class, name)}
    for name in ("forward", *_DELEGATED):
        if hasattr(base_class, name) and not _is_static(base_class, name):
            members[name] = _delegating(base_class, name)
    return members


def _delegating(base_class: type[Any], name: str) -> Any:
    original = getattr(base_class, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # through the object, so that hooks run (forward) and overrides of the object count
        return self.model(*args, **kwargs) if name == "forward" else getattr(self.model, name)(*args, **kwargs)

    method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return method


def _is_static(base_class: type[Any], name: str) -> bool:
    return isinstance(inspect.getattr_static(base_class, name), staticmethod | classmethod)
