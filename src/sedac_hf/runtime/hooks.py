"""Attach to a model and let go of it again: the only file that changes foreign modules.

Two kinds of change exist: PyTorch hooks, and replaced ``forward`` methods of single modules. Both are recorded and
undone in reverse order; if one cannot be made, those already made are undone before the error leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attachment:
    """What has been changed on a model, and how to undo it."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, str, bool, Any]] = []

    def __len__(self) -> int:
        return len(self._handles) + len(self._replaced)

    def around_forward(
        self,
        module: nn.Module,
        before: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None],
        after: Callable[[nn.Module, tuple[Any, ...], Any], None],
    ) -> None:
        """Call ``before`` and ``after`` around each forward of a module, ``after`` also when the forward raises."""
        self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def after_forward(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], None]) -> None:
        """Show a module's output to ``hook``, which must not change it."""
        self._handles.append(module.register_forward_hook(hook))

    def before_forward(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...]], None]) -> None:
        """Show a module's positional inputs to ``hook``, which must not change them."""
        self._handles.append(module.register_forward_pre_hook(hook))

    def replace_forwards(self, replacements: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> None:
        """Replace the forward of single modules.

        A module that accelerate has hooked runs its class's forward as ``_old_forward``, with its weights brought
        to the device around it: there the replacement goes, so that offloaded weights are real when it runs.
        """
        for module, forward in replacements:
            name = "_old_forward" if hasattr(module, "_hf_hook") and hasattr(module, "_old_forward") else "forward"
            own = name in module.__dict__
            self._replaced.append((module, name, own, module.__dict__.get(name)))
            setattr(module, name, forward)

    def detach(self) -> None:
        """Undo everything; calling it twice is harmless."""
        while self._handles:
            self._handles.pop().remove()
        while self._replaced:
            module, name, own, value = self._replaced.pop()
            if own:
                setattr(module, name, value)
            else:
                module.__dict__.pop(name, None)
