"""Quality against compute on the embedded decoder: perplexity at given needed shares, on at least 50,000 tokens.

    python benchmarks/quality.py [--tokens 51000] [--json FILE]

Calibration and evaluation use disjoint held-out files of this Python's standard library; the dense figure is of the
same run. A share that calibration could not meet exactly is printed as it was measured.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from sedac_hf import SedacForCausalLM, load_demo
from sedac_hf.cli.demo import CONTEXT, print_table
from sedac_hf.cli.demo_text import calibration_documents, evaluation_documents
from sedac_hf.cli.env import machine
from sedac_hf.evaluation import score
from sedac_hf.evaluation.quality import dense_row, measure, spread_windows

SHARES = {"throughput": (0.77, 0.68), "latency": (0.55, 0.45, 0.36)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=51_000, help="held-out tokens to score")
    parser.add_argument("--seed", type=int, default=0, help="seed of the calibration")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()

    base, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(base)
    windows = spread_windows(evaluation_documents(), tokenizer, context=CONTEXT, tokens=arguments.tokens)
    dense = score(model, windows)
    rows, seconds = [dense_row(dense)], {}
    for objective, shares in SHARES.items():
        for share in shares:
            start = time.monotonic()
            report = model.calibrate(
                tokenizer,
                calibration_documents(),
                share=share,
                objective=objective,
                context=CONTEXT,
                seed=arguments.seed,
            )
            print(report)
            name = f"{model.config.cut}, share {share:.0%} asked"
            seconds[name] = time.monotonic() - start
            rows.append(measure(model, windows, dense, name, model.config.cut))
    result = {
        "tokens_scored": int(dense.tokens.sum()),
        "protocol": windows.protocol,
        "context": CONTEXT,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": machine(),
        "calibration_seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }
    print_table(rows, result)
    for name, value in seconds.items():
        print(f"calibration, {name}: {value:.0f} s")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
