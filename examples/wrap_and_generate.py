"""Wrap a decoder, calibrate it to a budget, generate, save, load.

python examples/wrap_and_generate.py                       # the embedded decoder
python examples/wrap_and_generate.py Qwen/Qwen3-0.6B a.jsonl   # any decoder, any text
"""

from __future__ import annotations

import sys
import tempfile

from transformers import AutoTokenizer

from sedac_hf import SedacForCausalLM, demo_path
from sedac_hf.evaluation import read_documents, stdlib_documents

PROMPT = "def read_lines(path):\n"

# Little text, to be quick: leave the token counts out where the figures matter.
QUICK = {"context": 256, "fit_tokens": 2048, "held_out_tokens": 4096, "progress": False}


def main(decoder: str, texts: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = SedacForCausalLM.from_pretrained(decoder, device_map="auto", dtype="float32")  # a CPU is slow in fp16
    report = model.calibrate(tokenizer, texts, max_ppl_increase=0.02, **QUICK)
    print(report)

    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    # consistent=True cuts even where full width would be quicker, as it is on a decoder as small as the embedded one.
    options = {"max_new_tokens": 24, "do_sample": False, "consistent": True}
    output = model.generate(**inputs, **options)
    print(tokenizer.decode(output[0]))
    stats = model.stats()
    print(f"needed {stats.needed_bytes_share:.1%} of the FFN bytes; saved {stats.saved_bytes_share:.1%} in this run")

    with model.disable():
        dense = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    n = min(output.shape[1], dense.shape[1])
    same = (output[0, :n] == dense[0, :n]).long().cumprod(0).sum()
    print(f"the first {same - inputs['input_ids'].shape[1]} new tokens are those of the dense decoder")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, adapter_only=True)
        again = SedacForCausalLM.from_pretrained(folder, dtype="float32")
        assert again.generate(**inputs, **options).equal(output)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(sys.argv[1], [document.text for document in read_documents(sys.argv[2])])
    else:
        main(str(demo_path()), [document.text for document in stdlib_documents("heldout")[:24]])
