"""What stands in, per level, for the units that a cut leaves out: a mean (bias), and a low-rank correction.

For a token at level l with used units h_l: ``y += bias[l] + U_l (V_l h_l)``. The bias is the mean of what the left-out
units would have added (FLAP, arXiv 2312.11983); ``U_l V_l`` is a low-rank piece of the change that a least-squares
refit of down on the kept units would make, of the FFN alone or against the dense stream (`sedac_hf.calibration`). The
whole FFN is never compensated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ffn.sharded import Shard
from sedac_hf.ops.contract import OperatingPoint


class LevelCompensation:
    """Compensation of one FFN.

    Args:
        bias: float32 [n_levels + 1, d] (the last row zero), or None.
        low_rank: level -> (U [d, r], V [r, width]); levels that are missing have none.
        n_levels: number of levels; level n_levels has no compensation.
    """

    def __init__(self, bias: Tensor | None, low_rank: Mapping[int, tuple[Tensor, Tensor]], n_levels: int) -> None:
        if bias is not None and (bias.dim() != 2 or bias.shape[0] != n_levels + 1):
            raise ConfigError(f"`bias` must be [{n_levels + 1}, hidden size], got {tuple(bias.shape)}")
        if bias is not None and bool(bias[n_levels].any()):
            raise ConfigError("the whole FFN must not be compensated: the last row of `bias` must be zero")
        for level, (u, v) in low_rank.items():
            if not 0 < level < n_levels or u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
                raise ConfigError(
                    f"the low-rank pair of level {level} does not fit: {tuple(u.shape)}, {tuple(v.shape)}"
                )
        self.n_levels = n_levels
        self._bias = bias
        self._low_rank = dict(low_rank)
        self._saved_dtype = {level: u.dtype for level, (u, _) in low_rank.items()}
        self._placed: dict[tuple[torch.device, torch.dtype, int], Tensor | tuple[Tensor, Tensor]] = {}

    def replaced(self, level: int, source: LevelCompensation, source_level: int) -> LevelCompensation:
        """This compensation with one level's taken from another."""
        bias = None if self._bias is None else self._bias.clone()
        if bias is not None and source._bias is not None:
            bias[level] = source._bias[source_level]
        low_rank = {key: pair for key, pair in self._low_rank.items() if key != level}
        if source_level in source._low_rank:
            low_rank[level] = source._low_rank[source_level]
        return LevelCompensation(bias, low_rank, self.n_levels)

    def part(self, shard: Shard, *, dealt: bool) -> LevelCompensation:
        """This rank's part: the columns of its units; the ranks' ``U V h`` add up, the bias is for their sum.

        dealt: whether the FFN's units are; they lie in natural order otherwise, and every level has all of them.
        """
        first = shard.rank * shard.held
        columns = slice(shard.rank, None, shard.ranks) if dealt else slice(first, first + shard.held)
        pairs = {level: (u, v[:, columns].contiguous()) for level, (u, v) in self._low_rank.items()}
        return LevelCompensation(self._bias, pairs, self.n_levels)

    def check(self, hidden_size: int, points: Sequence[OperatingPoint]) -> None:
        """Raise ConfigError unless this is for an FFN of that hidden size with these points."""
        if self._bias is not None and self._bias.shape[1] != hidden_size:
            raise ConfigError(f"`bias` is for a hidden size of {self._bias.shape[1]}, the FFN has {hidden_size}")
        for level, (u, v) in self._low_rank.items():
            if u.shape[0] != hidden_size or v.shape[1] != points[level].width:
                raise ConfigError(
                    f"the low-rank pair of level {level} must map {points[level].width} units to {hidden_size}, "
                    f"got {tuple(u.shape)} and {tuple(v.shape)}"
                )

    def bias(self, like: Tensor) -> Tensor | None:
        """[n_levels + 1, d] on ``like``'s device and dtype; None: nothing to add."""
        if self._bias is None:
            return None
        key = (like.device, like.dtype, -1)
        if key not in self._placed:
            self._placed[key] = self._bias.to(like.device, like.dtype)
        placed = self._placed[key]
        assert isinstance(placed, Tensor)
        return placed

    def low_rank(self, level: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """(U [d, r], V [r, width]) of a level on ``like``'s device and dtype, or None."""
        if level not in self._low_rank:
            return None
        u, v = self._low_rank[level]
        if u.device == like.device and u.dtype == like.dtype:
            return u, v
        key = (like.device, like.dtype, level)
        if key not in self._placed:
            placed = (u.to(like.device, like.dtype), v.to(like.device, like.dtype))
            if torch.promote_types(u.dtype, like.dtype) == like.dtype:  # nothing is lost: no need of both
                self._low_rank[level] = placed
                return placed
            self._placed[key] = placed
        pair = self._placed[key]
        assert isinstance(pair, tuple)
        return pair

    def parameters(self, level: int) -> int:
        """Parameters that a token at this level uses."""
        count = 0 if self._bias is None or level >= self.n_levels else self._bias.shape[1]
        if level in self._low_rank:
            count += sum(t.numel() for t in self._low_rank[level])
        return count

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Bytes held while a base of that dtype runs: converted once, kept twice only where that loses digits."""

        def held(tensor: Tensor) -> int:
            kept = 0 if torch.promote_types(tensor.dtype, dtype) == dtype else tensor.element_size()
            return tensor.numel() * (kept + dtype.itemsize)

        tensors = [t for pair in self._low_rank.values() for t in pair]
        return sum(map(held, tensors if self._bias is None else [self._bias, *tensors]))

    def to_tensors(self, prefix: str) -> dict[str, Tensor]:
        """Named tensors for a safetensors file."""
        tensors = {} if self._bias is None else {f"{prefix}bias": self._bias}
        for level, (u, v) in self._low_rank.items():
            dtype = self._saved_dtype[level]
            tensors[f"{prefix}{level}.u"], tensors[f"{prefix}{level}.v"] = u.to(dtype), v.to(dtype)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], n_levels: int) -> LevelCompensation | None:
        """Read `to_tensors`' form, names without their prefix; None where there is nothing.

        Raises:
            ConfigError: half of a pair is missing, or a shape does not fit.
        """
        if not tensors:
            return None
        low_rank = {}
        for name in tensors:
            level, _, part = name.partition(".")
            if part == "u":
                if f"{level}.v" not in tensors:
                    raise ConfigError(f"the low-rank compensation of level {level} lacks its second half")
                low_rank[int(level)] = (tensors[name], tensors[f"{level}.v"])
        return cls(tensors.get("bias"), low_rank, n_levels)
