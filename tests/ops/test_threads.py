"""Threads of the kernels: torch's own where they can be entered; else torch's setting is borrowed and given back."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from sedac_hf.ops import threads
from sedac_hf.ops.compiled import available
from tests.kernel_cases import case, own_threads
from tests.kernel_cases import threads as torch_threads

pytestmark = pytest.mark.skipif(not available(), reason="the compiled module is not installed")


def in_thread(work):
    """What ``work`` gives in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(60)
    return results[0]


def test_torchs_own_threads_need_no_setting():
    if not threads.parallel_address():
        pytest.skip("torch's runtime is not GCC's here")
    before = torch.get_num_threads()
    assert threads.begin_step() is False
    assert torch.get_num_threads() == before
    for count in (1, 3):
        with torch_threads(count):
            assert threads.kernel_threads() == count


def test_beside_torch_it_keeps_to_one_thread_and_gets_them_back():
    with own_threads(), torch_threads(3):
        assert threads.begin_step() is True
        assert torch.get_num_threads() == 1
        assert threads.kernel_threads() == 3
        assert threads.begin_step() is True  # a step within a step
        threads.end_step()
        assert (torch.get_num_threads(), threads.kernel_threads()) == (1, 3)
        threads.end_step()
        assert (torch.get_num_threads(), threads.kernel_threads()) == (3, 3)


def test_each_thread_gets_back_what_it_had():
    """Two decode at once, and the one that began first ends first."""
    began, other_began, ended = (threading.Event() for _ in range(3))

    def first():
        torch.set_num_threads(3)
        threads.begin_step()
        began.set()
        other_began.wait(60)
        inside = (torch.get_num_threads(), threads.kernel_threads())
        threads.end_step()
        ended.set()
        return inside, (torch.get_num_threads(), threads.kernel_threads())

    with own_threads(), torch_threads(2):
        results = []
        thread = threading.Thread(target=lambda: results.append(first()))
        thread.start()
        began.wait(60)
        assert torch.get_num_threads() == 2, "a thread that does not decode keeps its own"
        threads.begin_step()
        other_began.set()
        ended.wait(60)
        assert (torch.get_num_threads(), threads.kernel_threads()) == (1, 2)
        threads.end_step()
        assert torch.get_num_threads() == 2
        thread.join(60)
        assert results == [((1, 3), (3, 3))]


def test_a_thread_that_is_new_to_torch_is_not_left_with_one():
    with own_threads(), torch_threads(2):
        threads.begin_step()

        def step():
            threads.begin_step()
            inside = threads.kernel_threads()
            threads.end_step()
            return inside, torch.get_num_threads()

        assert in_thread(step) == (2, 2)
        threads.end_step()
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_of_our_own_give_the_same_bits(count):
    c = case(70, 1100, 3)
    expected = c.run([3, 8, 5])
    with own_threads(), torch_threads(count):
        assert torch.equal(c.run([3, 8, 5]), expected)
        assert torch.equal(in_thread(lambda: c.run([3, 8, 5])), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("own", [True, False])
def test_a_forked_child_runs_the_kernels(own):
    """With torch's runtime as torch itself: a child must keep to one thread once the parent used several."""
    c = case(70, 1100, 2)
    with own_threads(active=own), torch_threads(2):
        expected = c.run([3, 5])
        threads.begin_step()
        child = os.fork()
        if child == 0:
            if not own:
                torch.set_num_threads(1)
            same = torch.equal(c.run([3, 5]), expected)
            threads.begin_step()  # waits for nobody
            os._exit(0 if same else 1)
        if own:
            threads.end_step()
        assert exit_code(child) == 0


def exit_code(child: int, seconds: float = 30) -> int | None:
    """Of a forked child; None where it hangs, and then it is ended."""
    done = []
    waiter = threading.Thread(target=lambda: done.append(os.waitpid(child, 0)[1]))
    waiter.start()
    waiter.join(seconds)
    if not done:
        os.kill(child, 9)
        waiter.join(seconds)
        return None
    return os.waitstatus_to_exitcode(done[0])
