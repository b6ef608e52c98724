"""The LM evaluation harness on tasks of our own: its `HFLM`, our model "sedac", and its command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sedac_hf import SedacForCausalLM, load_demo
from sedac_hf.assets import demo_path
from sedac_hf.ffn.schedule import WidthSchedule
from tests.policies import random_policy

lm_eval = pytest.importorskip("lm_eval")

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).parent / "tasks"
CHOICE, PERPLEXITY, ANSWER = "code_choice", "code_perplexity", "code_answer"

Scores = dict[str, float | str]


def evaluate(model: Any, tasks: tuple[str, ...] = (CHOICE, PERPLEXITY), **kwargs: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        device="cpu",
        **kwargs,
    )


def scores(results: dict[str, Any]) -> Scores:
    """The metrics of every task, and the loglikelihood of every answer."""
    found = {
        f"{task} {name}": value
        for task, metrics in results["results"].items()
        for name, value in metrics.items()
        if isinstance(value, float) and "stderr" not in name
    }
    for task, samples in results.get("samples", {}).items():
        for number, sample in enumerate(samples):
            found[f"{task} {number}"] = repr(sample["filtered_resps"])
    return found


@pytest.fixture(scope="module")
def dense() -> Scores:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_demo()
    return scores(evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)))


@pytest.fixture
def wrapped() -> SedacForCausalLM:
    return SedacForCausalLM.from_base(load_demo()[0])


def by_hflm(model: SedacForCausalLM) -> Scores:
    from lm_eval.models.huggingface import HFLM

    return scores(evaluate(HFLM(pretrained=model, tokenizer=load_demo()[1], batch_size=4)))


def numbers(value: float | str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", str(value))]


def test_what_cuts_nothing_has_the_dense_scores_and_what_cuts_has_others(
    dense: Scores, wrapped: SedacForCausalLM
) -> None:
    assert dense[f"{CHOICE} acc,none"] > 0.5  # guessing: a third
    assert by_hflm(wrapped) == dense, "uncalibrated"
    policy = replace(random_policy(wrapped.runtime, "select", compensate=False), soft_exit=False)
    wrapped.install(policy)
    cut = by_hflm(wrapped)
    assert cut.keys() == dense.keys()
    for name in (f"{PERPLEXITY} word_perplexity,none", f"{PERPLEXITY} byte_perplexity,none"):
        assert cut[name] > 1.2 * dense[name]
    assert cut[f"{CHOICE} acc,none"] < dense[f"{CHOICE} acc,none"]
    assert all(cut[name] != value for name, value in dense.items() if isinstance(value, str))
    with wrapped.disable():
        assert by_hflm(wrapped) == dense, "disabled"
    never = tuple(replace(layer, target_exit_rate=1e3) for layer in policy.layer_configs)
    rows = [
        row if segment >= 0 else (row[0], *row[-1:] * policy.n_levels)
        for row, segment in zip(policy.schedule.points, wrapped.runtime.segments, strict=True)
    ]
    wrapped.install(replace(policy, layer_configs=never, schedule=WidthSchedule(policy.n_levels, tuple(rows))))
    # Weights that lie in another order are multiplied in another one: the same up to a rounding.
    whole = by_hflm(wrapped)
    assert whole.keys() == dense.keys()
    assert whole[f"{CHOICE} acc,none"] == dense[f"{CHOICE} acc,none"]
    for name, value in dense.items():
        assert numbers(whole[name]) == pytest.approx(numbers(value), rel=1e-5), name
    assert wrapped.stats().checkpoints[0].tokens > 0


@pytest.fixture
def saved(wrapped: SedacForCausalLM, tmp_path: Path) -> Path:
    """An adapter without a tokenizer of its own."""
    wrapped.install(random_policy(wrapped.runtime, "truncate"))
    wrapped.save_pretrained(tmp_path / "adapter", adapter_only=True)
    assert not (tmp_path / "adapter" / "tokenizer.json").exists()
    return tmp_path / "adapter"


def test_the_model_named_sedac(dense: Scores, saved: Path) -> None:
    import sedac_hf.integrations.lm_eval  # registers it

    args = {"pretrained": str(saved), "dtype": "float32"}
    results = evaluate("sedac", (CHOICE, PERPLEXITY, ANSWER), model_args=args, batch_size=4)
    loaded = SedacForCausalLM.from_pretrained(saved, dtype="float32")
    cut = scores(results)
    assert {name: value for name, value in cut.items() if ANSWER not in name} == by_hflm(loaded) != dense
    stats = results["config"]["sedac"]
    assert 0.2 < stats["needed_bytes_share"] < 0.8
    assert set(stats["choices"]) == {"cut: asked for"}
    json.dumps(stats)
    assert scores(evaluate("sedac", model_args={**args, "dense": True}, batch_size=4)) == dense
    plain = {"pretrained": str(demo_path()), "dtype": "float32"}
    assert scores(evaluate("sedac", model_args=plain, batch_size=4)) == dense
    model = sedac_hf.integrations.lm_eval.SedacLM(loaded, tokenizer=load_demo()[1], batch_size=4)
    assert scores(evaluate(model)) == by_hflm(loaded)


def test_the_command(dense: Scores, saved: Path, tmp_path: Path) -> None:
    arguments = [
        "run", "--model", "sedac", "--model_args", f"pretrained={saved},dtype=float32", "--tasks", CHOICE,
        "--include_path", str(TASKS), "--batch_size", "4", "--device", "cpu", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sedac_hf.integrations.lm_eval", *arguments],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text(encoding="utf-8"))
    loaded = by_hflm(SedacForCausalLM.from_pretrained(saved, dtype="float32"))
    assert scores(results) == {name: loaded[name] for name in (f"{CHOICE} acc,none", f"{CHOICE} acc_norm,none")}
    assert results["config"]["sedac"]["tokens"] > 0


def test_the_entry_point_names_the_class() -> None:
    import re

    import sedac_hf.integrations.lm_eval as ours

    declared = re.findall(r'^sedac = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared == [f"{ours.SedacLM.__module__}:{ours.SedacLM.__qualname__}"]
