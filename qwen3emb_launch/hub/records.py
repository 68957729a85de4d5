"""What was downloaded, remembered: which commit, which files, which hashes. One small file a download, 0600.

They live in the data folder (`models/records/<source>/<owner>--<name>@<commit>.json`) and are written last: a record
says that everything it names was there and right.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkstemp

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.hub.listing import RemoteFile
from qwen3emb_launch.paths import paths

SCHEMA = 1
_SHORTEST = 7  # digits that still name one commit


@dataclass(frozen=True)
class Record:
    """One complete download. `revision` is what was asked for, `commit` what it stood for; `at` is seconds, UTC."""

    source: str
    repo: str
    revision: str
    commit: str | None
    folder: Path
    files: tuple[RemoteFile, ...]
    at: float

    @property
    def pin(self) -> str:
        """The name of exactly these files."""
        return self.commit or self.revision

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)

    def named(self, revision: str | None) -> bool:
        """Whether `revision` means this download: a branch or tag as asked for then, or a commit's first digits."""
        if revision is None or revision in (self.revision, self.commit):
            return True
        return len(revision) >= _SHORTEST and self.pin.startswith(revision)

    def complete(self) -> bool:
        """Whether every file is still there in its size. Reads no content."""
        try:
            return all((self.folder / f.path).stat().st_size == f.size for f in self.files)
        except OSError:
            return False


def _place(record_source: str, repo: str, pin: str) -> Path:
    name = f"{repo.replace('/', '--')}@{re.sub(r'[^A-Za-z0-9._-]', '_', pin)}.json"
    return paths().models / "records" / record_source / name


def write(record: Record) -> None:
    """Keep the record: whole or not at all. Raises UnfitError when the disk refuses."""
    target = _place(record.source, record.repo, record.pin)
    body = {"schema": SCHEMA, **asdict(record), "folder": str(record.folder)}
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, partial = mkstemp(dir=target.parent, prefix=f".{target.name}.")  # made 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(body, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            Path(partial).replace(target)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_error(error, target) from error


def read_all(repo: str | None = None) -> list[Record]:
    """All records, or one repository's, newest first. Unreadable ones count as absent: the files are found again."""
    wanted = f"{repo.replace('/', '--')}@*.json" if repo else "*.json"
    found = []
    for path in (paths().models / "records").glob(f"*/{wanted}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append(_parse(json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda r: -r.at)


def forget(record: Record) -> None:
    """Remove the record, if there is one."""
    _place(record.source, record.repo, record.pin).unlink(missing_ok=True)


def _parse(body: dict[str, object]) -> Record:
    if body["schema"] != SCHEMA:
        raise ValueError("written by another version")
    files = body["files"]
    if not isinstance(files, list) or not files:
        raise ValueError("no files")
    commit = body["commit"]
    return Record(
        source=str(body["source"]),
        repo=str(body["repo"]),
        revision=str(body["revision"]),
        commit=None if commit is None else str(commit),
        folder=Path(str(body["folder"])),
        files=tuple(RemoteFile(**f) for f in files),
        at=float(str(body["at"])),
    )
