"""Checks that run in Triton's interpreter. Started by test_triton.py in a process of its own: TRITON_INTERPRET=1 must
be set before triton is imported, and then no kernel can be compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sedac_hf.errors import ConfigError
from sedac_hf.ops import library
from sedac_hf.ops.contract import ShadowTables
from sedac_hf.ops.low_bit import LowBitMatrix
from tests.ops.triton.cases import (
    BASE,
    SELECT,
    SELECT_CASES,
    TRUNCATE_CASES,
    Case,
    Engines,
    Problem,
    check,
    check_broken_rows,
    check_neighbours,
    check_rounding,
)
from tests.ops.triton.memory import skip_without_interpreter
from tests.ops.triton.mutants import SELECT_MUTANTS, TRUNCATE_MUTANTS, Mutant, engines_with

skip_without_interpreter()
ENGINES = Engines.load()
RELU = replace(SELECT, activation="relu", gated=False)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):  # NaN in, NaN out
        yield


@pytest.mark.parametrize("case", TRUNCATE_CASES + SELECT_CASES, ids=str)
def test_equals_masking(case: Case) -> None:
    check(ENGINES, case)


@pytest.mark.parametrize("case", [BASE, SELECT, RELU], ids=["truncate", "select", "relu"])
def test_broken_rows_stay_broken_and_alone(case: Case) -> None:
    check_broken_rows(ENGINES, case)


@pytest.mark.parametrize("case", [BASE, SELECT], ids=["truncate", "select"])
def test_bits_do_not_depend_on_neighbours(case: Case) -> None:
    check_neighbours(ENGINES, case)


def test_rows_are_rounded_as_the_definition_says() -> None:
    check_rounding(ENGINES)


def test_rows_of_a_wider_input_are_read_in_place() -> None:
    problem = Problem.of(BASE)
    wide = torch.cat([problem.x, problem.x + 1], dim=1)
    strided = replace(problem, x=wide[:, : BASE.d])
    assert torch.equal(ENGINES.run(BASE, strided), ENGINES.run(BASE, problem))


@pytest.mark.parametrize("case", [BASE, SELECT, replace(SELECT, widths=(9, 8, 7, 6, 5), shares=(0.5,) * 5)], ids=str)
def test_what_is_registered_for_cuda_is_what_is_registered_for_the_cpu(case: Case) -> None:
    problem = Problem.of(case)
    problem = replace(problem, x=problem.x.T.contiguous().T)  # rows that lie scattered are copied
    w = problem.weights
    ffn = (w.gate, w.up, w.down, w.gate_bias, w.up_bias, w.down_bias, case.activation, 0)
    if case.shares is None:
        got = library._truncated_on_cuda(problem.x, problem.widths, *ffn)
        wanted = library.truncated_ffn(problem.x, problem.widths, *ffn)
    else:
        chosen = (problem.x, problem.widths, problem.least, *problem.shadow, *ffn)
        got, wanted = library._selected_on_cuda(*chosen), library.selected_ffn(*chosen)
    torch.testing.assert_close(got, wanted)
    assert library._truncated_on_cuda(problem.x[:0], problem.widths[:0], *ffn).shape == (0, case.d)


def test_a_shadow_of_other_bits_and_too_many_rows_are_refused() -> None:
    problem = Problem.of(SELECT)
    select = ENGINES.modules["select"]
    other = LowBitMatrix.quantize(problem.weights.up, bits=8)
    shadow = ShadowTables(other.codes, other.scales, None, problem.shadow[3])
    with pytest.raises(ConfigError, match="4-bit shadow"):
        select.selected(problem.x, problem.widths, problem.least, shadow, problem.weights, "silu")
    many = replace(problem, x=problem.x.repeat(2, 1))
    with pytest.raises(ConfigError, match="1 to 4 rows, got 6"):
        ENGINES.run(SELECT, many)


def checks_of(mutant: Mutant) -> Iterator[Callable[[Engines], object]]:
    """The checks of the part that the mutant changes."""
    if mutant.broken:
        yield from (partial(check_broken_rows, case=case) for case in (RELU, SELECT, BASE))
        return
    if mutant in SELECT_MUTANTS:
        yield check_rounding
    cases = SELECT_CASES if mutant in SELECT_MUTANTS else TRUNCATE_CASES
    yield from (partial(check, case=case, twice=False) for case in cases)


@pytest.mark.parametrize("mutant", TRUNCATE_MUTANTS + SELECT_MUTANTS, ids=lambda mutant: mutant.name)
def test_faults_are_found(mutant: Mutant, tmp_path: Path) -> None:
    engines = engines_with(mutant, tmp_path)
    for run in checks_of(mutant):
        try:
            run(engines)
        except Exception:  # a wrong kernel may fail in any way; what counts is that it does
            return
    pytest.fail("every check passed")
