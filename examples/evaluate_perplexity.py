"""Perplexity of a calibrated decoder beside its dense self: same run, same tokens, text that calibration never saw.

python examples/evaluate_perplexity.py
"""

from __future__ import annotations

from sedac_hf import SedacForCausalLM, load_demo, perplexity
from sedac_hf.evaluation import stdlib_documents


def main() -> None:
    decoder, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(decoder)
    texts = [document.text for document in stdlib_documents("heldout")]
    calibration, evaluation = texts[0:32:2], texts[1:8:2]

    for objective in ("latency", "throughput"):
        model.calibrate(tokenizer, calibration, max_ppl_increase=0.02, objective=objective, progress=False)
        model.reset_stats()
        result = perplexity(model, tokenizer, evaluation, context=256)
        assert result.dense is not None
        rise = result.perplexity / result.dense.perplexity - 1
        print(
            f"{objective}: perplexity {result.perplexity:.3f}, dense {result.dense.perplexity:.3f} ({rise:+.2%}), "
            f"{result.protocol}, context {result.context}, {result.tokens} tokens scored, {result.dtype}; "
            f"needed {model.stats().needed_bytes_share:.1%} of the FFN bytes"
        )


if __name__ == "__main__":
    main()
