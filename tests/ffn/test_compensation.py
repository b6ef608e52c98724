"""Compensation tables: what they hold, and their way through a file."""

from __future__ import annotations

import pytest
import torch

from sedac_hf.errors import ConfigError
from sedac_hf.ffn.compensation import LevelCompensation

N_LEVELS, D = 4, 6


def _make(bias: bool = True, pairs: bool = True) -> LevelCompensation:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(N_LEVELS + 1, D, generator=generator)
    table[N_LEVELS] = 0
    pair = (torch.randn(D, 2, generator=generator), torch.randn(2, 8, generator=generator))
    return LevelCompensation(table if bias else None, {2: pair} if pairs else {}, N_LEVELS)


@pytest.mark.parametrize(("bias", "pairs"), [(True, True), (True, False), (False, True)])
def test_tensors_there_and_back(bias: bool, pairs: bool) -> None:
    made = _make(bias, pairs)
    tensors = made.to_tensors("compensation.3.")
    names = {name.removeprefix("compensation.3."): tensor for name, tensor in tensors.items()}
    read = LevelCompensation.from_tensors(names, N_LEVELS)
    assert read is not None
    like = torch.zeros(1)
    for level in range(N_LEVELS + 1):
        a, b = made.low_rank(level, like), read.low_rank(level, like)
        assert (a is None) == (b is None) == (not pairs or level != 2)
        if a is not None and b is not None:
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    a, b = made.bias(like), read.bias(like)
    assert (a is None and b is None) if not bias else torch.equal(a, b)


def test_nothing_is_none() -> None:
    assert LevelCompensation.from_tensors({}, N_LEVELS) is None


def test_parameters_count_what_a_token_uses() -> None:
    made = _make()
    assert made.parameters(1) == D
    assert made.parameters(2) == D + 2 * D + 2 * 8
    assert made.parameters(N_LEVELS) == 0


def test_tensors_follow_the_dtype_that_is_computed_in() -> None:
    made = _make()
    bias = made.bias(torch.zeros(1, dtype=torch.bfloat16))
    pair = made.low_rank(2, torch.zeros(1, dtype=torch.float64))
    assert bias is not None
    assert pair is not None
    assert bias.dtype == torch.bfloat16
    assert pair[0].dtype == torch.float64


def test_damage_is_refused() -> None:
    with pytest.raises(ConfigError, match="whole FFN must not be compensated"):
        LevelCompensation(torch.ones(N_LEVELS + 1, D), {}, N_LEVELS)
    with pytest.raises(ConfigError, match=r"must be \[5, hidden size\]"):
        LevelCompensation(torch.zeros(N_LEVELS, D), {}, N_LEVELS)
    with pytest.raises(ConfigError, match="does not fit"):
        LevelCompensation(None, {2: (torch.ones(D, 2), torch.ones(3, 8))}, N_LEVELS)
    with pytest.raises(ConfigError, match="lacks its second half"):
        LevelCompensation.from_tensors({"2.u": torch.ones(D, 2)}, N_LEVELS)
