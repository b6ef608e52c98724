"""`calibrate` from text to policy, on tiny decoders that read text they wrote themselves."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sedac_hf import SedacConfig, SedacForCausalLM
from sedac_hf.calibration import CalibrationReport, calibrate
from sedac_hf.errors import CalibrationError, UnsupportedModelError
from sedac_hf.evaluation import Document
from sedac_hf.ffn.deciders import SiteUnits
from sedac_hf.runtime import SedacRuntime
from tests.evaluation.tokenizers_for_tests import WORDS, word_tokenizer
from tests.ffn.test_shadow import Opaque
from tests.tiny_models import tiny_model

VOCABULARY = len(WORDS) + 3
SIZES: dict[str, Any] = {
    "context": 64, "fit_tokens": 2048, "held_out_tokens": 1280, "probe_rank": 4, "progress": False,
}  # fmt: skip


def _model(family: str) -> PreTrainedModel:
    return tiny_model(family, vocab_size=VOCABULARY, ffn_scale=4.0)


def _own_text(model: PreTrainedModel, documents: int = 48, length: int = 100) -> list[Document]:
    """What the decoder itself would write: a random decoder predicts no other text better than chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.randint(3, VOCABULARY, (documents, 1))
        settings = {"do_sample": True, "temperature": 0.7, "top_k": 0, "suppress_tokens": [0, 1, 2]}
        ids = model.generate(start, max_new_tokens=length - 1, pad_token_id=0, **settings)
    return [Document(" ".join(WORDS[i - 3] for i in row), f"doc{n}") for n, row in enumerate(ids.tolist())]


@pytest.fixture(scope="module")
def texts() -> dict[str, list[Document]]:
    return {family: _own_text(_model(family)) for family in ("llama", "gpt2", "phi3")}


