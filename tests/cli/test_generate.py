"""`sedac-hf generate` and what the demo shows per token."""

from __future__ import annotations

import json

import pytest

from sedac_hf import ConfigError, SedacForCausalLM, load_demo
from sedac_hf.cli.demo import parse_budgets
from sedac_hf.cli.main import main
from sedac_hf.cli.per_token import print_completion
from sedac_hf.evaluation.per_token import completion_ratios
from tests.policies import random_policy

PROMPT = "def main(argv):\n"


@pytest.fixture(scope="module")
def demo():
    base, tokenizer = load_demo()
    model = SedacForCausalLM.from_base(base)
    model.install(random_policy(model.runtime, "truncate"))
    return model, tokenizer


def test_json_output_holds_text_ids_and_statistics(tmp_path, demo, capsys):
    model, tokenizer = demo
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    arguments = ["generate", str(tmp_path / "saved"), PROMPT, "--max-new-tokens", "4", "--consistent", "--json"]
    assert main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"].startswith(PROMPT)
    assert len(printed["ids"]) == len(tokenizer(PROMPT)["input_ids"]) + 4
    assert printed["stats"]["choices"] == {"cut: asked for": 1}
    assert 0 < printed["stats"]["needed_bytes_share"] < 1


def test_wrong_use_is_explained(capsys):
    assert main(["generate", "demo", ""]) == 2
    assert "at least one token" in capsys.readouterr().err
    assert main(["generate", "demo", "x", "--prompt-width", "half"]) == 1
    assert "'full' or 'cut'" in capsys.readouterr().err


def test_ratios_are_those_of_the_law_token_by_token(demo):
    model, tokenizer = demo
    tokens = completion_ratios(model, tokenizer, PROMPT, 6)
    text = tokenizer.decode(model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=6, do_sample=False,
                                           consistent=True)[0])  # fmt: skip
    assert text == PROMPT + "".join(token.text for token in tokens)
    assert all(0 <= token.ratio < 1 for token in tokens)
    assert len({token.ratio for token in tokens}) > 1
    full = completion_ratios(model, tokenizer, PROMPT, 3, prompt="full")
    assert full[0].ratio == 0.0


def test_completion_is_printed_with_a_digit_per_token(demo, capsys):
    model, tokenizer = demo
    print_completion(model, tokenizer, PROMPT, 5)
    printed = capsys.readouterr().out
    assert "def main(argv):" in printed
    assert "mean over the completion" in printed


def test_budgets_are_checked():
    assert parse_budgets("0.01, 0.02") == [0.01, 0.02]
    for bad in ("", "a", "0", "0.01,1.5"):
        with pytest.raises(ConfigError, match="budgets"):
            parse_budgets(bad)
