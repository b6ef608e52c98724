"""`generate` of a wrapped decoder: one choice per call, and decode steps by a captured graph where it compiles."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedModel

from sedac_hf.configuration import SedacConfig
from sedac_hf.errors import ConfigError
from sedac_hf.runtime import SedacRuntime, generating


class GeneratingModel(PreTrainedModel, GenerationMixin):
    """A wrapped decoder's part in transformers' generation; `SedacForCausalLM` has the rest."""

    config: SedacConfig
    model: PreTrainedModel
    runtime: SedacRuntime

    @torch.no_grad()
    def generate(self, *args: Any, consistent: bool = False, prompt: str | None = None, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`, all modes, with two arguments more.

        With ``cache_implementation="static"`` decode steps are compiled, on a GPU always and on a CPU where a
        ``compile_config`` is given (`transformers.CompileConfig`; it takes a C++ compiler).

        Args:
            consistent: cut as calibrated even where that does not pay; default: one measured choice per call.
            prompt: "full": prompt tokens run at full width; "cut": as all others. Default: the configuration's, else
                "full" for `select`, and for `truncate` "cut" where that was measured to pay.
        """
        prompt = prompt or self.config.prompt or ("full" if self.config.cut == "select" else None)
        if prompt not in ("full", "cut", None):
            raise ConfigError(f"`prompt` must be 'full' or 'cut', got {prompt!r}")
        full_prompt = None if prompt is None else prompt == "full"
        call = self.runtime.generation_call(*_batch_of(args, kwargs), consistent=consistent, full_prompt=full_prompt)
        run = super().generate
        if type(self.model).generate is not GenerationMixin.generate:
            run = self.model.generate
        with generating(call):
            return run(*args, **kwargs)

    def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        # Transformers compiles nothing on a CPU unless told to by this flag. There a graph has our kernels inside and
        # none of the Python around them, so a `compile_config` that was given is taken at its word.
        if generation_config.compile_config is not None and self.device.type == "cpu":
            generation_config.compile_config = copy.copy(generation_config.compile_config)
            generation_config.compile_config._compile_all_devices = True
        compiles: bool = super()._valid_auto_compile_criteria(model_kwargs, generation_config)
        return compiles

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` runs decode steps with where it compiles: one graph, the law on the device inside it."""
        if getattr(self, "_compiled_for", None) != id(self):  # a copy of the model holds the other one's graph
            self.__dict__.pop("_compiled_call", None)
            self._compiled_for = id(self)
        self.runtime.choose_for_graphs()
        return self.runtime.captured.around(super().get_compiled_call(compile_config), self.__call__)


def _batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, prompt length) of a ``generate`` call; rows count what one decode step computes (beams, sequences)."""
    tensor = kwargs.get("inputs_embeds")
    if tensor is None:
        tensor = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return 1, 0
    settings = kwargs.get("generation_config")

    def setting(name: str) -> int:
        return int(kwargs.get(name) or getattr(settings, name, None) or 1)

    return tensor.shape[0] * max(setting("num_beams"), setting("num_return_sequences")), tensor.shape[1]
