"""A save that ends early leaves the older one; what is not of a save stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sedac_hf import SedacForCausalLM
from sedac_hf.saving import replacing, writing
from sedac_hf.saving.tensors import write_tensors
from tests.policies import random_policy
from tests.saving.reports import some_report
from tests.test_invariants import wrapped
from tests.tiny_models import token_ids


@pytest.fixture
def model() -> SedacForCausalLM:
    return wrapped("llama", "truncate")


def other_policy(model: SedacForCausalLM) -> None:
    model.install(random_policy(model.runtime, "truncate", seed=5))


@torch.no_grad()
def test_a_save_that_is_killed_at_any_step_leaves_the_older_or_the_newer_one(tmp_path, model):
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old/tokenizer.json").write_text("mine")
    other_policy(model)
    model.model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path / "new")
    done = subprocess.run(
        [sys.executable, "-m", "tests.saving.killed_saves", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    assert len(steps) > 10
    assert all(kept for _, kept, _ in steps)
    which = [name for name, _, _ in steps]
    assert which == sorted(which, key=["old", "new"].index), "a mixture, or the older one after the newer one"
    assert {*which} == {"old", "new"}
    assert steps[-1] == ["new", True, True]


@torch.no_grad()
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("place", ["tensors", "exchange"])
def test_a_save_that_fails_leaves_the_older_one(tmp_path, model, monkeypatch, error, place):
    ids = token_ids()
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/runs").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "saved").iterdir()}
    expected = model(ids).logits
    other_policy(model)
    changed = model(ids).logits

    def fail(*args):
        raise error

    where = {"tensors": (writing, "write_tensors"), "exchange": (replacing, "_exchange")}[place]
    monkeypatch.setattr(*where, fail)
    with pytest.raises(type(error)):
        model.save_pretrained(tmp_path / "saved")
    assert torch.equal(model(ids).logits, changed), "the failed save changed the model"
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "saved").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(SedacForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, expected)


@pytest.mark.parametrize("at_once", [True, False], ids=["exchange", "renames"])
def test_files_folders_and_links_of_others_stay(tmp_path, model, monkeypatch, at_once):
    if not at_once:  # as on systems that cannot exchange
        monkeypatch.setattr(replacing, "_exchanged_at_once", lambda *_: False)
    model.save_pretrained(tmp_path / "real")
    os.symlink(tmp_path / "real", tmp_path / "saved")
    (tmp_path / "real/tokenizer.json").write_text("mine")
    (tmp_path / "real/runs/1").mkdir(parents=True)
    (tmp_path / "real/latest").symlink_to("runs/1")
    other_policy(model)
    model.save_pretrained(tmp_path / "saved", adapter_only=False)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"tokenizer.json", "runs", "latest", "model.safetensors"} <= names
    assert (tmp_path / "saved/latest").is_dir()
    assert (tmp_path / "saved").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real", "saved"]


def test_a_folder_of_others_outlives_a_failure_after_the_exchange(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/runs").mkdir()
    (tmp_path / "saved/runs/log").write_text("mine")
    rename = os.rename

    def fail(source, target):
        if Path(source).name == "runs":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "saved")
    (log,) = tmp_path.glob("*/runs/log")
    assert log.read_text() == "mine"
    SedacForCausalLM.from_pretrained(tmp_path / "saved")


def test_saving_into_the_current_folder_stays_in_it(tmp_path, model, monkeypatch):
    (tmp_path / "saved").mkdir()
    monkeypatch.chdir(tmp_path / "saved")
    for _ in range(2):
        model.save_pretrained(".")
        assert Path("config.json").is_file()
        assert os.path.samefile(".", tmp_path / "saved")


def test_a_report_goes_with_its_policy(tmp_path, model):
    model.calibration_report = some_report()
    model.save_pretrained(tmp_path / "saved")
    assert SedacForCausalLM.from_pretrained(tmp_path / "saved").calibration_report == some_report()
    model.uninstall()
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved/calibration_report.json").exists()
    assert "7.771" not in (tmp_path / "saved/README.md").read_text()


def test_a_checksum_is_of_names_types_and_bytes(tmp_path):
    from sedac_hf.saving.tensors import _checksum

    one = {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.int64)}
    variants = [
        one,
        {"c": one["a"], "b": one["b"]},
        {**one, "a": torch.zeros(3, 2)},
        {**one, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**one, "b": one["b"] + 1},
    ]
    assert len({_checksum(item) for item in variants}) == len(variants)
    write_tensors({**one, "empty": torch.zeros(0), "scalar": torch.tensor(1.5)}, tmp_path / "file")
