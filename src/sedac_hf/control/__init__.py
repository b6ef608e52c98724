"""Controllers: risk at the checkpoints -> keep level per token.

`CascadeController` is the compiled engine's class, or the NumPy engine's where no compiled module is installed (said
once in the log). It is chosen on first use, so that importing this package loads neither.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sedac_hf.control.base import Controller, ForwardPass
from sedac_hf.errors import ConfigError
from sedac_hf.layer_config import DEFAULT_ALPHA, DEFAULT_CONFIDENCE_DECAY, DEFAULT_N_LEVELS, LayerConfig

if TYPE_CHECKING:
    from sedac_hf.control.rust_engine import RustController as CascadeController

__all__ = ["CascadeController", "Controller", "ForwardPass", "controller_class", "make_controller", "strip_planner"]

logger = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name == "CascadeController":
        return controller_class("auto")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def controller_class(controller: str = "auto") -> type:
    """The class of an engine.

    Args:
        controller: "rust", "python", or "auto": rust where the compiled module can be imported.

    Raises:
        ConfigError: an unknown name, or "rust" without the compiled module.
    """
    if controller not in ("auto", "rust", "python"):
        raise ConfigError(f"`controller` must be 'auto', 'rust' or 'python', got {controller!r}")
    if controller != "python":
        try:
            from sedac_hf.control.rust_engine import RustController

            return RustController
        except ImportError as error:
            if controller == "rust":
                raise ConfigError(
                    f"controller='rust' needs the compiled module sedac_hf._rust, which cannot be imported ({error}); "
                    "build it with `pip install .` or `maturin develop --release`, or use controller='python'"
                ) from error
            logger.warning(
                "sedac_hf._rust is not installed (%s): the slower NumPy controller is used; `pip install .` builds it",
                error,
            )
    from sedac_hf.control.python_engine import PythonController

    return PythonController


def make_controller(
    layer_configs: Sequence[LayerConfig],
    *,
    controller: str = "auto",
    alpha: float = DEFAULT_ALPHA,
    confidence_decay: float = DEFAULT_CONFIDENCE_DECAY,
    soft_exit: bool = True,
    n_levels: int = DEFAULT_N_LEVELS,
) -> Controller:
    """Make a controller of the named engine; the arguments are those of `CascadeController`.

    Args:
        layer_configs: the checkpoints, in layer order.
        controller: "auto", "rust" or "python", see `controller_class`.
        alpha: weight of the new quantile in threshold updates, in [0, 1].
        confidence_decay: gamma of the law, in [0, 1].
        soft_exit: graded ratio; False: an exit skips the whole FFN, and latches.
        n_levels: keep levels that the FFN engines run, 2..64.

    Raises:
        ConfigError: a value out of range, or an engine that is not installed.
    """
    made: Controller = controller_class(controller)(
        layer_configs, alpha=alpha, confidence_decay=confidence_decay, soft_exit=soft_exit, n_levels=n_levels
    )
    return made


def strip_planner(controller: str = "auto") -> Any:
    """The compiled class that cuts sorted batches, for FFN engines; the contract is `ops.strip_plan.StripPlanner`.

    None where the compiled module is missing or ``controller`` is "python": the engines then cut by the same rules in
    Python.

    Raises:
        ConfigError: as `controller_class`.
    """
    from sedac_hf.control.python_engine import PythonController

    if controller_class(controller) is PythonController:
        return None
    from sedac_hf.control.rust_engine import StripPlanner

    return StripPlanner
