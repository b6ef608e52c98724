"""Probes, controller and cut FFNs attached to a model: hooks, forward-pass state, the per-call choice, statistics."""

from sedac_hf.runtime.forward_pass import GenerationCall, generating
from sedac_hf.runtime.runtime import SedacRuntime
from sedac_hf.runtime.stats import CheckpointStats, SedacStats

__all__ = ["CheckpointStats", "GenerationCall", "SedacRuntime", "SedacStats", "generating"]
