"""The cut experts of a layer: each token's experts run as FFNs of their own, cut to the token's level.

Tokens are sorted by expert. Few rows of an expert run by its compiled kernel where there is one, larger groups
in strips, and experts with a formula of their own by masking, as far as the widest of their tokens. A unit's
importance counts by the weight that the router gives to its expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sedac_hf.ops.activations import Activation
from sedac_hf.ops.contract import DecodeKernel, FFNWeights, OperatingPoint, SiteCut
from sedac_hf.ops.dispatch import cut_ffn
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.threads import kernel_threads
from sedac_hf.ops.tokens import add_level_bias, level_widths

_LEAST_EMITTED = 8  # some formulas split their units; none would break them
_LEAST_WEIGHT = 1e-30

ExpertKernels = Callable[[int], "DecodeKernel | None"]


class ExpertMath(Protocol):
    """What is asked of the experts: see `sedac_hf.ffn.experts.Experts`."""

    @property
    def count(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def activation(self) -> Activation | None: ...
    @property
    def identity(self) -> bool: ...
    def hidden(self, expert: int, x: Tensor, units: int | None = None) -> Tensor: ...
    def project(self, expert: int, h: Tensor) -> Tensor: ...
    def weights(self, expert: int) -> FFNWeights: ...


@dataclass(frozen=True)
class Group:
    """The rows of a call that use one expert.

    pairs: places in the flattened [n, k] routing, int64 [m]; rows: of the call, int64 [m]; tokens: whose they are, on
    the host.
    """

    expert: int
    pairs: Tensor
    rows: Tensor
    tokens: np.ndarray


def grouped(index: Tensor, count: int, copies: int = 1) -> tuple[Tensor, list[Group]]:
    """The routing index [n, k] as groups by expert, and the order of the pairs that they are a cut of.

    Entries of ``count`` and above are nobody's and come last in the order. copies: rows of each token, see
    `cut_experts`.
    """
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(count, device=flat.device), right=True).tolist()
    rows = order // max(index.shape[1], 1)
    tokens = rows.cpu().numpy() % max(index.shape[0] // copies, 1)
    groups = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if start < end:
            groups.append(Group(expert, order[start:end], rows[start:end], tokens[start:end]))
    return order, groups


def cut_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    experts: ExpertMath,
    cut: SiteCut | None,
    kernels: ExpertKernels | None = None,
    *,
    copies: int = 1,
) -> Tensor:
    """The weighted sum of each token's experts, cut to its level.

    Args:
        x: [n, d] in the weights' dtype.
        index: int64 [n, k], the experts of each token; `experts.count` and above: none, or with ``experts.identity``
            one that gives x itself.
        weights: [n, k], the router's.
        cut: ``importance`` is asked as ``importance(x, expert, h)`` for the rows of one expert, h being None where it
            is not known yet; None: everything whole.
        kernels: the compiled kernel of an expert, or None.
        copies: rows that each token of the cut has, all tokens in turn; their sum is the token's output, and the
            caller's to make.

    Returns:
        [n, d] in x's dtype.
    """
    order, groups = grouped(index, experts.count, copies)
    routed = weights.reshape(-1)
    call = _Call(experts, cut, kernels)
    parts = [call.group(group, x[group.rows], routed[group.pairs]) for group in groups]
    known = sum(part.shape[0] for part in parts)
    if known < order.shape[0]:
        rest = order[known:]
        given = x[rest // max(index.shape[1], 1)] if experts.identity else x.new_zeros(len(rest), x.shape[1])
        parts.append(given * routed[rest][:, None])
    y = x.new_zeros(x.shape)
    if parts:
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        y = torch.cat(parts)[back].view(*index.shape, x.shape[1]).sum(dim=1).to(x.dtype)
    if cut is None:
        return y
    cut.record(
        engine="experts", tokens=x.shape[0] // copies, needed=call.needed, read=call.read, computed=call.computed,
        whole_read=len(groups) * experts.intermediate_size,
    )  # fmt: skip
    if copies == 1:
        return add_level_bias(y, cut)
    first, others = y.split([x.shape[0] // copies, x.shape[0] - x.shape[0] // copies])
    return torch.cat((add_level_bias(first, cut), others))


class _Call:
    """One call of a layer's experts, and what it has needed so far."""

    def __init__(self, experts: ExpertMath, cut: SiteCut | None, kernels: ExpertKernels | None) -> None:
        self._experts = experts
        self._cut = cut
        self._kernels = kernels
        self.needed: int | Tensor = 0
        self.read = self.computed = 0
        if cut is not None:
            f = experts.intermediate_size
            self._widths = np.asarray(level_widths(cut, f), np.int64)[cut.plan.levels]
            self._least = np.asarray([point.importance_min for point in cut.points], np.float32)[cut.plan.levels]

    def group(self, group: Group, x: Tensor, routed: Tensor) -> Tensor:
        """The weighted output of one expert for its rows x [m, d] -> [m, d]."""
        cut, experts = self._cut, self._experts
        if cut is None:
            y = experts.project(group.expert, experts.hidden(group.expert, x))
            return y * routed[:, None]
        kernel = None
        if self._kernels is not None and cut.engine in ("auto", "rust"):
            kernel = self._kernels(group.expert)
        chooses = bool((self._least[group.tokens] > 0).any())
        if kernel is not None and (kernel.selects if chooses else kernel.truncates) and kernel.accepts(x):
            y = self._by_kernel(kernel, group, x, routed)
        elif experts.activation is not None and not chooses and cut.engine in ("auto", "strips"):
            y = self._in_strips(group, x, cut)
        else:
            y = self._masked(group, x, routed, cut, chooses)
        return y * routed[:, None]

    def _by_kernel(self, kernel: Any, group: Group, x: Tensor, routed: Tensor) -> Tensor:
        y: Tensor
        shares = routed.abs().float().tolist()
        points = [
            OperatingPoint(int(self._widths[token]), float(self._least[token]) / max(share, _LEAST_WEIGHT))
            for token, share in zip(group.tokens.tolist(), shares, strict=True)
        ]
        y, needed, read = kernel.run_accepted(x, points, kernel_threads())
        self._add(needed=needed, read=read, computed=needed)
        return y

    def _in_strips(self, group: Group, x: Tensor, cut: SiteCut) -> Tensor:
        plan = LevelPlan.of(cut.plan.levels[group.tokens], cut.plan.n_levels)
        part = replace(cut, plan=plan, compensation=None, importance=None, kernel=None, record=self._add)
        return cut_ffn(x, self._experts.weights(group.expert), part)

    def _add(self, *, needed: int | Tensor, read: int, computed: int, **_: object) -> None:
        """A `Record` of one expert's part of the call."""
        self.needed = self.needed + needed
        self.read += read
        self.computed += computed

    def _masked(self, group: Group, x: Tensor, routed: Tensor, cut: SiteCut, chooses: bool) -> Tensor:
        f, widths = self._experts.intermediate_size, self._widths[group.tokens]
        hi = f if cut.engine == "reference" else max(int(widths.max()), min(_LEAST_EMITTED, f))
        h = self._experts.hidden(group.expert, x, hi)
        used = torch.arange(hi, device=x.device)[None, :] < torch.as_tensor(widths, device=x.device)[:, None]
        if chooses and cut.importance is not None:
            worth = cut.importance(x, group.expert, h)[:, :hi] * routed.detach().abs().float()[:, None]
            least = torch.as_tensor(self._least[group.tokens], device=x.device)
            # A NaN importance keeps its unit: a token that is already broken must not look healthy.
            used &= ~(worth < least[:, None])
        h = torch.where(used, h, torch.zeros((), dtype=h.dtype, device=h.device))
        self._add(needed=used.sum() if chooses else int(widths.sum()), read=hi, computed=hi * x.shape[0])
        return self._experts.project(group.expert, h)
