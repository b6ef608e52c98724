"""What the benchmarks share: whose turn it is, which samples count, what is timed of a token."""

from __future__ import annotations

import sys
import threading
import time

import pytest
import torch

from sedac_hf.evaluation.speed import TokenClock


def test_samples_are_apart_by_run_delay() -> None:
    from timing import DISTURBED, Samples

    samples = Samples()
    for seconds, delay in ((1.0, 0.0), (2.0, DISTURBED), (3.0, 0.0), (100.0, 100 * DISTURBED + 1)):
        samples.add(seconds, delay)
    assert samples.median == 2.0
    assert samples.count == "3/4"
    assert samples.to_dict() == {"median_s": 2.0, "kept": 3, "taken": 4, "over_undisturbed_only": True}


def test_too_few_undisturbed_samples_are_said_to_be_so() -> None:
    from timing import Samples

    samples = Samples()
    for seconds in (1.0, 2.0, 3.0):
        samples.add(seconds, seconds)
    samples.add(10.0, 0.0)
    assert samples.median == 2.5
    assert samples.count == "1/4 (!)"
    assert not samples.to_dict()["over_undisturbed_only"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the run delay")
def test_run_delay_grows_when_threads_fight_for_a_core() -> None:
    """More threads of this process than cores, none of which holds the interpreter lock for long."""
    import os

    from timing import run_delay

    before = run_delay()
    matrix = torch.ones(256, 256)
    stop = time.monotonic() + 0.3

    def work() -> None:
        while time.monotonic() < stop:
            matrix @ matrix

    threads = [threading.Thread(target=work) for _ in range(2 * (os.cpu_count() or 1) + 1)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop - 0.05:  # read while they live: a thread takes its count with it
        grown = run_delay() - before
    for thread in threads:
        thread.join()
    assert grown > 0


def test_calls_take_turns() -> None:
    from timing import take_turns

    events: list[str] = []
    calls = {name: (lambda name=name: events.append(name)) for name in "abc"}
    samples = take_turns(calls, rounds=1, seconds=0.0, least=3)
    assert "".join(events) == "abc" + "abcbcacab"  # once to warm up
    assert {len(s.undisturbed) + len(s.disturbed) for s in samples.values()} == {3}


def test_tokens_are_timed_but_for_the_first_steps() -> None:
    from timing import Samples, time_tokens

    def generate(clock: TokenClock) -> None:
        for _ in range(5):
            clock(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 4))

    samples = Samples()
    time_tokens(generate, samples, skip=1)
    assert len(samples.undisturbed) + len(samples.disturbed) == 3  # five tokens, four steps
