"""YAML recipes (`--config FILE`): named arguments of `calibrate`, and the laws that serve as baselines.

A recipe is a flat mapping. Unknown keys are rejected by name; a flag given on the command line wins over the file.
Two kinds exist, told apart by their keys:

- a calibration recipe holds arguments of `sedac_hf.calibration.calibrate` (``configs/balanced.yaml``);
- a law recipe holds an uncalibrated law, i.e. arguments of the controller (``configs/v6_1.yaml``). In its
  ``layer_configs`` the place of a checkpoint is either ``layer_idx`` or ``depth``, a share of the decoder's layers, so
  that one file serves decoders of any depth.

Either may hold ``extra_memory``, an argument of `sedac_hf.SedacConfig`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from sedac_hf.errors import ConfigError

if TYPE_CHECKING:
    from sedac_hf.layer_config import LayerConfig

CALIBRATION_KEYS = frozenset(
    {
        "max_ppl_increase", "share", "objective", "seed", "context", "confidence", "n_levels", "checkpoint_layers",
        "probe_rank", "fit_tokens", "held_out_tokens",
    }
)  # fmt: skip
LOADING_KEYS = frozenset({"extra_memory"})
"""Of the wrapper; either kind of recipe may have them."""

LAW_KEYS = frozenset({"layer_configs", "confidence_decay", "soft_exit", "alpha", "n_levels"})
LAYER_KEYS = frozenset(
    {"depth", "layer_idx", "target_exit_rate", "initial_threshold", "confidence_weight", "quantile"}
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML recipe; flags given beside it win.")
]


class RecipeError(ConfigError):
    """A recipe file cannot be read, or has a key or a value that no command knows."""


def load_recipe(path: str | Path) -> dict[str, Any]:
    """Read and check a recipe.

    Args:
        path: a YAML file with a mapping of known keys.

    Raises:
        RecipeError: the file is missing, is not a YAML mapping, mixes the two kinds, or has an unknown key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} must be YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"the recipe {path} must be a mapping of keys to values, got {type(content).__name__}")
    _reject_unknown(content, CALIBRATION_KEYS | LAW_KEYS | LOADING_KEYS, f"the recipe {path}")
    layers = content.get("layer_configs", [])
    if not isinstance(layers, list) or (is_law(content) and not layers):
        raise RecipeError(f"`layer_configs` of the recipe {path} must be a list of checkpoints, got {layers!r}")
    for number, layer in enumerate(layers):
        where = f"`layer_configs[{number}]` of the recipe {path}"
        if not isinstance(layer, dict):
            raise RecipeError(f"{where} must be a mapping, got {layer!r}")
        _reject_unknown(layer, LAYER_KEYS, where)
    if is_law(content) and (foreign := sorted(set(content) - LAW_KEYS - LOADING_KEYS)):
        raise RecipeError(
            f"the recipe {path} has the law's own `layer_configs` beside {', '.join(foreign)}: calibration chooses "
            "the law itself; keep the one or the other"
        )
    return content


def with_flags(config: str | Path | None, **flags: Any) -> dict[str, Any]:
    """The recipe's values, each overridden by the flag of the same name where that flag was given.

    Args:
        config: recipe file, or None.
        **flags: a command's flags; None means "not given".

    Returns:
        Only what was given, by either; what is absent is left to the defaults of the function that is called.
    """
    recipe = {} if config is None else load_recipe(config)
    return recipe | {name: value for name, value in flags.items() if value is not None}


def is_law(recipe: Mapping[str, Any]) -> bool:
    """True for a recipe that holds an uncalibrated law instead of arguments of `calibrate`."""
    return "layer_configs" in recipe


def law_of(recipe: Mapping[str, Any], n_layers: int) -> dict[str, Any]:
    """Arguments of the controller from a law recipe.

    Args:
        recipe: what `load_recipe` gave.
        n_layers: layers of the decoder, at least 1; turns ``depth`` into ``layer_idx``.

    Raises:
        RecipeError: it is not a law recipe, or a checkpoint lacks a value.
        ConfigError: a value is out of its range.
    """
    if not is_law(recipe):
        raise RecipeError(f"a law recipe must have `layer_configs`, got the keys {', '.join(sorted(recipe))}")
    layers = tuple(_layer_config(dict(layer), n_layers) for layer in recipe["layer_configs"])
    return {**recipe, "layer_configs": layers}


def _layer_config(layer: dict[str, Any], n_layers: int) -> LayerConfig:
    from sedac_hf.layer_config import LayerConfig

    if ("depth" in layer) == ("layer_idx" in layer):
        raise RecipeError(f"a checkpoint must have `layer_idx` or `depth`, and not both; got {layer!r}")
    if "depth" in layer:
        depth = layer.pop("depth")
        if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth < 1:
            raise RecipeError(f"`depth` must be a share of the layers in [0, 1), got {depth!r}")
        layer["layer_idx"] = int(depth * n_layers)
    try:
        config = LayerConfig(**layer)
    except TypeError as error:
        raise RecipeError(f"a checkpoint of the recipe is incomplete: {error}") from error
    if config.layer_idx >= n_layers:
        raise RecipeError(f"`layer_idx` must be below the decoder's {n_layers} layers, got {config.layer_idx}")
    return config


def _reject_unknown(given: Iterable[Any], known: frozenset[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(sorted(known))}"
            raise RecipeError(f"{where} has the unknown key `{key}`; {hint}")
