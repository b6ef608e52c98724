"""Recipes: the shipped ones are valid, unknown keys are rejected by name, flags win."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from sedac_hf.cli.main import main
from sedac_hf.cli.recipes import CALIBRATION_KEYS, RecipeError, is_law, law_of, load_recipe, with_flags
from sedac_hf.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
LAYER = "{depth: 0.5, target_exit_rate: 0.5, initial_threshold: 1.0, confidence_weight: 0.4}"


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    content = load_recipe(path)
    if is_law(content):
        assert [layer.layer_idx for layer in law_of(content, n_layers=12)["layer_configs"]] == [3, 6, 9]
    else:
        assert 0 < content["max_ppl_increase"] < 0.1


def test_there_are_recipes_of_both_kinds() -> None:
    kinds = {path.stem: is_law(load_recipe(path)) for path in CONFIGS.glob("*.yaml")}
    assert kinds == {"v6_0": True, "v6_1": True, "balanced": False, "quality": False, "throughput": False}


def test_baselines_are_the_law_of_the_design() -> None:
    v6_0, v6_1 = (law_of(load_recipe(CONFIGS / f"{name}.yaml"), n_layers=12) for name in ("v6_0", "v6_1"))
    assert (v6_0["confidence_decay"], v6_0["soft_exit"]) == (0.0, False)
    assert {(layer.target_exit_rate, layer.confidence_weight) for layer in v6_0["layer_configs"]} == {(0.0, 1.0)}
    assert (v6_1["confidence_decay"], v6_1["soft_exit"], v6_1["alpha"]) == (0.9, True, 0.1)
    assert [layer.confidence_weight for layer in v6_1["layer_configs"]] == [0.3, 0.4, 0.3]


def test_keys_are_arguments_of_calibrate() -> None:
    from sedac_hf.calibration import calibrate

    assert set(inspect.signature(calibrate).parameters) >= CALIBRATION_KEYS


def test_unknown_key_is_named_with_the_nearest_known_one(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown key `max_ppl_increse`; did you mean `max_ppl_increase`"):
        load_recipe(recipe(tmp_path, "max_ppl_increse: 0.01"))


def test_unknown_key_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"layer_configs\[0\].*`layer`; did you mean `layer_idx`"):
        load_recipe(recipe(tmp_path, "layer_configs: [{layer: 3}]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping"),
        ("", "must be a mapping"),
        ("a: [", "must be YAML"),
        ("layer_configs: 3", "must be a list"),
        ("layer_configs: []", "must be a list"),
        ("layer_configs: [3]", "must be a mapping"),
        (f"layer_configs: [{LAYER}]\nshare: 0.5", "beside share"),
    ],
)
def test_malformed_recipes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(tmp_path, text))


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "absent.yaml")


def test_flags_win_and_absent_flags_do_not(tmp_path: Path) -> None:
    path = recipe(tmp_path, "max_ppl_increase: 0.02\nseed: 3")
    merged = with_flags(path, max_ppl_increase=0.01, seed=None, context=128)
    assert merged == {"max_ppl_increase": 0.01, "seed": 3, "context": 128}
    assert with_flags(None, share=0.5, seed=None) == {"share": 0.5}


def test_either_kind_may_cap_the_memory(tmp_path: Path) -> None:
    for text in ("share: 0.5", f"layer_configs: [{LAYER}]"):
        path = recipe(tmp_path, f"{text}\nextra_memory: 0.2")
        assert with_flags(path)["extra_memory"] == 0.2
        assert with_flags(path, extra_memory=0.05)["extra_memory"] == 0.05


def test_a_cap_of_a_recipe_is_checked_by_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, "share: 0.5\nextra_memory: ten percent")
    assert main(["calibrate", "demo", "--config", str(path)]) == 1
    assert "`extra_memory` must be a finite share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"depth": 0.5, "layer_idx": 3}, "and not both"),
        ({"target_exit_rate": 0.5}, "`layer_idx` or `depth`"),
        ({"depth": 1.0}, r"\[0, 1\)"),
        ({"depth": 0.5}, "incomplete"),
        (
            {"layer_idx": 12, "target_exit_rate": 0.5, "initial_threshold": 1.0, "confidence_weight": 0.4},
            "below the decoder's 12 layers",
        ),
    ],
)
def test_checkpoints_that_cannot_be_placed(layer: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        law_of({"layer_configs": [layer]}, n_layers=12)


def test_values_are_checked_by_the_configuration() -> None:
    layer = {"depth": 0.5, "target_exit_rate": 0.5, "initial_threshold": -1.0, "confidence_weight": 0.4}
    with pytest.raises(ConfigError, match="initial_threshold"):
        law_of({"layer_configs": [layer]}, n_layers=12)
