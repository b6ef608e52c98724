"""Perplexity of a calibrated decoder beside its dense self: same run, same tokens, text that calibration never saw.

python examples/evaluate_perplexity.py
"""

from __future__ import annotations

from sedac_hf import SedacForCausalLM, load_demo
from sedac_hf.evaluation import compare, stdlib_documents

# Little text, to be quick: leave the token counts out where the figures matter.
QUICK = {"context": 256, "fit_tokens": 2048, "held_out_tokens": 4096, "progress": False}


def main() -> None:
    decoder, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(decoder)
    texts = [document.text for document in stdlib_documents("heldout")]
    seen, unseen = texts[:24], texts[24:]

    model.calibrate(tokenizer, seen, max_ppl_increase=0.02, objective="throughput", **QUICK)
    result = compare(model, tokenizer, unseen, context=256, max_tokens=4096, progress=False)
    dense, cut = result.dense, result.cut
    assert result.interval is not None
    assert result.stats is not None
    print(f"{cut.protocol} windows, context {cut.context}, {cut.tokens} tokens scored, {cut.dtype}")
    print(
        f"perplexity {dense.perplexity:.3f} dense, {cut.perplexity:.3f} cut: {result.relative_increase:+.2%}, "
        f"interval over {result.unit} {result.interval[0]:+.2%} to {result.interval[1]:+.2%}; "
        f"needed {result.stats['needed_bytes_share']:.1%} of the FFN bytes"
    )


if __name__ == "__main__":
    main()
