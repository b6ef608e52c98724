"""sedac-hf: per-token FFN compute for any Hugging Face decoder.

    >>> from sedac_hf import SedacForCausalLM, load_demo
    >>> base, tokenizer = load_demo()
    >>> model = SedacForCausalLM.from_base(base)

Names are imported when they are first used, so that ``import sedac_hf`` is quick; it also makes the Auto classes of
transformers know saved SEDAC models.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sedac_hf.registration import register as _register

if TYPE_CHECKING:
    from sedac_hf.assets import demo_path, load_demo
    from sedac_hf.calibration import CalibrationReport, calibrate
    from sedac_hf.configuration import SedacConfig
    from sedac_hf.control import CascadeController
    from sedac_hf.errors import (
        CalibrationError,
        ConfigError,
        ControllerError,
        EvaluationError,
        LoadError,
        SedacError,
        UnsupportedModelError,
    )
    from sedac_hf.evaluation.perplexity import perplexity
    from sedac_hf.ffn.registry import register_ffn_site, unregister_ffn_site
    from sedac_hf.layer_config import LayerConfig
    from sedac_hf.modeling import SedacForCausalLM
    from sedac_hf.outputs import CascadeDecisions, ExitDecision
    from sedac_hf.runtime import SedacRuntime, SedacStats

__version__ = "0.1.0"

_HOMES = {
    "CalibrationError": "errors",
    "CalibrationReport": "calibration",
    "CascadeController": "control",
    "CascadeDecisions": "outputs",
    "ConfigError": "errors",
    "ControllerError": "errors",
    "EvaluationError": "errors",
    "ExitDecision": "outputs",
    "LayerConfig": "layer_config",
    "LoadError": "errors",
    "SedacConfig": "configuration",
    "SedacError": "errors",
    "SedacForCausalLM": "modeling",
    "SedacRuntime": "runtime",
    "SedacStats": "runtime",
    "UnsupportedModelError": "errors",
    "calibrate": "calibration",
    "demo_path": "assets",
    "load_demo": "assets",
    "perplexity": "evaluation",
    "register_ffn_site": "ffn.registry",
    "unregister_ffn_site": "ffn.registry",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_register()
