"""Tensor parallelism: dealt units, and two gloo processes that give what one gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from sedac_hf import SedacForCausalLM
from sedac_hf.ffn.compensation import LevelCompensation
from sedac_hf.ffn.sharded import Shard
from sedac_hf.saving.fingerprint import Fingerprint, differences
from tests.margins import NEEDED, decisions, steady_rows
from tests.policies import random_policy
from tests.tensor_parallel import FAMILIES, GATHERED, PROMPT, continued, input_gradient
from tests.tiny_models import HIDDEN, VOCAB, tiny_model

RANKS = 2
TIMEOUT = 300


def shards(ranks: int, units: int) -> list[Shard]:
    return [Shard(rank, ranks, units, None) for rank in range(ranks)]


@settings(max_examples=60, deadline=None)
@given(ranks=st.integers(1, 8), held=st.integers(1, 12), data=st.data())
def test_a_prefix_is_balanced(ranks: int, held: int, data: st.DataObject) -> None:
    units = ranks * held
    width = data.draw(st.integers(0, units))
    order = torch.randperm(units, generator=torch.Generator().manual_seed(held))
    widths = [shard.width(width) for shard in shards(ranks, units)]
    assert sum(widths) == width
    assert max(widths) - min(widths) <= 1
    parts = shards(ranks, units)[0].dealt(order).view(ranks, held)
    chosen = torch.cat([part[:k] for part, k in zip(parts, widths, strict=True)])
    assert set(chosen.tolist()) == set(order[:width].tolist())


@settings(max_examples=30, deadline=None)
@given(ranks=st.integers(1, 4), held=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_the_sum_of_the_ranks_is_the_cut_ffn(ranks: int, held: int, seed: int) -> None:
    d, units = 5, ranks * held
    g = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(*shape, generator=g).double() for shape in ((units, d), (units, d), (d, units)))
    order = torch.randperm(units, generator=g)
    width = int(torch.randint(0, units + 1, (1,), generator=g))
    pair = torch.randn(d, 2, generator=g).double(), torch.randn(2, width, generator=g).double()
    x = torch.randn(3, d, generator=g).double()
    kept = order[:width]
    h = functional.silu(x @ gate[kept].T) * (x @ up[kept].T)
    wanted = h @ down[:, kept].T + h @ pair[1].T @ pair[0].T
    whole = LevelCompensation(None, {1: pair}, 2)
    total = torch.zeros_like(wanted)
    for shard in shards(ranks, units):
        mine = shard.dealt(order).view(ranks, held)[shard.rank][: shard.width(width)]
        h = functional.silu(x @ gate[mine].T) * (x @ up[mine].T)
        part = whole.part(shard, dealt=True).low_rank(1, x)
        assert part is not None
        total += h @ down[:, mine].T + h @ part[1].T @ part[0].T
    torch.testing.assert_close(total, wanted)


def steady_inputs(model: SedacForCausalLM) -> dict[str, torch.Tensor]:
    """Ids (a prompt and what the model makes of it) and embeddings on which rounding turns no decision over."""

    def generated(generator: torch.Generator) -> torch.Tensor:
        return continued(model, torch.randint(3, VOCAB, (1, PROMPT), generator=generator))

    return {
        "ids": steady_rows(generated, lambda ids: decisions(model, input_ids=ids), rows=3),
        "embeddings": steady_rows(
            lambda generator: torch.randn(1, 7, HIDDEN, generator=generator),
            lambda embeddings: decisions(model, inputs_embeds=embeddings),
            rows=2,
        ),
    }


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As the ranks have it: threads that share a busy core wait for each other far longer than these models work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The folder of both ranks, and what one process gives."""
    folder = tmp_path_factory.mktemp("ranks")
    results: dict[str, dict[str, Any]] = {}
    tiny_model(GATHERED).save_pretrained(folder / GATHERED)
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family / "base")
        model = SedacForCausalLM.from_pretrained(folder / family / "base")
        found: dict[str, Any] = {"natural down": [site.down.weight.detach().clone() for site in model.runtime.sites]}
        for cut in ("select", "truncate"):
            model.install(random_policy(model.runtime, cut))
            model.save_pretrained(folder / family / cut, adapter_only=True)
            if cut == "select":
                inputs = steady_inputs(model)
                torch.save(inputs, folder / family / "inputs.pt")
                ids, embeddings = inputs["ids"], inputs["embeddings"]
                found["decisions"] = [decisions(model, input_ids=ids), decisions(model, inputs_embeds=embeddings)]
            with torch.no_grad():
                found[cut] = model(ids).logits
            found[f"{cut} ids"] = continued(model, ids[:, :PROMPT])
            found[f"{cut} policy"] = model.runtime.policy
            found[f"{cut} gradient"] = input_gradient(model, embeddings)
        with torch.no_grad():
            found["dense"] = tiny_model(family)(ids).logits
        results[family] = found
    return folder, results


