from __future__ import annotations

import builtins
import gzip
import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sedac_hf.errors import EvaluationError
from sedac_hf.evaluation import Document, read_documents, stdlib_documents


def texts_of(source: Any, **kwargs: Any) -> list[str]:
    return [document.text for document in read_documents(source, **kwargs)]


def test_strings_documents_and_rows() -> None:
    assert texts_of(["a", "", "b"]) == ["a", "b"]
    assert list(read_documents([Document("a", "x")])) == [Document("a", "x")]
    assert texts_of([{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]) == ["a", "b"]
    assert texts_of([{"words": "a", "n": 3}]) == ["a"]
    assert texts_of([{"q": "a", "r": "b"}], column="r") == ["b"]


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("één\n\ntwo", encoding="utf-8")
    rows = [{"text": "one"}, {"text": "zwölf"}]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert list(read_documents(tmp_path / "a.txt")) == [Document("één\n\ntwo", "a.txt")]
    assert texts_of(str(tmp_path / "b.jsonl")) == ["one", "zwölf"] == texts_of(tmp_path / "c.jsonl.gz")


def test_folder_of_source_files(tmp_path: Path) -> None:
    (tmp_path / "z.py").write_text("z = 1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.md").write_text("# a")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    assert [(d.name, d.text) for d in read_documents(tmp_path)] == [("b/a.md", "# a"), ("z.py", "z = 1")]


def test_datasets_of_every_kind(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    assert texts_of(data) == ["one", "two"] == texts_of(data.to_iterable_dataset())
    data.save_to_disk(str(tmp_path / "saved"))
    assert texts_of(tmp_path / "saved") == ["one", "two"]
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
    assert texts_of(tmp_path / "splits") == ["one", "two"]
    with pytest.raises(EvaluationError, match=r"has the splits \['test'\], not 'train'"):
        texts_of(tmp_path / "splits", split="train")
    data.to_parquet(str(tmp_path / "rows.parquet"))
    assert texts_of(tmp_path / "rows.parquet") == ["one", "two"]
    (tmp_path / "data").mkdir()
    data.to_csv(str(tmp_path / "data" / "test.csv"), index=False)
    assert texts_of(tmp_path / "data") == ["one", "two"]
    with pytest.raises(EvaluationError, match="one of its values"):
        texts_of(datasets.DatasetDict({"test": data}))


def test_unknown_names_and_columns() -> None:
    with pytest.raises(EvaluationError, match="must be a file, a folder, or a dataset"):
        texts_of("no/such-dataset")
    with pytest.raises(EvaluationError, match=r"string columns are \['q', 'r'\]"):
        texts_of([{"q": "a", "r": "b"}])
    with pytest.raises(EvaluationError, match="no column 'x' in row 0"):
        texts_of([{"q": "a"}], column="x")
    with pytest.raises(EvaluationError, match="got int in row 1"):
        texts_of(["a", 3])
    with pytest.raises(EvaluationError, match="got int"):
        texts_of(3)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"latin\.txt must be UTF-8"):
        texts_of(tmp_path / "latin.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(EvaluationError, match=r"bad\.jsonl must hold one JSON .* line 2"):
        texts_of(tmp_path / "bad.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:40])
    with pytest.raises(EvaluationError, match=r"cut\.jsonl\.gz must hold"):
        texts_of(tmp_path / "cut.jsonl.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="must hold files of UTF-8 text"):
        texts_of(tmp_path / "empty")


def test_missing_datasets_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(EvaluationError, match=r"sedac-hf\[eval\]"):
        texts_of("some/dataset")


def test_stdlib_splits_are_disjoint_and_follow_the_rule() -> None:
    held_out, train, everything = (stdlib_documents(split) for split in ("heldout", "train", "all"))
    names = [document.name for document in held_out]
    assert names == sorted(names)
    assert not set(names) & {document.name for document in train}
    assert len(held_out) + len(train) == len(everything)
    assert 0.02 < len(held_out) / len(everything) < 0.09  # one in twenty
    root = Path(sysconfig.get_paths()["stdlib"])
    for document in held_out:
        assert int(hashlib.md5(document.name.encode()).hexdigest(), 16) % 20 == 0
        assert (root / document.name).is_file()
        assert len(document.text) >= 200
    assert not [d.name for d in everything if "site-packages" in d.name or d.name.startswith("encodings/")]
    with pytest.raises(EvaluationError, match="split must be"):
        stdlib_documents("test")  # type: ignore[arg-type]
