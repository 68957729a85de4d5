"""A user's texts as the load needs them: JSONL, plain lines or Parquet in, one JSON string a line out.

Blank and broken lines are left out, counted and named by line; nothing is cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.errors import InvalidInputError

MOST_TEXTS = 200_000  # read at most: a load needs variety, not the whole collection
MOST_BYTES = 256 << 20
NAMED = 20  # left-out lines named in a report
FIELDS = ("text", "content", "input", "passage", "document", "query", "body")


@dataclass(frozen=True)
class Corpus:
    """What was read. `left_out` is (line, reason) of the first ones; `complete` is False when a limit ended reading."""

    texts: int
    blank: int
    broken: int
    left_out: tuple[tuple[int, str], ...]
    complete: bool

    def notes(self, path: Path) -> list[str]:
        """Warnings for the record."""
        found = []
        if self.blank or self.broken:
            named = "; ".join(f"line {line}: {reason}" for line, reason in self.left_out[:5])
            found.append(f"{path}: {self.blank} blank and {self.broken} broken lines left out ({named})")
        if not self.complete:
            found.append(f"{path}: only the first {self.texts} texts are used")
        return found


def convert(path: Path, into: Path, column: str | None = None) -> Corpus:
    """Write `path`'s texts into `into`. `column` names the field of JSONL objects or Parquet rows.

    Raises InvalidInputError (`no_corpus`, `bad_corpus`, `empty_corpus`).
    """
    texts = blank = broken = size = 0
    left_out: list[tuple[int, str]] = []
    complete = True
    try:
        with into.open("wb") as out:
            for number, text, problem in _entries(path, column):
                if problem or text is None or not text.strip():
                    broken += bool(problem)
                    blank += not problem
                    if len(left_out) < NAMED:
                        left_out.append((number, problem or "blank"))
                    continue
                if texts >= MOST_TEXTS or size >= MOST_BYTES:
                    complete = False
                    break
                line = json.dumps(text).encode() + b"\n"
                out.write(line)
                texts += 1
                size += len(line)
    except FileNotFoundError as exc:
        raise InvalidInputError("no_corpus", f"no file {path}", "give --corpus a JSONL, text or Parquet file") from exc
    except OSError as exc:
        raise InvalidInputError("bad_corpus", f"{path} cannot be read: {exc}", "give a readable file") from exc
    if not texts:
        named = "; ".join(f"line {line}: {reason}" for line, reason in left_out[:5])
        raise InvalidInputError(
            "empty_corpus",
            f"{path} has no usable text ({blank} blank, {broken} broken lines{': ' + named if named else ''})",
            "name the field with --column",
        )
    return Corpus(texts, blank, broken, tuple(left_out), complete)


def _entries(path: Path, column: str | None) -> Iterator[tuple[int, str | None, str]]:
    """(line, text, problem) of every entry."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, column)
    elif suffix in (".jsonl", ".ndjson", ".json"):
        yield from _json_lines(path, column)
    else:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield number, line.decode("utf-8").rstrip("\r\n"), ""
                except UnicodeDecodeError:
                    yield number, None, "not UTF-8"


def _json_lines(path: Path, column: str | None) -> Iterator[tuple[int, str | None, str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                yield number, "", ""
                continue
            try:
                value = json.loads(line)
            except ValueError as exc:
                yield number, None, f"no JSON ({exc})"
                continue
            if isinstance(value, dict):
                name = column or next((f for f in FIELDS if f in value), None)
                if name is None or name not in value:
                    yield number, None, f"no field {column or ' or '.join(FIELDS)}"
                    continue
                value = value[name]
            if isinstance(value, str):
                yield number, value, ""
            else:
                yield number, None, f"{type(value).__name__}, not a text"


def _parquet(path: Path, column: str | None) -> Iterator[tuple[int, str | None, str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as exc:
        raise InvalidInputError(
            "bad_corpus", f"{path} is Parquet and pyarrow is not installed", "pip install 'qwen3emb-launch[parquet]'"
        ) from exc
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        name = column or next((f for f in FIELDS if f in names), None)
        if name not in names:
            raise InvalidInputError(
                "bad_corpus",
                f"{path} has no column {column or ' or '.join(FIELDS)}; it has {', '.join(names)}",
                "--column",
            )
        number = 0
        for batch in file.iter_batches(columns=[name]):
            for value in batch.column(0).to_pylist():
                number += 1
                if value is None or isinstance(value, str):
                    yield number, value, ""
                else:
                    yield number, None, f"{type(value).__name__}, not a text"
    except ArrowException as exc:
        raise InvalidInputError("bad_corpus", f"{path} is no readable Parquet file: {exc}", "check the file") from exc