@pytest.fixture(scope="module")
def together(alone: tuple[Path, dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """The results of both ranks."""
    folder, _ = alone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.tensor_parallel", str(folder)]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(error[-3000:] for error in errors)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("cut", ["dense", "truncate", "select"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_give_what_one_process_gives(family, cut, alone, together):
    wanted = alone[1][family][cut]
    assert torch.equal(together[0][family][cut], together[1][family][cut])
    torch.testing.assert_close(together[0][family][cut], wanted, rtol=0, atol=1e-5)
    if cut == "dense":
        return
    assert (wanted - alone[1][family]["dense"]).abs().max() > 1e-2
    gradient = alone[1][family][f"{cut} gradient"]
    limit = 1e-5 * float(gradient.abs().max())
    for rank in together:
        torch.testing.assert_close(rank[family][f"{cut} gradient"], gradient, rtol=1e-4, atol=limit)
        assert torch.equal(rank[family][f"{cut} ids"], alone[1][family][f"{cut} ids"])
        assert any("ranks" in choice for choice in rank[family][f"{cut} choices"])
        assert torch.equal(rank[family][f"{cut} unloaded"], rank[family]["dense"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_choose_the_units_that_one_process_chooses(family, alone, together):
    passes = alone[1][family]["decisions"]
    for decided in passes:
        assert decided.margins.reach(NEEDED), decided.margins  # else the ranks may differ, and no rank is wrong
    wanted = [used for decided in passes for used in decided.used]
    for i, used in enumerate(wanted):
        chosen = torch.cat([rank[family]["used"][i] for rank in together], dim=1)
        where = "pass {}, FFN {}, as [token, unit]".format(*divmod(i, len(wanted) // len(passes)))
        assert (chosen != used).nonzero().tolist() == [], where
        assert 0 < int(used.sum()) < used.numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_dealt_and_given_back(family, alone, together):
    policy = alone[1][family]["truncate policy"]
    natural = alone[1][family]["natural down"]
    for i, (order, row) in enumerate(zip(policy.channel_order, policy.schedule.points, strict=True)):
        for r, rank in enumerate(together):
            found = rank[family]
            assert found["shards"][i] == (r, RANKS, natural[i].shape[1] // RANKS)
            assert torch.equal(found["truncate down"][i], natural[i][:, order[r::RANKS]])
            assert torch.equal(found["natural down"][i], natural[i].chunk(RANKS, dim=1)[r])
        widths = [rank[family]["truncate widths"][i] for rank in together]
        for level, point in enumerate(row):
            parts = [width[level] for width in widths]
            assert sum(parts) == point.width
            assert max(parts) - min(parts) <= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_plain_order(family, alone, together):
    wanted = alone[1][family]["truncate policy"].to_tensors()
    for rank in together:
        saved = rank[family]["truncate saved policy"]
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(saved[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_rank_cannot_do_is_refused(family, together):
    for rank in together:
        assert "adapter_only" in rank[family]["calibrate refused"]
        assert "adapter_only" in rank[family]["save refused"]


def test_units_that_no_rank_owns_are_refused(together):
    for rank in together:
        assert "gathers all of them" in rank[GATHERED]["refused"]


@pytest.mark.parametrize("cut", ["truncate", "select"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_one_rank_saved_is_that_of_one_process(family, cut, alone, together):
    folder = alone[0] / family
    again, whole = (
        Fingerprint.from_json((folder / name / "base_fingerprint.json").read_text()) for name in (f"{cut} again", cut)
    )
    sharded = {name for name in whole if "mlp" in name and name.endswith("weight")}
    assert {*again} < {*whole}
    assert not sharded & {*again}  # a rank has a part of these alone: not compared
    assert differences(whole, again) == ([], len(again))
    model = SedacForCausalLM.from_pretrained(folder / f"{cut} again", base_model=tiny_model(family))
    with torch.no_grad():
        logits = model(torch.load(folder / "inputs.pt")["ids"]).logits
    torch.testing.assert_close(logits, alone[1][family][cut])
