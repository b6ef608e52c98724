"""`sedac-hf env`: versions, machine and settings, for reports of problems and beside every measured figure."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGES = (
    "sedac-hf", "torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub", "numpy",
    "triton", "datasets", "evaluate", "lm_eval",
)  # fmt: skip
# Those that decide which CPU kernels exist; /proc/cpuinfo lists a hundred more.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def command(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Print versions, machine, threads and SEDAC_* variables."""
    facts = collect()
    if json_output:
        typer.echo(json.dumps(facts, indent=2))
        return
    for section, values in facts.items():
        typer.echo(section)
        for name, value in values.items():
            typer.echo(f"  {name:<24} {value}")


def collect() -> dict[str, dict[str, Any]]:
    """The same facts as plain types, by section: versions, machine, torch, sedac."""
    return {"versions": _versions(), "machine": machine(), "torch": _torch(), "sedac": _sedac()}


def machine() -> dict[str, Any]:
    """Operating system, processor and its features; "unknown" where the system does not tell."""
    cpuinfo = _cpuinfo()
    flags = set((cpuinfo.get("flags") or cpuinfo.get("Features") or "").split())
    return {
        "system": platform.platform(),
        "processor": cpuinfo.get("model name") or platform.processor() or "unknown",
        "cores usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu features": " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown",
    }


def kernels() -> dict[str, Any]:
    """What the compiled CPU kernels use: instruction set, the others that they could, and whose threads."""
    from sedac_hf.ops.compiled import instruction_sets
    from sedac_hf.ops.threads import kernel_threads, parallel_address

    used, *others = instruction_sets() or ["none: there is no compiled module"]
    facts: dict[str, Any] = {"kernels": used}
    if others:
        facts["kernels could use"] = ", ".join(others)
        whose = "torch's own" if parallel_address() else "a pool beside torch's"
        facts["kernel threads"] = f"{kernel_threads()}, {whose}"
    return facts


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": f"{platform.python_version()} ({sys.executable})"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "not built in",
        "cuda devices": torch.cuda.device_count(),
    }
    for index in range(torch.cuda.device_count()):
        facts[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return facts


def _sedac() -> dict[str, Any]:
    compiled = importlib.util.find_spec("sedac_hf._rust")
    facts: dict[str, Any] = {
        "package": str(Path(__file__).parents[1]),
        "compiled module": "no: the Python engine takes over" if compiled is None else f"yes: {compiled.origin}",
        **kernels(),
    }
    settings = {name: value for name, value in sorted(os.environ.items()) if name.startswith("SEDAC_")}
    return facts | (settings or {"SEDAC_* variables": "none set"})
