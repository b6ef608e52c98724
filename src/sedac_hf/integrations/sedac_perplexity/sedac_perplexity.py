"""Perplexity as an `evaluate` metric: `evaluate.load(sedac_hf.integrations.metric_path())`.

`evaluate` copies this file into its cache and runs it there, so it takes everything from the installed package.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation import perplexity
from sedac_hf.modeling import SedacForCausalLM
from sedac_hf.saving.reading import tokenizer_path

_DESCRIPTION = """\
Perplexity of a causal language model, weighted by tokens, under a named protocol (sliding, windows or document). For a
SEDAC model, the dense model's in the same run as well. Not to be compared with evaluate's own "perplexity", which
averages the perplexities of single texts.
"""

_INPUTS = """\
Args:
    predictions (list of str): the texts, one document each.
    model: path or hub id of a plain decoder, a SEDAC model or a SEDAC adapter; or a model in memory.
    tokenizer: path, hub id or tokenizer; needed for a model in memory, else the model's own.
    protocol, context, stride, join, bos, max_tokens, batch_size: as of `sedac_hf.evaluation.perplexity`.
    model_kwargs (dict): passed to from_pretrained (dtype, device_map, ...).
Returns:
    dict with perplexity, mean_nll (nats per token), bits_per_byte, tokens, protocol, context, stride, dtype, device,
    documents; dense (the same figures at full width) for a SEDAC model, else None.
"""


class SedacPerplexity(evaluate.Metric):
    """See `_DESCRIPTION`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any,
        tokenizer: Any = None,
        model_kwargs: dict[str, Any] | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        if isinstance(model, str):
            path, model = model, SedacForCausalLM.from_pretrained(model, **(model_kwargs or {}))
            tokenizer = tokenizer_path(path, model.config) if tokenizer is None else tokenizer
        if isinstance(tokenizer, str):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if tokenizer is None:
            raise EvaluationError("a model in memory must come with its tokenizer: give tokenizer=")
        result = perplexity(model, tokenizer, list(predictions), progress=progress, **kwargs)
        figures: dict[str, Any] = result.to_dict()
        return figures
