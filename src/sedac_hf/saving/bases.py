"""Loading the base decoder of a wrapped model, by its own class and with one kind of error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module, resolve_trust_remote_code
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sedac_hf.errors import LoadError, SedacError
from sedac_hf.saving.reading import hub_arguments, read_config

# What damaged weights or a configuration with values that no model can be made of lead to in transformers.
_FAILURES = (
    *(SafetensorError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError),
    *(LookupError, ArithmeticError, StrictDataclassError),
)


def class_of(config: PreTrainedConfig) -> Any:
    """The class of the plain decoder with this configuration.

    A decoder that is part of a composite model goes by the composite's configuration in `AutoModelForCausalLM`: its
    own one leads nowhere there, but says in ``architectures`` which of those classes it is for. Composite models that
    are not there are in `AutoModelForMultimodalLM`.

    Raises:
        LoadError: no such class is known or named.
    """
    found = _auto_class_of(config)
    named = None if found is not None else next(iter(getattr(config, "architectures", None) or ()), None)
    if named is not None and any(named in _names(value) for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        found = getattr(transformers, named, None)
    if found is None and not getattr(config, "is_encoder_decoder", False):
        found = _auto_class_of(config, AutoModelForMultimodalLM)
    if found is None:
        raise LoadError(
            f"a {type(config).__name__} must be a configuration that AutoModelForCausalLM knows, or a decoder's that "
            f"AutoModelForMultimodalLM knows, or name one of the former's classes in `architectures`; got {named!r}: "
            "load the decoder of a causal language model"
        )
    return found


def from_config(config: PreTrainedConfig) -> Any:
    """A decoder with new weights, of the class that `class_of` gives."""
    if _auto_class_of(config) is not None:
        return AutoModelForCausalLM.from_config(config)
    return class_of(config)._from_config(config)


def of_its_class(config: PreTrainedConfig, path: str, kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """A base's configuration, by the class in the code beside its weights where it has none of transformers'.

    Raises:
        LoadError: the code is missing, or ``trust_remote_code`` is not given.
    """
    if type(config) is not PreTrainedConfig:
        return config
    try:
        resolve_trust_remote_code(kwargs.get("trust_remote_code"), path, False, True)
        kind = get_class_from_dynamic_module(config.auto_map["AutoConfig"], path, **hub_arguments(kwargs))
    except (OSError, ValueError) as error:
        raise LoadError(f"the configuration of the base in {path} cannot be read: {error}") from error
    kind.register_for_auto_class()  # its code is saved with it
    return cast(PreTrainedConfig, kind(**{name: value for name, value in vars(config).items() if name[0] != "_"}))


def _auto_class_of(config: PreTrainedConfig, auto_class: Any = AutoModelForCausalLM) -> Any | None:
    try:
        found = auto_class._model_mapping[type(config)]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple | list) else found


def _names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def load_weights(path: str, **kwargs: Any) -> Any:
    """A plain decoder by its own class, with one kind of error; weights that are missing are an error too.

    Returns:
        The model, or ``(model, loading_info)`` with ``output_loading_info=True``.

    Raises:
        LoadError: weight files are damaged, have other shapes, or lack weights of the model; or no model can be made
            with this configuration and these arguments.
    """
    wanted = kwargs.pop("output_loading_info", False)
    try:
        model, info = _from_pretrained(path, output_loading_info=True, **kwargs)
    except SedacError:
        raise
    except _FAILURES as error:
        raise LoadError(f"the base weights in {path} cannot be loaded: {type(error).__name__}: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing and not kwargs.get("ignore_mismatched_sizes"):
        raise LoadError(
            f"the base weights in {path} must be complete; {len(missing)} are missing and would be random numbers: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return (model, info) if wanted else model


def _from_pretrained(path: str, **kwargs: Any) -> Any:
    """What `AutoModelForCausalLM` makes of a folder or id, or `class_of` where that knows no such configuration."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except ValueError:
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = read_config(str(config or path), kwargs.get("trust_remote_code"), **hub_arguments(kwargs))
        if _auto_class_of(config) is not None or getattr(config, "auto_map", None):
            raise
        return class_of(config).from_pretrained(path, **kwargs)
