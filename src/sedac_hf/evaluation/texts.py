"""Where the text of an evaluation or a calibration comes from.

Everything here gives `Document`s, one after the other, without holding the whole source in memory. A document is the
unit over which uncertainty is counted (bootstrap, confidence bounds), so it should be something that could have been
drawn on its own: a file, an article, a conversation; not a line of one.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sedac_hf.errors import EvaluationError

_TABLES = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_COLUMNS = ("text", "content", "document", "code", "body")
_MIN_STDLIB_CHARACTERS = 200  # shorter files are mostly empty `__init__`s; the demo decoder was trained without them


@dataclass(frozen=True)
class Document:
    """One text. `continues` marks a block of the same text as the document before it (see `split_documents`)."""

    text: str
    name: str = ""
    continues: bool = False


def read_documents(
    source: Any,
    *,
    split: str = "test",
    config: str | None = None,
    column: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Iterator[Document]:
    """Reads any source of text.

    Args:
        source: a list (or other iterable) of strings, `Document`s or rows; a `datasets.Dataset` or `IterableDataset`;
            the path of a text file (one document), of a .jsonl or .jsonl.gz file (one document per line), of a
            .parquet, .csv or .arrow file, of a folder of source files (one document per file that is UTF-8 text,
            in sorted order) or of a saved dataset; or the name of a dataset on the Hub.
        split, config, revision, streaming: passed to `datasets.load_dataset`; used for datasets only.
        column: the text column; by default the first of text, content, document, code, body, or the only string one.

    Raises:
        EvaluationError: nothing of that name, no such column, text that is not UTF-8, or `datasets` not installed.
    """
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            yield from _read_file(path, column)
        elif path.is_dir():
            yield from _read_folder(path, split, column)
        else:
            yield from _read_rows(
                _load_dataset(str(source), config, split=split, revision=revision, streaming=streaming),
                column,
                str(source),
            )
    elif isinstance(source, Mapping):
        raise EvaluationError(
            f"a source of text must be one split, got a mapping with the keys {sorted(map(str, source))}; "
            "pass one of its values, e.g. dataset['test']"
        )
    elif isinstance(source, Iterable):
        yield from _read_rows(source, column, getattr(source, "builder_name", None) or "text")
    else:
        raise EvaluationError(
            "a source of text must be a path, the name of a dataset, or an iterable of strings or rows; "
            f"got {type(source).__name__}"
        )


def stdlib_documents(split: Literal["train", "heldout", "all"] = "heldout") -> list[Document]:
    """The source of the running Python's standard library, a corpus that every machine already has.

    All `*.py` files of the library folder without site-packages and `encodings/`, files of fewer than 200 characters
    left out. Held out are the files with `int(md5(relative posix path)) % 20 == 0`: the embedded demo decoder was
    never trained on those. Sorted by path, which is the documents' name.
    """
    if split not in ("train", "heldout", "all"):
        raise EvaluationError(f"split must be 'train', 'heldout' or 'all', got {split!r}")
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "encodings"}  # not walked: the first two can be huge
    tops = [path for path in root.iterdir() if path.name not in left_out]
    found = [file for top in tops for file in (top.rglob("*.py") if top.is_dir() else [top]) if file.suffix == ".py"]
    documents = []
    for name, path in sorted((file.relative_to(root).as_posix(), file) for file in found):
        held_out = int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16) % 20 == 0
        if split != "all" and held_out != (split == "heldout"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few test files are in other encodings on purpose
            continue
        if len(text) >= _MIN_STDLIB_CHARACTERS:
            documents.append(Document(text, name))
    if not documents:
        raise EvaluationError(
            f"the standard library at {root} must hold *.py files, got none for the split {split!r}; "
            "this Python was installed without its source: give text of your own"
        )
    return documents


def split_documents(documents: Iterable[Document], characters: int = 8192) -> list[Document]:
    """Cuts long documents into blocks of about that many characters, at an empty line, else at a line end.

    For sources of very few documents: blocks stand in for documents where uncertainty is counted (the non-overlapping
    block bootstrap: Carlstein 1986, Künsch 1989). What the blocks of one text have in common stays unseen, so real
    documents are better where there are enough of them. Blocks but the first have `continues` set: the windows run on
    across them as if the text had not been cut.
    """
    if characters < 1:
        raise EvaluationError(f"characters must be at least 1, got {characters}")
    blocks = []
    for document in documents:
        start, number = 0, 0
        while start < len(document.text) or number == 0:
            end = _block_end(document.text, start, characters)
            name = f"{document.name}#{number}" if number or end < len(document.text) else document.name
            blocks.append(Document(document.text[start:end], name, number > 0 or document.continues))
            start, number = end, number + 1
    return blocks


def _block_end(text: str, start: int, characters: int) -> int:
    end = start + characters
    if len(text) - end < characters // 2:  # no crumbs: the last block takes up to half as much again
        return len(text)
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, start + characters // 2, end)
        if found >= 0:
            return found + len(mark)
    return end


def _read_file(path: Path, column: str | None) -> Iterator[Document]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")):
        yield from _read_rows(_json_rows(path), column, path.name)
    elif path.suffix.lower() in _TABLES:
        rows = _load_dataset(_TABLES[path.suffix.lower()], None, data_files=str(path), split="train")
        yield from _read_rows(rows, column, path.name)
    else:
        try:
            data = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
            yield Document(data.decode("utf-8"), path.name)
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{path} must be UTF-8 text, got {error}; convert it first") from error
        except (OSError, EOFError) as error:
            raise EvaluationError(f"{path} cannot be read: {error}") from error


def _json_rows(path: Path) -> Iterator[Any]:
    read = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for line in lines:
                row = json.loads(line.decode("utf-8")) if line.strip() else None
                read += 1
                if row is not None:
                    yield row
    except (ValueError, OSError, EOFError) as error:  # ValueError: both bad JSON and bad UTF-8
        raise EvaluationError(
            f"{path} must hold one JSON object or string per line, as UTF-8; line {read + 1}: {error}"
        ) from error


def _read_folder(path: Path, split: str, column: str | None) -> Iterator[Document]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = _datasets().load_from_disk(str(path))
        if isinstance(saved, Mapping):
            if split not in saved:
                raise EvaluationError(f"{path} has the splits {sorted(saved)}, not {split!r}; name one of them")
            saved = saved[split]
        yield from _read_rows(saved, column, path.name)
    elif any(p.suffix.lower() in _TABLES for p in path.rglob("*")):
        yield from _read_rows(_load_dataset(str(path), None, split=split), column, path.name)
    else:
        found = False
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            relative = file.relative_to(path)
            if any(part.startswith(".") or part == "__pycache__" for part in relative.parts):
                continue
            if re.search(r"\.(jsonl|ndjson)(\.gz)?$", file.name.lower()):
                found = True
                yield from _read_rows(_json_rows(file), column, relative.as_posix())
                continue
            data = file.read_bytes()
            try:
                text = "" if b"\0" in data else data.decode("utf-8")
            except UnicodeDecodeError:  # a picture, an archive: not source
                continue
            if text.strip():
                found = True
                yield Document(text, relative.as_posix())
        if not found:
            raise EvaluationError(f"the folder {path} must hold files of UTF-8 text, got none")


def _read_rows(rows: Iterable[Any], column: str | None, name: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if isinstance(row, Document):
            yield row
            continue
        text = row
        if isinstance(row, Mapping):
            column = column or _text_column(row, name)
            if column not in row:
                raise EvaluationError(f"{name} has no column {column!r} in row {number}; it has {sorted(row)}")
            text = row[column]
        if not isinstance(text, str):
            raise EvaluationError(
                f"each text of {name} must be a string, got {type(text).__name__} in row {number}; name the column"
            )
        if text:
            yield Document(text, f"{name}[{number}]")


def _text_column(row: Mapping[str, Any], name: str) -> str:
    strings = [key for key, value in row.items() if isinstance(value, str)]
    for column in _COLUMNS:
        if column in strings:
            return column
    if len(strings) == 1:
        return strings[0]
    raise EvaluationError(f"{name} must say which column holds the text; its string columns are {strings}: name one")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EvaluationError(
            "reading this needs the `datasets` library, which is not installed: pip install 'sedac-hf[eval]'"
        ) from error
    return datasets


def _load_dataset(path: str, config: str | None, **kwargs: Any) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset(path, config, **kwargs)
    except Exception as error:  # datasets raises many unrelated types for the one thing that matters here
        raise EvaluationError(
            f"{path!r} must be a file, a folder, or a dataset that `datasets` can load; got {type(error).__name__}: "
            f"{error}"
        ) from error
