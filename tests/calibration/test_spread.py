"""The constant level: a policy without probes, and what the law is compared with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sedac_hf.calibration.law import LawShape, centre_of, layer_configs
from sedac_hf.ffn.policy import Policy
from sedac_hf.runtime import SedacRuntime
from tests.policies import random_policy
from tests.tiny_models import tiny_model, token_ids


def _flat(policy: Policy, keep: float) -> Policy:
    layers = tuple(item.layer_idx for item in policy.layer_configs)
    zeros = (0.0,) * len(layers)
    configs = layer_configs(LawShape(0.0, zeros, zeros, 1.0), layers, centre_of(keep), 0.0, np.zeros((len(layers), 0)))
    return replace(policy, layer_configs=configs, confidence_decay=0.0)


@pytest.mark.parametrize("cut", ["select", "truncate"])
@torch.no_grad()
def test_a_constant_law_runs_no_probe_and_gives_the_forced_level(cut: Any) -> None:
    runtime = SedacRuntime(tiny_model("llama"))
    policy = _flat(random_policy(runtime, cut), keep=0.45)
    runtime.install(policy)
    ids = token_ids(3, 11)
    ran: list[torch.Tensor] = []
    for probe in policy.probes.layers.values():
        probe.register_forward_hook(lambda module, args, output: ran.append(output))
    got = runtime.model(ids).logits
    stats = runtime.stats()
    assert not ran
    assert [item.tokens for item in stats.checkpoints] == [33] * len(runtime.checkpoint_layers)
    runtime.tally.reset()
    with runtime.forced_levels(4):  # 0.45 of 8 levels, rounded up
        assert torch.equal(runtime.model(ids).logits, got)
    assert runtime.stats().needed_bytes_share == stats.needed_bytes_share


def test_a_law_that_reads_risks_runs_its_probes() -> None:
    runtime = SedacRuntime(tiny_model("llama"))
    runtime.install(random_policy(runtime, "select"))
    assert runtime.probes_decide
    moving = SedacRuntime(tiny_model("llama"), adaptive_thresholds=True)
    moving.install(_flat(random_policy(moving, "select"), keep=0.45))
    assert moving.probes_decide  # thresholds that follow the risks can turn a constant level into another law
