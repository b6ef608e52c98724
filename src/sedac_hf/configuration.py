"""`SedacConfig`: the configuration of a wrapped model."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from sedac_hf.base_configuration import config_of, implementations, look_at_unknown
from sedac_hf.environment import environment_decay, environment_soft_exit
from sedac_hf.errors import ConfigError
from sedac_hf.layer_config import (
    DEFAULT_ALPHA,
    DEFAULT_CONFIDENCE_DECAY,
    DEFAULT_N_LEVELS,
    LayerConfig,
    default_checkpoint_layers,
    default_layer_configs,
    layer_config,
)

DEFAULT_EXTRA_MEMORY = 0.1
SHADOW_BITS = (4, 3, 2)
"""Bits that a shadow may have, best first; 0 stands for none: the exact gate decides."""

_MOST_PROBE_RANK = 64

Cut = Literal["mask", "truncate", "select"]
Objective = Literal["latency", "throughput"]


def default_probe_rank(hidden_size: int) -> int:
    """64, less in a narrow decoder, where probes of that rank would cost more than they bring."""
    return min(_MOST_PROBE_RANK, max(hidden_size // 12, 4))


def check_extra_memory(value: float) -> float:
    """The cap on extra memory, or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f"`extra_memory` must be a finite share of the base's bytes of 0 or more, e.g. 0.1, got {value!r}"
        )
    return float(value)


