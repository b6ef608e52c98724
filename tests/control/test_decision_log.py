"""The ring on the device, its way to the host, and what the audit makes of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from sedac_hf.control import make_controller
from sedac_hf.control.audit import AuditCounts, DecisionAudit
from sedac_hf.control.decision_log import DecisionLog
from sedac_hf.control.torch_engine import DeviceLaw
from sedac_hf.errors import ConfigError
from tests.control.cascades import DESIGN, random_risk


def one_pass(law, log, risk):
    """What a graph does for one forward pass; levels of the last checkpoint."""
    state = law.begin(risk.shape[1])
    for i in range(law.n_checkpoints):
        risk_q = law.quantise(i, risk[i])
        state, levels = law.step(i, state, risk_q)
        log.write(i, risk_q, levels, law.version)
    return levels


def setting(capacity=64, **kwargs):
    controller = make_controller(DESIGN, alpha=0.5)
    law = DeviceLaw(controller, "cpu")
    log = DecisionLog(3, "cpu", capacity)
    return controller, law, log, DecisionAudit(controller, law, log, **kwargs)


def risks_of(n, seed=0):
    return torch.from_numpy(random_risk(3, n, seed))


def test_a_replay_of_many_passes_finds_no_mismatch():
    _, law, log, audit = setting(every=3)
    for seed in range(20):  # the ring goes round
        one_pass(law, log, risks_of(1 + seed % 7, seed))
        audit.after_pass(1 + seed % 7)
    decided = sum(1 + seed % 7 for seed in range(20)) * 3
    assert audit.flush() == AuditCounts(decided, 0, 0)
    assert audit.flush() == AuditCounts(decided, 0, 0), "nothing is replayed twice"


@pytest.mark.parametrize("what", ["levels", "risk_q"])
def test_an_altered_number_is_found(what, caplog):
    _, law, log, audit = setting()
    one_pass(law, log, torch.full((3, 8), 0.1))
    getattr(log, what)[1, 3] = 1 if what == "levels" else 30_000
    with caplog.at_level(logging.WARNING):
        counts = audit.flush()
    assert counts.mismatches >= 1
    assert counts.decisions == 24
    assert "are not the law's" in caplog.text


def test_a_lost_token_is_counted_and_the_others_replayed():
    _, law, log, audit = setting(capacity=16)
    for seed in range(5):
        one_pass(law, log, risks_of(5, seed))
    assert audit.flush() == AuditCounts(decisions=16 * 3, mismatches=0, dropped=9)


def test_a_pass_larger_than_the_ring_leaves_its_last_tokens():
    _, law, log, _ = setting(capacity=16)
    risk = risks_of(50)
    levels = one_pass(law, log, risk)
    (part,) = log.flush()
    assert part.levels[2].tolist() == levels[-16:].tolist()
    assert log.dropped == 34


def test_an_unfinished_pass_is_not_replayed():
    _, law, log, audit = setting()
    log.write(0, law.quantise(0, torch.ones(4)), torch.full((4,), 3, dtype=torch.int32), law.version)
    one_pass(law, log, risks_of(2))
    assert audit.flush() == AuditCounts(6, 0, 0)


def test_collecting_gives_what_was_there_when_it_was_asked_for():
    _, law, log, _ = setting()
    one_pass(law, log, risks_of(2))
    assert log.collect() == []
    one_pass(law, log, risks_of(3))
    assert [part.levels.shape for part in log.collect()] == [(3, 2)]
    assert [part.levels.shape for part in log.collect()] == [(3, 3)]


def test_each_pass_is_replayed_with_the_block_that_decided_it():
    controller, law, log, audit = setting()
    for threshold in (0.1, 0.5, 2.0):
        controller.set_thresholds([threshold] * 3)
        law.upload()
        one_pass(law, log, risks_of(10))
    assert len(law.blocks) == 4
    assert audit.flush() == AuditCounts(90, 0, 0)
    assert sorted(law.blocks) == [4], "blocks with nothing left to replay are dropped"


def test_thresholds_follow_the_log_where_they_are_to_adapt():
    controller, law, log, audit = setting(adaptive_thresholds=True)
    risk = risks_of(40)
    one_pass(law, log, risk)
    audit.flush()
    expected = make_controller(DESIGN, alpha=0.5)
    for config, row in zip(DESIGN, risk.numpy(), strict=True):
        expected.update_threshold(config.layer_idx, np.where(np.isfinite(row), np.maximum(row, 0), np.nan))
    np.testing.assert_allclose(controller.thresholds, expected.thresholds, atol=1e-3)
    assert int(law.version) == 2
    one_pass(law, log, risk)
    assert audit.flush() == AuditCounts(240, 0, 0)


def test_thresholds_stay_where_nothing_was_asked_for():
    controller, law, log, audit = setting()
    one_pass(law, log, risks_of(40))
    audit.flush()
    assert controller.thresholds.tolist() == make_controller(DESIGN).thresholds.tolist()


def test_statistics_are_told_what_the_law_decided():
    seen = []
    _, law, log, audit = setting(on_replay=lambda *args: seen.append(args))
    risk = torch.zeros(3, 4)
    risk[1, 2] = float("nan")
    one_pass(law, log, risk)
    audit.flush()
    ((part, exited, ratios),) = seen
    assert part.risk_q.tolist() == [[0] * 4, [0, 0, -1, 0], [0] * 4]
    assert exited.tolist() == [[True] * 4] + [[True, True, False, True]] * 2
    np.testing.assert_allclose(ratios[:, 0], [0.310, 0.664, 0.834], atol=1e-3)
    assert ratios[1:, 2].tolist() == [0, 0]


def test_the_log_is_written_inside_a_compiled_graph():
    _, law, log, audit = setting()
    compiled = torch.compile(one_pass, fullgraph=True, dynamic=False)
    with torch.no_grad():
        compiled(law, log, risks_of(3, 0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for seed in range(1, 9):
                compiled(law, log, risks_of(3, seed))
    assert audit.flush() == AuditCounts(81, 0, 0)


def test_an_odd_capacity_is_refused():
    with pytest.raises(ConfigError, match="`capacity` must be a power of two, got 48"):
        DecisionLog(3, "cpu", 48)
