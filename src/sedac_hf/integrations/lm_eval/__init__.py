"""The model "sedac" of the LM evaluation harness (lm_eval).

Importing this module registers it. lm_eval 0.4.13 looks for no plug-ins, so ``python -m
sedac_hf.integrations.lm_eval`` takes the place of its command, with the same arguments; for later versions the entry
point of the group ``lm_eval.models`` is declared. A model in memory needs neither: the harness's own
``HFLM(pretrained=model, tokenizer=tokenizer)`` takes a `SedacForCausalLM` as it is.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from sedac_hf.modeling import SedacForCausalLM
from sedac_hf.saving.reading import tokenizer_path


@register_model("sedac")
class SedacLM(HFLM):
    """`HFLM` for SEDAC models, adapters, and plain decoders (uncalibrated).

    Answers are generated with ``consistent=True``: a score must not depend on the machine's speed. ``config.sedac`` of
    the results holds `SedacForCausalLM.stats` of the run, of process 0 where there are several.

    Args:
        pretrained: folder, hub id, or a `SedacForCausalLM`.
        dense: score the same weights without the policy.
        kwargs: as of `HFLM`; what it does not know goes to `SedacForCausalLM.from_pretrained`.
    """

    AUTO_MODEL_CLASS = SedacForCausalLM

    def __init__(self, pretrained: str | SedacForCausalLM, dense: bool = False, **kwargs: Any) -> None:
        super().__init__(pretrained, **{"backend": "causal", **kwargs})
        if dense:
            self.model.uninstall()
        self.model.reset_stats()

    def get_model_info(self) -> dict[str, Any]:
        return {**super().get_model_info(), "sedac": self.model.stats().to_dict()}

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if not tokenizer and isinstance(pretrained, str):
            tokenizer = tokenizer_path(pretrained, self.config)
        super()._create_tokenizer(pretrained, tokenizer, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        return super()._model_generate(*args, **kwargs, consistent=True)