class SedacConfig(PreTrainedConfig):
    """Configuration of a wrapped decoder.

    Args:
        text_config: configuration of the base decoder (object or dict with its ``model_type``).
        layer_configs: the law, one `LayerConfig` (or dict) per checkpoint layer, ascending; default: three checkpoints
            with the design document's values, changed by the ``SEDAC_*`` environment variables. Default places are
            corrected when a decoder is wrapped that has another number of layers than its configuration says.
        alpha: smoothing of threshold updates, in [0, 1].
        confidence_decay: gamma of the law, in [0, 1].
        soft_exit: True: graded ratio; False: hard exit (skip the whole FFN, latched).
        n_levels: number of keep levels that the engines run.
        probe_rank: rank of the probes' projection; None: `default_probe_rank`.
        cut: how FFNs are cut: "mask", "truncate" or "select"; None until calibrated.
        objective: "latency" or "throughput", what the policy was calibrated for; None until calibrated.
        schedule: operating points per FFN and level, as `WidthSchedule.to_dict` gives it; None until calibrated: an
            uncalibrated model skips nothing.
        risk_scale: x0 of the risk unit per checkpoint, in nats: a sixteenth of the median KL on the calibration text.
        prompt: "full" or "cut": how the prompt runs inside ``generate``; None: "full" for "select", else "cut"
            where that pays.
        adaptive_thresholds: follow the traffic's risk quantiles at inference (outputs then depend on earlier traffic).
        controller: "auto", "rust" or "python".
        engine: "auto", or the name of an FFN engine: "reference", "strips", "gather", "rust" or "triton".
        extra_memory: most bytes that shadow, compensation, probes and orders may take together, as a share of the
            base's; at calibration it decides the shadow's bits and the compensation's rank (see
            `sedac_hf.runtime.memory`).
        shadow_bits: of the shadow that a policy which selects was calibrated with: 4, 3, 2, or 0 (the exact gate).
        base_model_name_or_path, base_revision: where an adapter finds its base.
        base_fingerprint: of the weights that the policy was made for (`sedac_hf.saving.fingerprint`).
        kwargs: those of `PreTrainedConfig`. As there, others are kept as attributes; one that is nearly the name of an
            argument above is an error, another that no configuration knows a warning.

    Raises:
        ConfigError: a value is out of range, or an environment variable cannot be read.
    """

    model_type = "sedac"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - the form that transformers reads
    is_composition = True
    has_no_defaults_at_init = True

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        layer_configs: Sequence[LayerConfig | Mapping[str, Any]] | None = None,
        alpha: float = DEFAULT_ALPHA,
        confidence_decay: float | None = None,
        soft_exit: bool | None = None,
        n_levels: int = DEFAULT_N_LEVELS,
        probe_rank: int | None = None,
        cut: Cut | None = None,
        objective: Objective | None = None,
        schedule: Mapping[str, Any] | None = None,
        risk_scale: Sequence[float] | None = None,
        prompt: Literal["full", "cut"] | None = None,
        adaptive_thresholds: bool = False,
        controller: str = "auto",
        engine: str = "auto",
        extra_memory: float = DEFAULT_EXTRA_MEMORY,
        shadow_bits: int = SHADOW_BITS[0],
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        base_config: Any = text_config
        if isinstance(base_config, Mapping):
            if "model_type" not in base_config:
                raise ConfigError("`text_config` must name the base decoder's `model_type`, got a dict without it")
            base_config = config_of(base_config)
        self.text_config = base_config
        if schedule is not None and None in (layer_configs, confidence_decay, soft_exit, cut, objective, risk_scale):
            raise ConfigError(
                "a calibrated configuration (one with a `schedule`) must hold `layer_configs`, `confidence_decay`, "
                "`soft_exit`, `cut`, `objective` and `risk_scale`; one of them is missing: is the file cut short?"
            )
        base = None if base_config is None else base_config.get_text_config(decoder=True)
        if layer_configs is None:
            layer_configs = default_layer_configs(_assumed_layers(base))
        self.layer_configs = [dataclasses.asdict(layer_config(item)) for item in layer_configs]
        self.alpha = alpha
        decay = environment_decay() if confidence_decay is None else confidence_decay
        self.confidence_decay = DEFAULT_CONFIDENCE_DECAY if decay is None else decay
        soft = environment_soft_exit() if soft_exit is None else soft_exit
        self.soft_exit = True if soft is None else soft
        self.n_levels = n_levels
        self.probe_rank = probe_rank
        self.cut = _one_of("cut", cut, ("mask", "truncate", "select"), optional=True)
        self.objective = _one_of("objective", objective, ("latency", "throughput"), optional=True)
        self.schedule = None if schedule is None else dict(schedule)
        self.risk_scale = None if risk_scale is None else [float(value) for value in risk_scale]
        self.prompt = _one_of("prompt", prompt, ("full", "cut"), optional=True)
        self.adaptive_thresholds = adaptive_thresholds
        self.controller = _one_of("controller", controller, ("auto", "rust", "python"))
        self.engine = _one_of("engine", engine, ("auto", "reference", "strips", "gather", "rust", "triton"))
        self.extra_memory = check_extra_memory(extra_memory)
        self.shadow_bits = _one_of("shadow_bits", shadow_bits, (*SHADOW_BITS, 0))
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        if base_config is not None:
            # The setters recurse into nested configurations: one value for all, or none, would overwrite theirs.
            for kind in ("attn", "experts"):
                if kwargs.get(f"{kind}_implementation") is None:
                    nested = implementations(base_config, f"_{kind}_implementation")
                    # Some classes take a mapping for none of their own.
                    own = nested if len(nested) > 1 else nested[""]
                    kwargs[f"{kind}_implementation"] = {"": nested[""], "text_config": own}
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "is_encoder_decoder", "dtype"):
                value = getattr(base, name, None)
                if value is not None:
                    kwargs.setdefault(name, value)
        kwargs["tie_word_embeddings"] = False  # the base ties its own
        look_at_unknown(kwargs, _OWN_ARGUMENTS, _EXPOSED)
        super().__init__(**kwargs)

    def to_sedac_dict(self) -> dict[str, Any]:
        """The arguments of this class other than ``text_config``, with their present values."""
        return {name: getattr(self, name) for name in _OWN_ARGUMENTS}

    def take_policy(self, values: Mapping[str, Any]) -> None:
        """Describe an installed policy (`Policy.to_config`)."""
        for name, value in values.items():
            setattr(self, name, value)

    def drop_policy(self) -> None:
        """Be uncalibrated again; the law stays as the starting point of the next calibration."""
        self.cut = self.objective = self.schedule = self.risk_scale = None

    @property
    def cascade(self) -> tuple[LayerConfig, ...]:
        """The law as validated `LayerConfig` objects."""
        return tuple(layer_config(item) for item in self.layer_configs)

    @property
    def checkpoint_layers(self) -> tuple[int, ...]:
        """Decoder layers with a probe, ascending."""
        return tuple(item["layer_idx"] for item in self.layer_configs)

    @property
    def assumes_layers(self) -> bool:
        """Whether the checkpoints are where a default puts them by the number of layers that the base's configuration
        names: the decoder itself may have another (layers that run in loops are counted several times)."""
        base = None if self.text_config is None else self.text_config.get_text_config(decoder=True)
        return not self.calibrated and self.checkpoint_layers == _assumed_layers(base)

    @property
    def calibrated(self) -> bool:
        """Whether there is a policy; without one nothing is skipped."""
        return self.schedule is not None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base decoder's own text config (caches and generation size themselves by it)."""
        if self.text_config is None:
            return self
        found: PreTrainedConfig = self.text_config.get_text_config(decoder=decoder, encoder=encoder)
        return found

    def __getattr__(self, name: str) -> Any:
        # Tools size batches and caches by hidden_size, vocab_size, max_position_embeddings, ...: answer for the base.
        if name.startswith("_") or name in ("text_config", "per_layer_config"):
            raise AttributeError(name)
        text_config = self.__dict__.get("text_config")
        if text_config is not None and name in _EXPOSED:
            return getattr(text_config.get_text_config(decoder=True), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


_OWN_ARGUMENTS = tuple(
    name
    for name in inspect.signature(SedacConfig.__init__).parameters
    if name not in ("self", "text_config", "kwargs")
)
_EXPOSED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def _assumed_layers(base: PreTrainedConfig | None) -> tuple[int, ...]:
    """Default checkpoints of a decoder that was not looked at; none where its configuration names no layers."""
    n_layers = getattr(base, "num_hidden_layers", None)
    return default_checkpoint_layers(n_layers) if isinstance(n_layers, int) and n_layers > 0 else ()


def _one_of(name: str, value: Any, allowed: tuple[Any, ...], *, optional: bool = False) -> Any:
    if (optional and value is None) or value in allowed:
        return value
    raise ConfigError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}")


AutoConfig.register(SedacConfig.model_type, SedacConfig, exist_ok=True)
