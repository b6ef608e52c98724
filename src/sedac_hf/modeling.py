"""`SedacForCausalLM`: any Hugging Face decoder, wrapped so that a token computes only part of each FFN."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from sedac_hf.configuration import SedacConfig
from sedac_hf.control import controller_class
from sedac_hf.errors import ConfigError
from sedac_hf.generation import GeneratingModel
from sedac_hf.layer_config import default_layer_configs
from sedac_hf.mirroring import mirrored_members
from sedac_hf.runtime import SedacRuntime
from sedac_hf.saving import bases, hub
from sedac_hf.saving.loading import load_saved
from sedac_hf.saving.reading import commit_of, hub_arguments, read_config
from sedac_hf.saving.writing import save

if TYPE_CHECKING:
    from sedac_hf.calibration import CalibrationReport
    from sedac_hf.ffn.policy import Policy
    from sedac_hf.runtime import SedacStats

logger = logging.get_logger(__name__)

_ADOPTED = (
    "hf_device_map",
    "is_quantized",
    "quantization_method",
    "hf_quantizer",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)


class SedacForCausalLM(GeneratingModel):
    """A causal LM that spends FFN compute on a token in proportion to how hard the token is.

    The base decoder is ``self.model``; attention and KV cache are always complete. Uncalibrated, nothing is skipped.

    Example:
        >>> model = SedacForCausalLM.from_pretrained("any/decoder", device_map="auto")  # doctest: +SKIP
        >>> model.calibrate(tokenizer, texts, max_ppl_increase=0.01)  # doctest: +SKIP
        >>> model.generate(**inputs); model.stats(); model.save_pretrained("my-sedac")  # doctest: +SKIP
    """

    config_class = SedacConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __new__(cls, config: SedacConfig | None = None, base_model: PreTrainedModel | None = None) -> SedacForCausalLM:
        """An object of the class that mirrors the base's signatures (copying calls this without arguments)."""
        if cls is SedacForCausalLM and isinstance(config, SedacConfig):
            base_class: Any = _base_class(config) if base_model is None else type(base_model)
            cls = class_for(base_class)
        made: SedacForCausalLM = super().__new__(cls)
        return made

    def __init__(self, config: SedacConfig, base_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if base_model is None:
            base_model = bases.from_config(config.text_config)
        self.model = base_model
        config.text_config = base_model.config
        for module in base_model.modules():
            module._is_hf_initialized = True  # or post_init would draw modules that somebody replaced anew
        self._is_stateful = base_model._is_stateful
        # The law can run inside a graph where the compiled controller is there to say how.
        capturable = hasattr(controller_class(config.controller), "parameter_block")
        self._can_compile_fullgraph = capturable and bool(getattr(base_model, "_can_compile_fullgraph", False))
        self.main_input_name = base_model.main_input_name
        if getattr(base_model, "generation_config", None) is not None:
            self.generation_config = base_model.generation_config
        for name in _ADOPTED:
            if hasattr(base_model, name):
                setattr(self, name, getattr(base_model, name))
        self.calibration_report: CalibrationReport | None = None
        chosen = () if config.assumes_layers else config.checkpoint_layers
        self.runtime = SedacRuntime(
            base_model,
            chosen or None,
            controller=config.controller,
            engine=config.engine,
            adaptive_thresholds=config.adaptive_thresholds,
            extra_memory=config.extra_memory,
        )
        if config.checkpoint_layers != self.runtime.checkpoint_layers:
            config.layer_configs = [asdict(item) for item in default_layer_configs(self.runtime.checkpoint_layers)]
        self.post_init()
        self.train(base_model.training)

    # ---------------------------------------------------------------- making and saving

    @classmethod
    def from_base(cls, model: PreTrainedModel, config: SedacConfig | None = None) -> SedacForCausalLM:
        """Wrap a model in memory; nothing of it is copied or changed.

        Args:
            model: a causal LM of transformers.
            config: law and choices; its ``text_config`` is replaced by the model's own. Default: the design's law.

        Raises:
            UnsupportedModelError: the model has no FFN that can be cut.
            ConfigError: the model is wrapped already, or the config does not fit it.
        """
        if isinstance(model, SedacForCausalLM):
            raise ConfigError("`model` must be a plain decoder; this one is wrapped already: use it, or `unload()` it")
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"`model` must be a transformers PreTrainedModel, got {type(model).__name__}: of a PEFT model wrap "
                "`get_base_model()`, and compile what is wrapped"
            )
        values = {} if config is None else config.to_sedac_dict()
        return cls(SedacConfig(model.config, **values), base_model=model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        config: SedacConfig | PreTrainedConfig | str | os.PathLike[str] | None = None,
        sedac_config: SedacConfig | None = None,
        base_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a plain decoder (uncalibrated: skips nothing), a saved SEDAC model, or a SEDAC adapter with its base.

        Args:
            pretrained_model_name_or_path: local folder or hub id.
            config: overrides the saved configuration, as in transformers; a `SedacConfig` for a plain decoder is taken
                as ``sedac_config``.
            sedac_config: law and choices for a plain decoder.
            base_model: for an adapter, the base to use (object, folder or id) instead of the one that it names.
            kwargs: passed to the base's ``from_pretrained`` (dtype, device_map, quantization_config, revision, token,
                local_files_only, ...), except for ``ignore_base_mismatch=True``, which takes also a base with other
                weights than the policy was made for.

        Returns:
            The model in eval mode, or ``(model, loading_info)`` with ``output_loading_info=True``.

        Raises:
            LoadError: a file is missing, damaged or does not fit the base, or the base has other weights.
        """
        path = str(pretrained_model_name_or_path)
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ConfigError("sedac-hf reads safetensors only; leave `use_safetensors` out")
        kwargs.pop("adapter_kwargs", None)
        if isinstance(config, SedacConfig) and config.text_config is None:
            config, sedac_config = None, config
        given = config if isinstance(config, PreTrainedConfig) else None
        where = hub_arguments(kwargs)
        found = given or read_config(str(config or path), kwargs.get("trust_remote_code"), **where)
        if isinstance(found, SedacConfig):
            base, revision, info, policy, report = load_saved(path, found, base_model, kwargs)
            model = cls.from_base(base, found)
            if policy is not None:
                model.install(policy)
            model.calibration_report = report
        else:
            if base_model is not None:
                raise ConfigError("`base_model` goes with an adapter; this path holds a plain decoder")
            if given is not None:
                kwargs["config"] = given
            kwargs.pop("ignore_base_mismatch", None)
            base, info = bases.load_weights(path, **{**kwargs, "output_loading_info": True})
            model = cls.from_base(base, sedac_config)
            revision = commit_of(path, **where) or kwargs.get("revision")
            logger.warning_once(
                f"{path} is a plain decoder: the wrapped model is uncalibrated and skips nothing; run `calibrate(...)`"
            )
        model.config.base_revision = revision
        model.name_or_path = path
        model.eval()
        return (model, info) if kwargs.get("output_loading_info") else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        adapter_only: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the whole model, or what is SEDAC's alone, as safetensors and JSON.

        The files are written to a temporary folder first, which then takes the place of an older save; other files in
        the folder stay, a README.md of your own too. Base weights are written in natural channel order.

        Args:
            save_directory: made where it does not exist.
            adapter_only: leave the base's weights out; the adapter names the base and its revision.
            push_to_hub: upload afterwards what was written.
            kwargs: those of transformers' ``save_pretrained``, and with ``push_to_hub`` those of that method.
        """
        if kwargs.pop("safe_serialization", True) is False:
            raise ConfigError("sedac-hf writes safetensors only; leave `safe_serialization` out")
        where = hub.take_arguments(kwargs)
        if not kwargs.get("is_main_process", True):
            return
        if push_to_hub:
            hub.save_and_upload(self, save_directory, where, adapter_only=adapter_only, **kwargs)
        else:
            save(self, save_directory, adapter_only=adapter_only, **kwargs)

    def push_to_hub(
        self, repo_id: str, *, adapter_only: bool = False, max_shard_size: int | str = "50GB", **kwargs: Any
    ) -> Any:
        """Upload the model, or the adapter alone; further arguments and the result as in transformers."""
        where = {**hub.take_arguments(kwargs), "repo_id": repo_id}
        if kwargs:
            raise TypeError(f"push_to_hub takes transformers' arguments and `adapter_only`, got {', '.join(kwargs)}")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model")
            return hub.save_and_upload(self, path, where, adapter_only=adapter_only, max_shard_size=max_shard_size)

    def install(self, policy: Policy) -> None:
        """Run by this policy from now on, and describe it in the configuration."""
        self.uninstall()
        self.runtime.install(policy)
        self.probes = self.runtime.probes
        self.config.take_policy(policy.to_config())

    def uninstall(self) -> None:
        """Drop the policy: the model is uncalibrated again, its base bit for bit as it was."""
        self.runtime.uninstall()
        self._modules.pop("probes", None)
        self.config.drop_policy()

    def unload(self) -> PreTrainedModel:
        """Give the base back, without hooks and with its weights bit for bit as they were."""
        self.uninstall()
        return self.model

    def calibrate(
        self,
        tokenizer: Any,
        texts: Any,
        *,
        max_ppl_increase: float = 0.01,
        share: float | None = None,
        objective: Literal["latency", "throughput"] = "latency",
        **kwargs: Any,
    ) -> CalibrationReport:
        """Fit the policy that skips most while perplexity on held-out calibration text rises by at most the budget.

        See `sedac_hf.calibration.calibrate` for the arguments; statistics are kept, so a second budget is quick. If
        calibration fails, the model stays as it was.
        """
        from sedac_hf.calibration import calibrate

        if self.dtype == torch.float16 and self.device.type == "cpu":
            logger.warning("float16 is several times slower than float32 on a CPU: load with dtype=torch.float32")
        report = calibrate(
            self.runtime,
            tokenizer,
            texts,
            max_ppl_increase=max_ppl_increase,
            share=share,
            objective=objective,
            n_levels=kwargs.pop("n_levels", self.config.n_levels),
            probe_rank=kwargs.pop("probe_rank", self.config.probe_rank),
            **kwargs,
        )
        policy = self.runtime.policy
        assert policy is not None
        self.probes = self.runtime.probes
        self.config.take_policy(policy.to_config())
        self.calibration_report = report
        return report

    # ---------------------------------------------------------------- running

    def __reduce__(self) -> tuple[Any, ...]:
        return _unfilled, (type(self.model),), self.__dict__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward; hooks cut its FFNs. A plain call always cuts (once calibrated)."""
        return self.model(*args, **kwargs)

    @contextmanager
    def disable(self) -> Iterator[SedacForCausalLM]:
        """The base as it was, order and all, for the length of a ``with`` block. Not for concurrent use."""
        with self.runtime.disabled():
            yield self

    def full_width(self) -> AbstractContextManager[None]:
        """Every FFN whole for the length of a ``with`` block; hooks and channel order stay."""
        return self.runtime.full_width()

    def stats(self) -> SedacStats:
        """Totals since the last `reset_stats`: exits per checkpoint, needed and saved share, fail-safe count."""
        return self.runtime.stats()

    def reset_stats(self) -> None:
        """Start the totals of `stats` again from zero."""
        self.runtime.captured.flush()
        self.runtime.tally.reset()

    def print_summary(self) -> None:
        """Print what is attached, the law, the report's main figures and the totals so far."""
        from sedac_hf.runtime.summary import print_summary

        print_summary(self.runtime, self.config.to_sedac_dict(), self.stats())

    # ---------------------------------------------------------------- the base's own parts

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.set_output_embeddings(value)

    def get_decoder(self) -> Any:
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.model.set_decoder(decoder)

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.model.tie_weights(*args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to draw: the base drew its own, probes come from calibration."""


def _unfilled(base_class: Any) -> SedacForCausalLM:
    """What a copy or a pickle is filled into: classes that are made here have no name to be found by."""
    return class_for(base_class).__new__(class_for(base_class))


@functools.cache
def class_for(base_class: Any) -> type[SedacForCausalLM]:
    """`SedacForCausalLM` with the forward and generation signatures of a base class."""
    members = {"__module__": __name__, "__doc__": SedacForCausalLM.__doc__, **mirrored_members(base_class)}
    return type("SedacForCausalLM", (SedacForCausalLM,), members)


def _base_class(config: SedacConfig) -> Any:
    if config.text_config is None:
        raise ConfigError("`text_config` must hold the base decoder's configuration, got None")
    return bases.class_of(config.text_config)


AutoModelForCausalLM.register(SedacConfig, SedacForCausalLM, exist_ok=True)
