"""State of one forward pass. It lives in a context variable, so that threads sharing a model do not share it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sedac_hf.ops.contract import Compensation, OperatingPoint
from sedac_hf.ops.level_plan import LevelPlan
from sedac_hf.ops.threads import end_step

if TYPE_CHECKING:
    from sedac_hf.runtime.runtime import SedacRuntime


@dataclass
class GenerationCall:
    """What one ``generate`` call decided before its first forward pass; lasts until the call returns."""

    runtime: SedacRuntime
    rows: int
    full_width: bool
    reason: str
    prompt_length: int  # tokens at positions before this one run at full width
    consistent: bool = False  # cut whatever it costs, and let no measured time decide what runs
    past_prompt: bool = False  # a call without prompt tokens was seen: no later one has any

    @property
    def choice(self) -> str:
        """The choice and its reason, as statistics name it."""
        return f"{'full width' if self.full_width else 'cut'}: {self.reason}"

    def prompt_mask(self, batch: int, sequence: int, kwargs: dict[str, Any]) -> np.ndarray | None:
        """`prompt_mask` of one forward call; asks the cache only until the prompt is over, for that may mean waiting
        for the device."""
        if self.past_prompt:
            return None
        mask = prompt_mask(batch, sequence, kwargs, self.prompt_length)
        self.past_prompt = mask is None
        return mask


@dataclass(frozen=True)
class Forced:
    """What a calibration or test run asks for instead of the policy: points, or levels of the schedule.

    compensation: per FFN, for ``points``; level 1 of a two-level plan stands for the point.
    """

    points: tuple[OperatingPoint | None, ...] | None = None
    levels: int | np.ndarray | None = None
    compensation: Sequence[Compensation | None] | None = None


@dataclass
class ForwardPass:
    """One forward of the base model over ``n_tokens`` = batch x sequence tokens, flattened in order.

    Where the hidden states have other rows than the call has tokens (audio codebooks, prompts that the model adds,
    padding to a multiple), ``n_tokens`` counts those rows from the first checkpoint on; ``shape`` stays (B, S) of the
    call.

    prompt: bool [n_tokens], tokens that run at full width because they belong to the prompt; None: none do.
    whole: every FFN runs untouched in this pass.
    plan: the levels in force, None before the first checkpoint.
    next_checkpoint: the one that comes next where layers run one after the other.
    irregular: why a captured graph could not run such a pass; None: it could.
    torch_alone: torch is kept to one thread during this pass.
    threads: of the compiled kernels, in a decode step that may use them; 0: no kernel runs.
    many_threads: the same in a pass of more tokens than kernels take at once.
    by_time: what was measured to be quickest runs, the kernel or the module or another order of its products.
    uneven: for FFN calls of other numbers of rows: this pass as if it had so many tokens.
    came: the checkpoints in the order in which they came.
    over: the pass has ended; its layers run again because a backward pass needs what checkpointing did not keep.
    fixed_plans: levels that wait for no checkpoint: "head" (FFNs before the first one), "point" and "level" (forced).
    recorded: sites whose call has been counted.
    Counted together when the pass ends, which is quicker where a pass is short: decided, (checkpoint_idx, risks,
    exited, ratio) of each checkpoint, and decoded, (site, engine, whether a shadow decided, units needed, units
    read) of the FFNs that ran neither by themselves nor by `cut_ffn`.
    """

    runtime: SedacRuntime
    n_tokens: int
    prompt: np.ndarray | None = None
    whole: bool = False
    torch_alone: bool = False
    threads: int = 0
    many_threads: int = 0
    by_time: bool = False
    controller_state: Any = None
    shape: tuple[int, int] | None = None
    plan: LevelPlan | None = None
    came: list[int] = field(default_factory=list)
    over: bool = False
    next_checkpoint: int = 0
    irregular: str | None = None
    fixed_plans: dict[str, LevelPlan] = field(default_factory=dict)
    uneven: dict[int, ForwardPass] | None = None
    previous: ForwardPass | None = None
    recorded: set[int] = field(default_factory=set)
    decided: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    decoded: list[tuple[int, str, bool, int, int]] = field(default_factory=list)

    def left_open(self) -> ForwardPass | None:
        """End a pass whose forward was interrupted, if that was not done yet; gives the one around it."""
        if not self.over:
            self.over = True
            self.runtime.arrangement.leave()
            if self.torch_alone:
                end_step()
        return self.previous

    @property
    def counted(self) -> np.ndarray | slice:
        """Index of the tokens that are not prompt: those the checkpoints' statistics are about."""
        return slice(None) if self.prompt is None else ~self.prompt


current_pass: ContextVar[ForwardPass | None] = ContextVar("sedac_hf_current_pass", default=None)
current_generation: ContextVar[GenerationCall | None] = ContextVar("sedac_hf_current_generation", default=None)


class OfItsPass:
    """A checkpointing function whose layers, run again in a backward pass, see the pass that they ran in first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = current_pass.get()
        again = None if state is None else replace(state, over=True)  # the levels that are in force now
        return self.function(functools.partial(_run_within, state, again, layer), *args, **kwargs)


def _run_within(
    state: ForwardPass | None, again: ForwardPass | None, layer: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    token = current_pass.set(again if state is not None and state.over else state)
    try:
        return layer(*args, **kwargs)
    finally:
        current_pass.reset(token)


@contextmanager
def generating(call: GenerationCall) -> Iterator[None]:
    """The length of a ``generate`` call; closes passes that an interrupt left open, for which no hook runs."""
    token = current_generation.set(call)
    call.runtime.arrangement.enter()
    try:
        with closing_passes():
            yield
    finally:
        call.runtime.arrangement.leave()
        current_generation.reset(token)
        call.runtime.tally.choice(call.choice)


def close_left_open(runtime: SedacRuntime) -> ForwardPass | None:
    """End passes of this model that an interrupt left open, innermost first; gives the pass around them."""
    around = current_pass.get()
    while around is not None and around.runtime is runtime:
        around = around.left_open()
    current_pass.set(around)
    return around


@contextmanager
def closing_passes() -> Iterator[None]:
    """Closes passes that an interrupt left open: it is no `Exception`, and hooks run after those alone."""
    outer = current_pass.get()
    try:
        yield
    finally:
        state = current_pass.get()
        while state is not None and state is not outer:
            state = state.left_open()
        current_pass.set(outer)


def call_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(batch, sequence) of a causal LM's forward call, or None where it cannot be read."""
    tensor = kwargs.get("input_ids")
    if tensor is None:
        tensor = kwargs.get("inputs_embeds")
    if tensor is None and args and isinstance(args[0], torch.Tensor):
        tensor = args[0]
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
        return None
    return int(tensor.shape[0]), int(tensor.shape[1])


def prompt_mask(batch: int, sequence: int, kwargs: dict[str, Any], prompt_length: int) -> np.ndarray | None:
    """bool [batch x sequence]: tokens at cache positions before ``prompt_length``; None where there are none."""
    cache = kwargs.get("cache", kwargs.get("past_key_values"))  # newer and older name; transformers takes the newer
    if cache is not None and hasattr(cache, "get_seq_length"):
        start = int(cache.get_seq_length())
    else:
        # No cache to ask: a call that holds the whole prompt starts at 0, a shorter one continues it.
        start = 0 if sequence >= prompt_length else prompt_length
    n = min(max(prompt_length - start, 0), sequence)
    if n == 0:
        return None
    return np.tile(np.arange(sequence) < n, batch)
