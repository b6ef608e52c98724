"""The demo's last part: tokens per second of a decoder of a real size on this machine, dense and cut.

The embedded decoder is too small to gain time. This one has a real shape and random weights, which say nothing about
quality and take as long as trained ones. One row, one run in which the variants take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

    from sedac_hf.modeling import SedacForCausalLM

SHAPE = "qwen2.5-0.5b"
SHARE = 0.30
PROMPT, WARM_UP = 8, 3
ROOM = 550_000_000  # bytes wanted beside the weights: at most 0.51 GB was seen, while weights are drawn and laid out
MEMORY_LIMIT = Path("/sys/fs/cgroup")  # of a container, on Linux


def speed_on_this_machine(
    shape: str = SHAPE, *, share: float = SHARE, rounds: int = 3, tokens: int = 16, **sizes: Any
) -> dict[str, Any]:
    """Median tokens per second of the plain decoder, of the kernels with nothing skipped, and of SEDAC.

    Args:
        shape: see `sedac_hf.evaluation.random_decoders`; ``sizes`` change its configuration.
        share: of the FFN bytes that a token needs under the policy.
        rounds, tokens: every variant generates so many tokens in each round.

    Returns:
        Plain types, for JSON; only "skipped", with the reason, where too little memory is free.
    """
    from sedac_hf.cli.env import kernels, machine
    from sedac_hf.evaluation.random_decoders import forced_policy, random_decoder
    from sedac_hf.modeling import SedacForCausalLM

    device, dtype = place_and_dtype()
    weights = random_decoder(shape, dtype=dtype, device="meta", **sizes)
    needed = ROOM + sum(p.numel() * p.element_size() for p in weights.parameters())
    free = free_memory(device)
    if needed > free:
        return {"skipped": f"it needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"}
    model = SedacForCausalLM.from_base(random_decoder(shape, dtype=dtype, device=device, **sizes))
    model.install(forced_policy(model.runtime, "select", share))
    seconds, choices, measured = _measure(model, rounds, tokens)
    rates = {name: 1 / value for name, value in seconds.items()}
    return {
        "shape": shape,
        "weights": "random",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "machine": machine() | kernels(),
        "tokens_per_second": rates,
        "speed_up": {name: rate / rates["dense"] for name, rate in rates.items()},
        "share_asked": share,
        "needed_bytes_share": measured,
        "choices": choices,
    }


def place_and_dtype() -> tuple[str, torch.dtype]:
    """A GPU where there is one, else the CPU; bfloat16 where that is fast."""
    import torch

    from sedac_hf.ops.compiled import instruction_sets

    if torch.cuda.is_available():
        return "cuda", torch.bfloat16
    fast = instruction_sets()[:1] == ["avx512-bf16"]
    return "cpu", torch.bfloat16 if fast else torch.float32


def free_memory(device: str) -> int:
    """Bytes that can be had on the device; on the CPU also within the limit of a container."""
    if device != "cpu":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((MEMORY_LIMIT / "memory.max").read_text())  # "max" where there is none
        used = int((MEMORY_LIMIT / "memory.current").read_text())
        statistic = dict(line.split() for line in (MEMORY_LIMIT / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistic["inactive_file"]))  # a cache of files gives way
    except (OSError, ValueError, KeyError):
        pass
    return free


def _measure(model: SedacForCausalLM, rounds: int, tokens: int) -> tuple[dict[str, float], list[str], float]:
    """Median seconds per token by variant; what `generate` chose under the policy, and the needed share there."""
    import torch

    from sedac_hf.evaluation.speed import TokenClock

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(model.device)

    def generate(count: int) -> list[float]:
        clock = TokenClock()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            prompt="cut",  # so that the needed share is that of every token counted
            logits_processor=[clock],
        )
        return [seconds for seconds, _ in clock.steps()]

    variants: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "sedac": nullcontext,  # first: `generate` measures its choice with the policy in place
        "nothing skipped": model.full_width,
        "dense": model.disable,
    }
    steps: dict[str, list[float]] = {name: [] for name in variants}
    choices: list[str] = []
    share = 1.0
    for _ in range(rounds):
        for name, switch in variants.items():
            with switch():
                generate(WARM_UP)
                model.reset_stats()
                steps[name] += generate(tokens)
            if name == "sedac":
                choices += [text for text in model.stats().choices if text not in choices]
                share = model.stats().needed_bytes_share
    return {name: statistics.median(steps[name]) for name in reversed(variants)}, choices, share


def print_speed(speed: dict[str, Any]) -> None:
    """The figures as text on standard output."""
    if "skipped" in speed:
        typer.echo(f"\nspeed on this machine: left out, {speed['skipped']}")
        return
    about = speed["machine"]
    typer.echo(
        f"\nspeed on this machine: a decoder of the {speed['shape']} shape with random weights (so this shows speed "
        f"only), one row, {speed['dtype']}, {speed['device']}\n{about['processor']}, {about['cores usable']} cores, "
        f"kernels {about['kernels']}; medians of one run, the three in turn"
    )
    labels = {
        "dense": "plain Hugging Face",
        "nothing skipped": "wrapped, nothing skipped",
        "sedac": f"SEDAC, {speed['needed_bytes_share']:.0%} of the FFN bytes per token",
    }
    for name, label in labels.items():
        rate, gain = speed["tokens_per_second"][name], speed["speed_up"][name]
        typer.echo(f"  {label:<40}{rate:8.1f} tokens/s {gain:6.2f}x")
    for text in speed["choices"]:
        typer.echo(f"  generate ran {text}")
