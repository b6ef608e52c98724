from __future__ import annotations

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sedac_hf.assets import load_demo


@pytest.fixture(scope="session")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_demo()