TOKENIZER = word_tokenizer(adds_bos=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_share_is_met_and_everything_is_undone(
    family: str, objective: Any, texts: dict[str, list[Document]]
) -> None:
    model = _model(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    runtime = SedacRuntime(model)
    # Probes of any rank are a large share of such tiny FFNs, hence the mild share.
    report = calibrate(runtime, TOKENIZER, texts[family], share=0.8, objective=objective, **SIZES)
    policy = runtime.policy
    assert policy is not None
    assert policy.cut == {"latency": "select", "throughput": "truncate"}[objective]
    assert report.needed_bytes == pytest.approx(0.8, abs=0.06)
    assert report.fit_tokens >= 1024
    assert report.ppl_increase <= report.ppl_increase_bound
    assert len(report.checkpoints) == len(runtime.checkpoint_layers) == len(policy.risk_scale)
    assert any(item.mean_ratio > 0 for item in report.checkpoints)
    assert CalibrationReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert "FFN bytes not needed" in str(report)
    runtime.uninstall()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_a_budget_is_kept_and_a_second_one_reuses_the_statistics(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    runtime.model.register_forward_hook(count)
    loose = calibrate(runtime, TOKENIZER, texts["llama"], max_ppl_increase=0.1, **SIZES)
    first, calls = calls, 0
    tight = calibrate(runtime, TOKENIZER, texts["llama"], max_ppl_increase=0.04, **SIZES)
    assert calls < first / 2
    for report, budget in ((loose, 0.1), (tight, 0.04)):
        assert report.ppl_increase_bound <= budget
    assert loose.needed_bytes <= tight.needed_bytes


def test_the_same_seed_gives_the_same_policy(texts: dict[str, list[Document]]) -> None:
    made = []
    for _ in range(2):
        runtime = SedacRuntime(_model("llama"))
        calibrate(runtime, TOKENIZER, texts["llama"], share=0.8, **SIZES)
        assert runtime.policy is not None
        made.append(runtime.policy)
    assert made[0].to_config() == made[1].to_config()
    for name, tensor in made[0].to_tensors().items():
        assert torch.equal(tensor, made[1].to_tensors()[name]), name


def _is_as_it_was(runtime: SedacRuntime, before: dict[str, torch.Tensor]) -> bool:
    same = all(torch.equal(p, before[name]) for name, p in runtime.model.named_parameters())
    usual = all(p.is_contiguous() for p in runtime.model.parameters())
    return same and usual and not runtime.attached and runtime.policy is None


def test_a_budget_that_cannot_be_kept_leaves_the_model_as_it_was(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    before = {name: p.detach().clone() for name, p in runtime.model.named_parameters()}
    with pytest.raises(CalibrationError, match="no policy keeps the budget"):
        calibrate(runtime, TOKENIZER, texts["llama"], max_ppl_increase=1e-7, objective="throughput", **SIZES)
    assert _is_as_it_was(runtime, before)


def test_a_former_policy_survives_a_failure(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    calibrate(runtime, TOKENIZER, texts["llama"], share=0.8, **SIZES)
    former = runtime.policy
    with pytest.raises(CalibrationError, match="at least"):
        calibrate(runtime, TOKENIZER, texts["llama"], share=0.01, **SIZES)
    assert runtime.policy is former
    assert runtime.attached


def test_nan_in_the_model_is_an_error(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    with torch.no_grad():
        runtime.sites[2].down.weight[3, 3] = float("nan")
    with pytest.raises(CalibrationError, match=r"finite numbers, got NaN in model.layers.2.mlp.down_proj.weight: "):
        calibrate(runtime, TOKENIZER, texts["llama"], **SIZES)
    assert runtime.policy is None
    assert not runtime.attached


def test_infinite_logits_are_an_error(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    with torch.no_grad():
        runtime.sites[2].down.weight[3, 3] = float("inf")
    with pytest.raises(CalibrationError, match="logits must be finite"):
        calibrate(runtime, TOKENIZER, texts["llama"], **SIZES)
    assert not runtime.attached


def test_a_context_over_the_limit_is_an_error(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(_model("llama"))
    limit = runtime.model.config.max_position_embeddings
    with pytest.raises(CalibrationError, match=f"context must be at most {limit}, .*got {limit + 1}"):
        calibrate(runtime, TOKENIZER, texts["llama"], **{**SIZES, "context": limit + 1})
    assert not runtime.attached


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_an_interrupt_at_any_forward_leaves_everything_as_it_was(
    objective: Any, texts: dict[str, list[Document]]
) -> None:
    model = SedacForCausalLM.from_base(_model("llama"), SedacConfig(extra_memory=1.0))
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    ids = torch.arange(3, 20)[None]
    calls, stop = 0, -1

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    model.runtime.decoder_layers[2].register_forward_hook(count)
    # All of a run, then a former policy of the other cut, and then runs that end early.
    model.calibrate(TOKENIZER, texts["llama"], share=0.8, objective=objective, **SIZES)
    total = calls
    other: Any = {"latency": "throughput", "throughput": "latency"}[objective]
    model.calibrate(TOKENIZER, texts["llama"], share=0.8, objective=other, **SIZES)
    former, config = model.runtime.policy, model.config.to_dict()
    with torch.no_grad():
        expected = model(ids).logits
    for part in (0.05, 0.3, 0.6, 0.9):
        calls, stop = 0, max(1, int(part * total))
        with pytest.raises(KeyboardInterrupt):  # another seed: nothing of the run before is reused
            model.calibrate(TOKENIZER, texts["llama"], share=0.8, objective=objective, seed=stop, **SIZES)
        stop = -1
        assert model.runtime.policy is former
        assert model.config.to_dict() == config
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)
    model.uninstall()
    calls, stop = 0, total // 2
    with pytest.raises(KeyboardInterrupt):
        model.calibrate(TOKENIZER, texts["llama"], share=0.8, objective=objective, seed=1, **SIZES)
    assert _is_as_it_was(model.runtime, before)
    assert not model.config.calibrated


def test_a_tokenizer_that_does_not_fit_is_an_error(texts: dict[str, list[Document]]) -> None:
    runtime = SedacRuntime(tiny_model("llama", vocab_size=30))
    with pytest.raises(CalibrationError, match="token id"):
        calibrate(runtime, TOKENIZER, texts["llama"], **SIZES)
    runtime = SedacRuntime(tiny_model("llama", vocab_size=VOCABULARY, ffn_scale=40.0))
    with pytest.raises(CalibrationError, match="better than chance"):
        calibrate(runtime, TOKENIZER, texts["gpt2"], **SIZES)


def test_too_little_text_is_an_error(texts: dict[str, list[Document]]) -> None:
    with pytest.raises(CalibrationError, match="give more text"):
        calibrate(SedacRuntime(_model("llama")), TOKENIZER, texts["llama"][:4], **SIZES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_ppl_increase": 0.0}, "above 0"),
        ({"max_ppl_increase": float("nan")}, "above 0"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"objective": "speed"}, "'latency' or 'throughput'"),
        ({"confidence": 1.0}, "confidence"),
        ({"n_levels": 1}, "n_levels"),
        ({"probe_rank": 0}, "probe_rank"),
        ({"checkpoint_layers": [0]}, "runtime's"),
    ],
)
def test_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate(SedacRuntime(_model("llama")), TOKENIZER, [], **{**SIZES, **wrong})


def test_weights_that_cannot_be_read_are_decided_by_the_exact_gate(texts: dict[str, list[Document]]) -> None:
    model = _model("llama")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ("gate_proj", "up_proj", "down_proj"):
                setattr(module, name, Opaque(child))
    runtime = SedacRuntime(model)
    report = calibrate(runtime, TOKENIZER, texts["llama"], share=0.8, objective="latency", **SIZES)
    assert report.needed_bytes == pytest.approx(0.8, abs=0.06)
    with pytest.raises(UnsupportedModelError, match="latency"):
        calibrate(runtime, TOKENIZER, texts["llama"], share=0.8, objective="throughput", **SIZES)
    assert runtime.policy is not None
    assert runtime.policy.cut == "select"


class Doubled(torch.nn.Module):
    """An FFN whose formula is none that is known, and whose activation is no attribute."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.down_proj.weight.data /= 2  # so that the decoder stays what it was

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(2 * torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_hidden_values_decide_where_no_activation_can_be_read(texts: dict[str, list[Document]]) -> None:
    model = _model("llama")
    for layer in model.model.layers:
        layer.mlp = Doubled(layer.mlp)
    runtime = SedacRuntime(model)
    report = calibrate(runtime, TOKENIZER, texts["llama"], share=0.9, objective="latency", **SIZES)
    assert {type(deciding) for deciding in runtime.weights.shadows} == {SiteUnits}
    assert report.needed_bytes == pytest.approx(0.9, abs=0.06)
    assert report.ppl_increase < 0.2
    runtime.tally.reset()
    with torch.no_grad():
        model(torch.randint(3, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(0)))
    stats = runtime.stats()
    assert 2 / 3 < stats.needed_bytes_share < 1, "gate and up are read whole, down in part"
    assert stats.saved_bytes_share <= 0
