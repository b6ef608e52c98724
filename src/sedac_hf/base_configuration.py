"""What `SedacConfig` asks of the configurations of others: of the base's, and of transformers' own arguments."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging

from sedac_hf.errors import ConfigError

logger = logging.get_logger(__name__)

# Arguments of every configuration of transformers that are not among its fields.
_TRANSFORMERS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
    *("tie_word_embeddings", "use_cache", "attn_implementation", "experts_implementation", "name_or_path"),
    *("torch_dtype", "quantization_config", "distributed_config", "auto_map", "per_layer_config"),
)


def look_at_unknown(kwargs: Mapping[str, Any], own: Collection[str], exposed: Collection[str]) -> None:
    """Refuse keys that are misspelt arguments of `SedacConfig`; warn of others that no configuration has.

    own: names of its arguments; exposed: of the base's fields that it shows as its own.
    """
    known = {*PreTrainedConfig.__dataclass_fields__, *_TRANSFORMERS, *exposed}
    for name in sorted(name for name in kwargs if name not in known and not hasattr(PreTrainedConfig, name)):
        likely = difflib.get_close_matches(name, (*own, "text_config"), n=1, cutoff=0.8)
        if likely:
            raise ConfigError(f"a SedacConfig has no `{name}`: did you mean `{likely[0]}`?")
        if not name.startswith("_"):
            logger.warning_once(
                f"a SedacConfig has no `{name}`: it is kept as an attribute and changes nothing. Was it saved by a "
                "newer sedac-hf?"
            )


def config_of(values: Mapping[str, Any]) -> PreTrainedConfig:
    """A decoder's configuration; of one whose class is in the code that comes with its weights, the values alone."""
    if values["model_type"] not in CONFIG_MAPPING and "AutoConfig" in (values.get("auto_map") or {}):
        return PreTrainedConfig(**values)
    return AutoConfig.for_model(**values)


def implementations(config: PreTrainedConfig, name: str) -> dict[str, Any]:
    """A configuration's choice of implementation and those of the ones nested in it, in the form that setters take."""
    found: dict[str, Any] = {"": getattr(config, name, None)}
    for part in config.sub_configs:
        nested = getattr(config, part, None)
        if nested is not None:
            found[part] = implementations(nested, name)
    return found
