"""Interleaved timing: what is inside the timer, who goes first, and a real comparison on a tiny decoder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation.speed import TokenClock, compare_speed, interleaved
from tests.policies import random_policy
from tests.tiny_models import tiny_model


def test_every_round_measures_each_variant_once_and_rotates() -> None:
    events: list[str] = []

    @contextmanager
    def variant(name: str) -> Iterator[None]:
        events.append(name)
        yield

    variants = {name: (lambda name=name: variant(name)) for name in "abc"}
    seconds = interleaved(variants, lambda: events.append("work"), rounds=3, warm_up=lambda: events.append("warm"))
    assert [len(values) for values in seconds.values()] == [3, 3, 3]
    assert [name for name in events if name in "abc"] == list("abcbcacab")
    assert events[:6] == ["a", "warm", "work", "b", "warm", "work"]


def test_switching_and_warm_up_are_not_timed() -> None:
    @contextmanager
    def slow_switch() -> Iterator[None]:
        time.sleep(0.05)
        yield
        time.sleep(0.05)

    seconds = interleaved({"a": slow_switch}, lambda: time.sleep(0.02), rounds=2, warm_up=lambda: time.sleep(0.05))
    assert all(0.02 <= value < 0.045 for value in seconds["a"])


def test_a_token_clock_changes_nothing_and_leaves_its_note_out_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def passes(seconds: float) -> float:
        nonlocal now
        now += seconds
        return now

    monkeypatch.setattr("sedac_hf.evaluation.speed.time.perf_counter", lambda: now)
    clock = TokenClock(note=lambda: passes(100.0))
    scores = torch.randn(1, 8)
    for step in (7.0, 2.0, 3.0):
        passes(step)
        assert clock(torch.zeros(1, 1, dtype=torch.long), scores) is scores
    assert clock.steps() == [(2.0, 102.0), (3.0, 103.0)]


def test_a_token_clock_sees_every_token(model: SedacForCausalLM) -> None:
    clock = TokenClock()
    ids = torch.ones(1, 3, dtype=torch.long)
    model.generate(input_ids=ids, min_new_tokens=5, max_new_tokens=5, do_sample=False, logits_processor=[clock])
    assert len(clock.steps()) == 4
    assert all(seconds > 0 and growth == 0 for seconds, growth in clock.steps())


@pytest.fixture
def model() -> SedacForCausalLM:
    wrapped = SedacForCausalLM.from_base(tiny_model("llama"))
    wrapped.install(random_policy(wrapped.runtime, "select"))
    return wrapped


@pytest.mark.parametrize("work", ["generate", "forward"])
def test_compares_a_real_model(model: SedacForCausalLM, work: str) -> None:
    options = {"consistent": True} if work == "generate" else {}
    report = compare_speed(model, work=work, batch=2, prompt_tokens=4, new_tokens=3, rounds=3, **options)
    assert set(report.seconds) == {"dense", "full_width", "sedac"}
    assert all(len(values) == 3 and min(values) > 0 for values in report.seconds.values())
    assert report.ratio == report.medians["sedac"] / report.medians["dense"]
    assert json.loads(json.dumps(report.to_dict()))["ratio"] == report.ratio
    if work == "generate":  # the choices of this run alone, those of the dense variant included
        assert sum(report.choices.values()) == 3 * 3 * 2
        again = compare_speed(model, work=work, prompt_tokens=4, new_tokens=3, rounds=1, **options)
        assert sum(again.choices.values()) == 3 * 2
    else:
        assert report.choices == {}


def test_leaves_the_model_as_it_was(model: SedacForCausalLM) -> None:
    model.train()
    compare_speed(model, prompt_tokens=4, new_tokens=2, rounds=1)
    assert model.training
    assert model.runtime.attached


@pytest.mark.parametrize(
    "wrong", [{"rounds": 0}, {"batch": 0}, {"prompt_tokens": 0}, {"new_tokens": 0}, {"work": "x"}]
)
def test_sizes_are_checked(model: SedacForCausalLM, wrong: dict[str, object]) -> None:
    with pytest.raises(EvaluationError, match=f"`{next(iter(wrong))}` must be"):
        compare_speed(model, **wrong)
