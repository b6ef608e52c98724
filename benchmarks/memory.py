"""Peaks of memory, as ratios to the base's bytes: `python benchmarks/memory.py [--layers 2] [--json FILE]`.

Each phase runs in a process of its own: load the base, set the peak back, do the phase, read the peak (Linux: VmHWM of
/proc/self/status; with a CUDA device also torch's own count). Two bases: the embedded demo decoder in float32, and a
decoder of Qwen2.5-0.5B's shape with a few layers of random weights in bfloat16. Columns: what the process held before
the phase and at its peak, both less what Python and torch take, and the peak's rise, all over the base's bytes; then
what SEDAC keeps beside the base.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PHASES = (
    "calibrate latency", "calibrate throughput", "wrap latency", "wrap throughput", "generate latency",
    "generate throughput", "save latency", "save throughput",
)  # fmt: skip
DEMO_TOKENS, SHAPE_TOKENS = 1536, 1536  # to fit on; peaks come from sizes, but hidden states are kept per token


def resident(name: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}: this benchmark needs Linux")


def settle() -> int:
    """Give freed memory back to the system, set the peak back to what is held, and return that."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return resident("VmRSS")


def make_shape(folder: Path, layers: int, tokenizer_size: int) -> None:
    """Save a random decoder of Qwen2.5-0.5B's shape that prefers the tokenizer's ids: calibration refuses chance."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:  # else what the layers add to the preference decides its sign
            layer.self_attn.o_proj.weight.mul_(0.1)
            layer.mlp.down_proj.weight.mul_(0.1)
        known = torch.arange(config.vocab_size) < tokenizer_size
        model.get_input_embeddings().weight[:, 0] = torch.where(known, 1.0, -1.0).to(torch.bfloat16)
    model.save_pretrained(folder)


def run_phase(phase: str, base: str, adapters: Path, dtype: str, tokens: int, device: str) -> dict[str, Any]:
    """One phase, in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sedac_hf import SedacForCausalLM, demo_path
    from sedac_hf.cli.demo_text import calibration_documents
    from sedac_hf.evaluation import read_documents

    what, objective = phase.split()
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    texts = list(read_documents(calibration_documents())) if what == "calibrate" else []
    adapter = adapters / objective
    torch.ones(256, 256) @ torch.ones(256, 256)  # what the libraries set up at first use is not the phase's
    empty = settle()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype)).to(device).eval()
    for parameter in model.parameters():  # a mapped file counts once it is read
        parameter.detach().sum()
    ids = tokenizer("def main() -> None:", return_tensors="pt").input_ids.to(device)
    if what in ("generate", "save"):
        model = SedacForCausalLM.from_pretrained(adapter, base_model=model)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    before = settle()
    if what == "calibrate":
        model = SedacForCausalLM.from_base(model)
        model.calibrate(
            tokenizer, texts, share=0.6, objective=objective, context=256, fit_tokens=tokens,
            held_out_tokens=max(tokens // 2, 1536), progress=False,
        )  # fmt: skip
    elif what == "wrap":
        model = SedacForCausalLM.from_pretrained(adapter, base_model=model)
    elif what == "generate":
        model.generate(ids, max_new_tokens=32, do_sample=False, consistent=True)
    else:
        with tempfile.TemporaryDirectory(dir=adapters) as folder:
            model.save_pretrained(folder)
    found = {"empty": empty, "before": before, "peak": resident("VmHWM"), "memory": model.stats().memory}
    if what == "calibrate":
        model.save_pretrained(adapter, adapter_only=True)
    if torch.cuda.is_available():
        found["cuda_peak"] = torch.cuda.max_memory_allocated()
    return found


def in_a_process(phase: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--phase", phase, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{phase} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_table(name: str, rows: dict[str, dict[str, Any]]) -> None:
    base = next(iter(rows.values()))["memory"]["base"]
    print(f"\n{name}: base {base / 2**20:.1f} MiB")
    print(f"{'over the base':<22}{'before':>10}{'peak':>10}{'rise':>10}{'shadow':>10}{'tables':>10}")
    for phase, found in rows.items():
        memory = found["memory"]
        tables = memory["extra"] - memory["shadow"]
        figures = (
            found["before"] - found["empty"], found["peak"] - found["empty"], found["peak"] - found["before"],
            memory["shadow"], tables,
        )  # fmt: skip
        cells = "".join(f"{figure / base:>10.3f}" for figure in figures)
        cuda = f"   cuda peak {found['cuda_peak'] / base:.3f}" if "cuda_peak" in found else ""
        print(f"{phase:<22}{cells}{cuda}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--layers", type=int, default=2, help="of the decoder of Qwen2.5-0.5B's shape; 0: leave it out"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    for name in ("--base", "--adapters", "--dtype", "--tokens"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        found = run_phase(args.phase, args.base, Path(args.adapters), args.dtype, int(args.tokens), args.device)
        print(json.dumps(found))
        return

    from transformers import AutoTokenizer

    from sedac_hf import demo_path
    from sedac_hf.cli.env import machine

    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases = {"demo decoder, float32": (str(demo_path()), "float32", DEMO_TOKENS)}
        if args.layers:
            make_shape(folder / "shape", args.layers, len(AutoTokenizer.from_pretrained(demo_path())))
            shape = f"{args.layers} layers of Qwen2.5-0.5B's shape, bfloat16"
            bases[shape] = (str(folder / "shape"), "bfloat16", SHAPE_TOKENS)
        for label, (base, dtype, tokens) in bases.items():
            adapters = folder / label.split()[0]
            adapters.mkdir()
            common = ("--base", base, "--adapters", str(adapters), "--dtype", dtype, "--tokens", str(tokens))
            rows = {phase: in_a_process(phase, *common, "--device", args.device) for phase in PHASES}
            results[label] = rows
            print_table(label, rows)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "bytes": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
