"""Makes transformers' Auto classes know SEDAC models as soon as both packages are imported, in either order.

``import sedac_hf`` must stay light, so nothing of transformers is imported for it: where the Auto modules are not
loaded yet, the registration waits for them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _ours(name: str) -> Any:
    """A module of this package, by name: the package's root is below all layers and must not depend on them."""
    return importlib.import_module(f"sedac_hf.{name}")


def _register_config(_: Any) -> None:
    # Registers itself at its end. It may be what is importing the Auto module just now: then it gets there later.
    _ours("configuration")


def _register_model(auto: Any) -> None:
    config = _ours("configuration").SedacConfig

    class SedacForCausalLM:
        """Stands for the model class until it is needed."""

        config_class = config

        @staticmethod
        def from_pretrained(*args: Any, **kwargs: Any) -> Any:
            return _ours("modeling").SedacForCausalLM.from_pretrained(*args, **kwargs)

        @staticmethod
        def _from_config(*args: Any, **kwargs: Any) -> Any:
            return _ours("modeling").SedacForCausalLM._from_config(*args, **kwargs)

    auto.AutoModelForCausalLM.register(config, SedacForCausalLM, exist_ok=True)


_AFTER: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _Loader(importlib.abc.Loader):
    """A module's own loader, and a registration behind it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _AFTER[module.__name__](module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the Auto modules, each once, by the other finders."""

    def __init__(self) -> None:
        self._waiting = set(_AFTER) - set(sys.modules)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)  # so that the search below does not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register() -> None:
    """Register with the Auto modules that are loaded, and with the others when they are."""
    sys.meta_path.insert(0, _Finder())
    for name, after in _AFTER.items():
        if name in sys.modules:
            after(sys.modules[name])
