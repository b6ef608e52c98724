"""Uploading by way of huggingface_hub, whose calls over the network are recorded here, and loading from its cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError, RevisionNotFoundError

from sedac_hf import LoadError, SedacConfig, SedacForCausalLM
from sedac_hf.saving import hub
from tests.policies import random_policy
from tests.test_invariants import wrapped
from tests.tiny_models import tiny_model, token_ids

ADAPTER = {"config.json", "sedac.safetensors", "base_fingerprint.json", "generation_config.json", "README.md"}


class Recorded:
    """What the network was asked for; ``cards`` are README.md files of the repository by revision."""

    def __init__(self) -> None:
        self.created: dict[str, Any] = {}
        self.branches: list[str] = []
        self.commit: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.cards: dict[str | None, Path] = {}


@pytest.fixture
def network(monkeypatch) -> Recorded:
    seen = Recorded()

    def create_repo(self, repo_id, **kwargs):
        seen.created = {"repo_id": repo_id, **kwargs}
        return SimpleNamespace(repo_id=f"someone/{repo_id}" if "/" not in repo_id else repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        seen.commit = {"repo_id": repo_id, **kwargs}
        seen.files = {item.path_in_repo: Path(item.path_or_fileobj).read_bytes() for item in operations}
        return SimpleNamespace(commit_url="url")

    def create_branch(self, repo_id, *, branch, **_):
        seen.branches.append(branch)

    def download(repo_id, name, *, token, revision):
        if revision in seen.cards:
            return str(seen.cards[revision])
        kind = RevisionNotFoundError if revision else RemoteEntryNotFoundError
        raise kind.__new__(kind)  # made of an HTTP answer, which differs between versions of huggingface_hub

    for name, fake in (
        ("create_repo", create_repo),
        ("create_commit", create_commit),
        ("create_branch", create_branch),
    ):
        monkeypatch.setattr(HfApi, name, fake)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    return seen


@pytest.fixture
def model() -> SedacForCausalLM:
    model = wrapped("llama", "truncate")
    model.model.name_or_path = "someone/decoder"
    return model


def test_an_adapter_is_pushed_as_one(network, model):
    details = {"commit_message": "m", "commit_description": "d", "revision": "dev", "create_pr": True, "token": "t"}
    result = model.push_to_hub("mine", adapter_only=True, private=True, tags=["python"], **details)
    assert result.commit_url == "url"
    assert network.created == {"repo_id": "mine", "private": True, "token": "t", "exist_ok": True}
    assert network.branches == ["dev"]
    assert network.commit == {"repo_id": "someone/mine", **details}
    assert {*network.files} == ADAPTER
    card = network.files["README.md"].decode()
    assert 'from_pretrained("someone/mine")' in card
    assert "- python\n" in card


def test_saving_can_push_too(network, model, tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/notes.txt").write_text("not part of the save")
    options = {"repo_id": "org/mine", "token": "t", "private": False, "commit_message": "m", "revision": "dev"}
    model.save_pretrained(tmp_path / "saved", adapter_only=True, push_to_hub=True, **options)
    assert network.created == {"repo_id": "org/mine", "private": False, "token": "t", "exist_ok": True}
    assert network.commit["commit_message"] == "m"
    assert network.commit["token"] == "t"
    assert network.commit["revision"] == "dev"
    assert {*network.files} == ADAPTER
    assert network.files["config.json"] == (tmp_path / "saved/config.json").read_bytes()


def test_a_whole_model_is_pushed_in_shards_under_the_folder_s_name(network, model, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, max_shard_size="200KB")
    assert network.created["repo_id"] == "saved"
    assert {"model.safetensors.index.json", "sedac.safetensors"} <= {*network.files}
    assert len([name for name in network.files if name.startswith("model-")]) > 1


def test_a_misspelt_argument_pushes_nothing(network, model):
    with pytest.raises(TypeError, match="got privat"):
        model.push_to_hub("mine", privat=True)
    assert network.created == {}


def test_other_processes_neither_save_nor_push(network, model, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, is_main_process=False)
    assert network.created == network.files == {}
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("revision", [None, "dev", "new"])
def test_a_card_in_the_repository_that_is_not_ours_stays(network, model, tmp_path, revision):
    (tmp_path / "card").write_text("# Mine")
    network.cards = {"dev": tmp_path / "card", None: tmp_path / "card"}
    model.push_to_hub("mine", adapter_only=True, revision=revision)
    assert {*network.files} == ADAPTER - {"README.md"}
    model.save_pretrained(tmp_path / "saved", adapter_only=True)
    network.cards = dict.fromkeys(network.cards, tmp_path / "saved/README.md")
    model.push_to_hub("mine", adapter_only=True, revision=revision)
    assert {*network.files} == ADAPTER


def test_a_repository_that_cannot_be_made_stops_the_save(model, tmp_path):
    with pytest.raises(OSError, match=r"offline|Cannot reach|HF_HUB_OFFLINE"):  # what the tests run under
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert not (tmp_path / "saved").exists()


# ---------------------------------------------------------------- the cache of the hub, without a network


def into_cache(cache: Path, repo_id: str, commit: str, folder: Path, ref: str = "main") -> None:
    """Lay a folder out as huggingface_hub keeps a downloaded commit."""
    place = cache / f"models--{repo_id.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / ref).write_text(commit)


OLD, NEW = "a" * 40, "b" * 40


@torch.no_grad()
@pytest.mark.parametrize("local_files_only", [False, True])
def test_an_adapter_and_the_commit_of_its_base_come_from_the_cache(tmp_path, local_files_only):
    cache = tmp_path / "cache"
    for seed, commit, ref in ((0, OLD, "v1"), (1, NEW, "main")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / commit)
        into_cache(cache, "someone/decoder", commit, tmp_path / commit, ref)
    where = {"cache_dir": cache, "local_files_only": local_files_only}
    room = SedacConfig(extra_memory=1.0)
    model = SedacForCausalLM.from_pretrained("someone/decoder", sedac_config=room, revision="v1", **where)
    model.install(random_policy(model.runtime, "truncate"))
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    config = json.loads((tmp_path / "adapter/config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("someone/decoder", OLD)
    into_cache(cache, "someone/adapter", "c" * 40, tmp_path / "adapter")
    expected = model(token_ids()).logits
    for path in ("someone/adapter", tmp_path / "adapter"):
        assert torch.equal(SedacForCausalLM.from_pretrained(path, **where)(token_ids()).logits, expected)
    with pytest.raises(LoadError, match=f"someone/decoder, revision {OLD}, fingerprint"):
        SedacForCausalLM.from_pretrained("someone/adapter", base_model="someone/decoder", **where)


def test_what_is_not_in_the_cache_is_named(tmp_path, model):
    model.save_pretrained(tmp_path / "adapter", adapter_only=True)
    with pytest.raises(LoadError, match=r"must be found where it says, at someone/decoder(.|\n)*`base_model=`"):
        SedacForCausalLM.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(LoadError, match="no/where"):
        SedacForCausalLM.from_pretrained("no/where", cache_dir=tmp_path, local_files_only=True)
