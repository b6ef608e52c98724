"""Cut FFNs: one contract, a masking reference that defines the result, and engines that compute less.

`cut_ffn` is the entry. An engine is one function ``(x, weights, cut) -> y`` in a file of its own, listed in
dispatch.py.
"""

from sedac_hf.ops.contract import Compensation, FFNWeights, OperatingPoint, Record, SiteCut
from sedac_hf.ops.dispatch import ENGINES, cut_ffn
from sedac_hf.ops.level_plan import LevelPlan

__all__ = [
    "ENGINES",
    "Compensation",
    "FFNWeights",
    "LevelPlan",
    "OperatingPoint",
    "Record",
    "SiteCut",
    "cut_ffn",
]
