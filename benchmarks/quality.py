"""Quality against compute on the embedded decoder: perplexity at given needed shares, on at least 50,000 tokens.

    python benchmarks/quality.py [--tokens 51000] [--objective throughput] [--no-refit] [--json FILE]

Calibration and evaluation use disjoint held-out files of this Python's standard library; the dense figure is of the
same run. A share that calibration could not meet exactly is printed as it was measured. Beside each policy stands the
best constant level at the same share, without probes, and the KL of both to the dense output, which tells them apart
on far fewer tokens than perplexity does.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from sedac_hf import SedacForCausalLM, load_demo
from sedac_hf.calibration.dial import prepared
from sedac_hf.calibration.pipeline import fitted_dial
from sedac_hf.calibration.spread import Reference
from sedac_hf.cli.demo import CONTEXT, print_table
from sedac_hf.cli.demo_text import calibration_documents, evaluation_documents
from sedac_hf.cli.env import machine
from sedac_hf.configuration import Objective
from sedac_hf.evaluation import DocumentScores, WindowSet, score
from sedac_hf.evaluation.quality import QualityRow, dense_row, measure, spread_windows

KL_TOKENS = 20_000
SHARES: dict[Objective, tuple[float, ...]] = {"throughput": (0.77, 0.68), "latency": (0.55, 0.45, 0.36)}


def constant_row(
    model: SedacForCausalLM,
    objective: Objective,
    share: float,
    windows: WindowSet,
    dense: DocumentScores,
    reference: Reference,
) -> tuple[QualityRow, float]:
    """The best constant level at a needed share measured on these windows, and its KL; the policy is put back."""
    runtime, policy = model.runtime, model.runtime.policy
    assert policy is not None
    dial = fitted_dial(runtime, objective)
    runtime.uninstall()
    try:
        asked = share
        with prepared(runtime, dial):
            for _ in range(2):  # once to see what the tokens really use, once with that put right
                with runtime.forced(*dial.constant(asked)):
                    row = measure(model, windows, dense, "constant level, same share", "constant")
                asked += row.bytes_not_needed - (1 - share)
            kl, _ = reference.constant_kl(dial, asked)
    finally:
        runtime.install(policy)
    return row, kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=51_000, help="held-out tokens to score")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration")
    parser.add_argument("--objective", choices=SHARES, action="append", help="only this one; default: both")
    parser.add_argument("--no-refit", action="store_true", help="leave compensation as each FFN alone wants it")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    base, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(base)
    windows = spread_windows(evaluation_documents(), tokenizer, context=CONTEXT, tokens=arguments.tokens)
    dense = score(model, windows)
    reference = Reference(model.runtime, windows, KL_TOKENS)
    rows, seconds, kl = [dense_row(dense)], {}, {}
    for objective in arguments.objective or SHARES:
        for share in SHARES[objective]:
            start = time.monotonic()
            report = model.calibrate(
                tokenizer,
                calibration_documents(),
                share=share,
                objective=objective,
                context=CONTEXT,
                seed=arguments.seed,
                refit_compensation=not arguments.no_refit,
            )
            print(report)
            name = f"{model.config.cut}, share {share:.0%} asked"
            seconds[name] = time.monotonic() - start
            rows.append(measure(model, windows, dense, name, model.config.cut))
            kl[name], _ = reference.kl()
            row, kl[f"constant level beside {name}"] = constant_row(
                model, objective, 1 - rows[-1].bytes_not_needed, windows, dense, reference
            )
            rows.append(row)
    result = {
        "tokens_scored": int(dense.tokens.sum()),
        "protocol": windows.protocol,
        "context": CONTEXT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(),
        "calibration_seconds": seconds,
        "kl_tokens": sum(logits.shape[0] for logits in reference.dense),
        "kl": kl,
        "rows": [asdict(row) for row in rows],
    }
    print_table(rows, result)
    for name, value in kl.items():
        print(f"KL to dense in nats over {result['kl_tokens']} of the tokens, {name}: {value:.5f}")
    for name, value in seconds.items():
        print(f"calibration, {name}: {value:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
