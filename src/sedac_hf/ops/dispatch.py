"""Which engine runs a cut FFN. A faster engine is one more entry in `ENGINES` and one more line in `choose`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from sedac_hf.errors import ConfigError
from sedac_hf.ops.compiled import stand_in
from sedac_hf.ops.contract import FFNWeights, SiteCut
from sedac_hf.ops.gather import gather_ffn
from sedac_hf.ops.reference import bounded_reference_ffn, reference_ffn
from sedac_hf.ops.rust_cpu import rust_ffn
from sedac_hf.ops.strips.engine import strips_ffn
from sedac_hf.ops.triton.engine import triton_ffn

Engine = Callable[[Tensor, FFNWeights, SiteCut], Tensor]

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "reference": reference_ffn,
        "masked": bounded_reference_ffn,
        "strips": strips_ffn,
        "gather": gather_ffn,
        "rust": rust_ffn,
        "triton": triton_ffn,
    }
)


def cut_ffn(x: Tensor, weights: FFNWeights, cut: SiteCut) -> Tensor:
    """One FFN, each token cut to its level.

    x: [n, d] in the weights' dtype, tokens in the plan's order of the call. Returns [n, d] in the same dtype, a new
    tensor. A token's result does not depend on its neighbours but by float rounding. Level n_levels is the whole FFN
    without compensation, level 0 is down's bias (plus the compensation's bias of level 0, where there is one).

    Raises:
        ConfigError: ``cut`` does not fit the call, or names an unknown engine.
    """
    if x.dim() != 2 or x.shape[0] != cut.plan.n_tokens:
        raise ConfigError(
            f"a cut FFN must get x of shape [{cut.plan.n_tokens}, hidden], one row per planned token, "
            f"got {list(x.shape)}"
        )
    if len(cut.points) != cut.plan.n_levels + 1:
        raise ConfigError(
            f"a cut needs one operating point per level 0..{cut.plan.n_levels}, got {len(cut.points)} points"
        )
    if cut.chooses and cut.importance is None:
        raise ConfigError(
            "a token's operating point has importance_min > 0 but the cut has no `importance`: build the site's shadow"
        )
    if x.shape[0] == 0:
        cut.record(engine="none", tokens=0, needed=0, read=0, computed=0)
        return x.new_zeros(0, weights.down.shape[0])
    engine = choose(x, cut)
    if not weights.ordinary and engine != "reference":
        engine = "masked"  # slices up to the widest token: all that such weights allow
    return ENGINES[engine](x, weights, cut)


def choose(x: Tensor, cut: SiteCut) -> str:
    """The engine for this call: the one that was asked for where it can give the result, else the fastest that can."""
    if cut.engine != "auto" and cut.engine not in ENGINES:
        raise ConfigError(f"`engine` must be one of auto, {', '.join(ENGINES)}, got {cut.engine!r}")
    if cut.engine in ("reference", "masked"):
        return cut.engine
    kernel = cut.kernel
    if kernel is not None and cut.engine in ("auto", kernel.engine):
        can = kernel.selects if cut.chooses else kernel.truncates
        # Many rows that choose use nearly all units together: torch's products do that well, where it has them.
        if can and kernel.accepts(x, in_turns=not cut.chooses or stand_in(x.dtype)):
            return kernel.engine
    if not cut.chooses:
        return "strips"
    return "gather" if cut.plan.n_tokens == 1 else "masked"
