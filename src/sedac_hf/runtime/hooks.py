"""Attach to a model and let go of it again: the only file that changes foreign modules.

Two kinds of change exist: PyTorch hooks, and replaced ``forward`` methods of single modules. Both are recorded and
undone in reverse order; if one cannot be made, those already made are undone before the error leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from sedac_hf.errors import ConfigError

_PLACES = ("forward", "_old_forward")  # the latter is accelerate's, in modules that it has hooked
_HOOK_ID = -1  # PyTorch counts up from 0


class Attachment:
    """What has been changed on a model, and how to undo it."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, str, bool, Any, Callable[..., Any]]] = []
        self._idle: list[tuple[nn.Module, Callable[..., Any]]] = []

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
        _rename(module, self._handles[-1])

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
            self._replaced.append((module, name, own, module.__dict__.get(name), forward))
            setattr(module, name, forward)

    def put_aside(self, modules: Collection[nn.Module]) -> None:
        """Have these modules run their own forwards until `put_back`; those that accelerate has hooked stay."""
        wanted = {id(module) for module in modules if not hasattr(module, "_hf_hook")}
        for module, name, own, value, ours in reversed(self._replaced):
            if id(module) in wanted and name == "forward" and module.__dict__.get(name) == ours:
                self._idle.append((module, ours))
                if own:
                    module.__dict__[name] = value
                else:
                    del module.__dict__[name]

    def put_back(self) -> None:
        """Undo `put_aside`."""
        while self._idle:
            module, ours = self._idle.pop()
            # Accelerate may have hooked the module since.
            setattr(module, _PLACES[1] if hasattr(module, "_hf_hook") else _PLACES[0], ours)

    def detach(self) -> None:
        """Undo everything; calling it twice is harmless."""
        self.put_back()
        while self._handles:
            self._handles.pop().remove()
        while self._replaced:
            module, name, own, value, ours = self._replaced.pop()
            place = next((place for place in _PLACES if module.__dict__.get(place) == ours), name)
            if own:
                setattr(module, place, value)
            elif place == name:
                module.__dict__.pop(name, None)
            else:  # accelerate has hooked the module since, and keeps there what it runs
                setattr(module, place, type(module).forward.__get__(module))


def _rename(module: nn.Module, handle: RemovableHandle) -> None:
    """Have a hook that is always called go by an id that it has at each attachment: graphs guard on that number, and
    would be compiled again for a model that was only disabled in between."""
    hooks, always = module._forward_hooks, module._forward_hooks_always_called
    if _HOOK_ID not in hooks:
        hooks[_HOOK_ID], always[_HOOK_ID] = hooks.pop(handle.id), always.pop(handle.id)
        handle.id = _HOOK_ID


class Whereabouts:
    """Where modules sit in a model, to notice those that somebody has put another module in front of since.

    Such a module (an adapter of PEFT, say) would be passed by, as the weights behind it are read directly.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        sought = {id(module) for module in modules}
        self._seen = [
            (parent, name, child, f"{path}.{name}" if path else name)
            for path, parent in model.named_modules()
            for name, child in parent._modules.items()
            if id(child) in sought
        ]

    def check(self) -> None:
        """Raise ConfigError if one of them is not where it was."""
        for parent, name, child, path in self._seen:
            now = parent._modules.get(name)
            if now is not child:
                raise ConfigError(
                    f"the FFNs must be those that the model was wrapped with; {path!r} has been replaced by "
                    f"{type(now).__name__}: `unload()`, change the base, and wrap it then"
                )
