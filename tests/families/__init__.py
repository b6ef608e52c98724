"""Tiny random decoders of every causal-LM model type that transformers knows: ``build(model_type)``.

Configurations come from rules on field names (`shrinking`) and a table of what the rules get wrong (`exceptions`).
"""

from tests.families.builder import MODEL_TYPES, build, inputs_for, vocabulary
from tests.families.exceptions import NOT_BUILT
from tests.families.shrinking import tiny_config

__all__ = ["MODEL_TYPES", "NOT_BUILT", "build", "inputs_for", "tiny_config", "vocabulary"]
