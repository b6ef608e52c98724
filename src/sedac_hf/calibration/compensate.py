"""Fit what stands in for the units that a width leaves out: a bias, and a low-rank correction of down.

With hidden units split into kept h_k and left out h_o, the best linear stand-in for ``W_o h_o`` given h_k is
``W_o A h_k + b``, A the regression of h_o on h_k (least squares; for pruning: SparseGPT, arXiv 2301.00774, section 3;
FLAP, arXiv 2312.11983, for the bias). ``W_o A`` is kept to rank r in the metric of h_k's covariance: the truncated
singular value decomposition of ``W_o A C^(1/2)`` is the reduced-rank regression optimum (Izenman 1975).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sedac_hf.ffn.compensation import LevelCompensation

_RIDGE = 1e-3  # of the mean variance of the kept units


def fit_compensation(
    down: Tensor, mean: Tensor, moment: Tensor | None, widths: Mapping[int, int], n_levels: int, rank: int
) -> LevelCompensation:
    """Compensation of one FFN at the widths of its levels.

    Args:
        down: [d, f], mean: E[h] [f], moment: E[h h^T] [f, f] or None (then bias alone); all in channel order.
        widths: level -> width; whole levels are left out.
        rank: of the correction; 0: bias alone.
    """
    d, f = down.shape
    down = down.detach().float().cpu()
    bias = torch.zeros(n_levels + 1, d)
    low_rank: dict[int, tuple[Tensor, Tensor]] = {}
    covariance = None if moment is None or rank == 0 else torch.outer(mean, mean).neg_().add_(moment)
    fitted: dict[int, tuple[Tensor, Tensor, Tensor] | None] = {}
    for level, width in widths.items():
        if not 0 < width < f:
            continue
        rest = down[:, width:]
        bias[level] = rest @ mean[width:]
        if covariance is None:
            continue
        if width not in fitted:
            fitted[width] = _low_rank(rest, covariance, mean, width, rank)
        pair = fitted[width]
        if pair is not None:
            u, v, shift = pair
            low_rank[level] = (u, v)
            bias[level] -= shift
    return LevelCompensation(bias, low_rank, n_levels)


def _low_rank(
    rest: Tensor, covariance: Tensor, mean: Tensor, width: int, rank: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(U [d, r], V [r, width], U V mean [d]); None where the covariance cannot be factored."""
    kept = covariance[:width, :width].clone()
    kept.diagonal().add_(_RIDGE * kept.diagonal().mean().clamp(min=1e-12))
    factor, failed = torch.linalg.cholesky_ex(kept)
    if int(failed) != 0:
        return None
    # rest @ C_ok C_kk^-1 C_kk^(1/2) = rest @ C_ok factor^-T
    whitened = torch.linalg.solve_triangular(factor, (rest @ covariance[width:, :width]).T, upper=False).T
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    r = min(rank, s.numel())
    left = (u[:, :r] * s[:r].sqrt()).bfloat16()
    right = torch.linalg.solve_triangular(factor, v[:r], upper=False, left=False) * s[:r, None].sqrt()
    right = right.bfloat16()  # stored, and counted, at two bytes per parameter
    return left, right, left.float() @ (right.float() @ mean[:width])
