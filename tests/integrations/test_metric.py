"""The `evaluate` module, loaded from its folder without a network, in a process with caches of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sedac_hf import SedacForCausalLM
from sedac_hf.assets import demo_path, load_demo
from sedac_hf.evaluation import perplexity
from sedac_hf.integrations import metric_path

ROOT = Path(__file__).parents[2]
TEXTS = [
    "import os\n\ndef f(x):\n    return os.path.join(x, 'a')\n",
    "class A:\n    def __init__(self):\n        pass\n",
]
SCRIPT = """
import evaluate, json, sys
from sedac_hf import EvaluationError, load_demo
metric = evaluate.load(sys.argv[1])
texts = json.loads(sys.argv[3])
by_path = metric.compute(predictions=texts, model=sys.argv[2], protocol="document", context=64,
                         model_kwargs={"dtype": "float32"})
model, tokenizer = load_demo()
in_memory = metric.compute(predictions=texts, model=model, tokenizer=tokenizer, protocol="document", context=64)
try:
    metric.compute(predictions=texts, model=model)
except EvaluationError as error:
    message = str(error)
print(json.dumps([by_path, in_memory, message]))
"""


def test_loads_from_its_folder_offline_and_agrees(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, metric_path(), str(demo_path()), json.dumps(TEXTS)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={**os.environ, **offline, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    by_path, in_memory, message = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer = load_demo()
    expected = perplexity(model, tokenizer, TEXTS, protocol="document", context=64, progress=False)
    for found in (by_path, in_memory):
        assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
        assert found["tokens"] == expected.tokens
        assert [document["bytes"] for document in found["documents"]] == [len(text) for text in TEXTS]
    assert by_path["dense"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert in_memory["dense"] is None
    assert "must come with its tokenizer" in message


def test_an_adapter_takes_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    pytest.importorskip("evaluate")
    from sedac_hf.integrations.sedac_perplexity.sedac_perplexity import SedacPerplexity

    model, tokenizer = load_demo()
    SedacForCausalLM.from_base(model).save_pretrained(tmp_path / "adapter", adapter_only=True)
    arguments = {"protocol": "document", "context": 64, "model_kwargs": {"dtype": "float32"}}
    found = SedacPerplexity()._compute(TEXTS, model=str(tmp_path / "adapter"), **arguments)
    expected = perplexity(model, tokenizer, TEXTS, protocol="document", context=64, progress=False)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
