"""The models on this machine: what there is, whether it is still what was downloaded, and how to get rid of it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3emb_launch.catalog import CATALOG, find_model
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.hub import huggingface, modelscope, ondisk, records
from qwen3emb_launch.hub.checkpoint import read_checkpoint
from qwen3emb_launch.hub.listing import RemoteFile, hash_file
from qwen3emb_launch.hub.names import DEMO, ModelName
from qwen3emb_launch.hub.records import Record
from qwen3emb_launch.progress import Progress

FileState = Literal["ok", "damaged", "missing", "unknown"]


@dataclass(frozen=True)
class ModelRow:
    """A line of `models list`. `bytes` is on disk, or for a catalog model that is not here, what it will take."""

    model: str
    repo: str
    here: bool
    bytes: int
    source: str | None
    revision: str | None
    commit: str | None
    path: Path | None


@dataclass(frozen=True)
class FileCheck:
    """One file of `models verify`: `unknown` when no hash was ever recorded for it."""

    path: str
    state: FileState
    expected: str | None
    found: str | None


@dataclass(frozen=True)
class VerifyResult:
    """What `models verify` found. `repaired` names the files fetched again."""

    model: str
    source: str
    path: Path
    bytes: int
    files: tuple[FileCheck, ...]
    repaired: tuple[str, ...] = ()

    @property
    def bad(self) -> tuple[FileCheck, ...]:
        """The files that are not what they should be."""
        return tuple(f for f in self.files if f.state in ("damaged", "missing"))


@dataclass(frozen=True)
class RemoveResult:
    """What `models remove` deleted."""

    model: str
    paths: tuple[Path, ...]
    bytes_freed: int


def rows() -> list[ModelRow]:
    """The catalog, what else was downloaded, and the demo model."""
    here = [r for r in ondisk.downloads() if r.complete()]
    found = []
    for model in CATALOG.values():
        mine = [r for r in here if r.repo == model.hub_id]
        found += [_row(model.key, r) for r in mine] or [
            ModelRow(model.key, model.hub_id, False, model.file_bytes, None, None, None, None)
        ]
    found += [_row(r.repo, r) for r in here if find_model(r.repo) is None]
    demo = ondisk.demo_folder()
    size = sum(p.stat().st_size for p in demo.iterdir()) if demo.is_dir() else 0
    return [*found, ModelRow(DEMO, "made locally", demo.is_dir(), size, DEMO, None, None, demo)]


def verify(name: ModelName, revision: str | None, progress: Progress) -> VerifyResult:
    """Read every byte and compare with what was recorded.

    Raises CheckFailedError `corrupted_model` naming the files (the table in `result`), or why nothing can be checked.
    """
    if name.kind == "demo":
        result = _verify_demo(progress)
    elif name.kind == "folder":
        read_checkpoint(name.folder)
        result = _verify_folder(name)
    else:
        record = recorded(name, revision)
        result = VerifyResult(
            name.short,
            record.source,
            record.folder,
            record.total_bytes,
            _checked(record.folder, record.files, progress),
        )
    if result.bad:
        raise corrupted(result)
    return result


def corrupted(result: VerifyResult) -> LaunchError:
    """The failure of a verification, with its table."""
    names = ", ".join(f"{f.path} ({f.state})" for f in result.bad)
    hint = f"fetch them again: qwen3emb models verify {result.model} --repair"
    if result.source == "folder":
        hint = "copy those files again"
    error = CheckFailedError(
        "corrupted_model", f"{result.model} at {result.path} is not what was downloaded: {names}", hint
    )
    error.result = result
    return error


def discard(result: VerifyResult) -> None:
    """Delete the bad files of a download, so that the next one fetches just those."""
    for check in result.bad:
        path = result.path / check.path
        try:
            path.resolve().unlink(missing_ok=True)  # in the shared cache, the blob behind the link
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error


def remove(name: ModelName, revision: str | None) -> RemoveResult:
    """Delete a model's files, those of interrupted downloads too. The Hugging Face cache loses them for every tool.

    Raises InvalidInputError for a folder of the user's own, UnfitError `model_missing`.
    """
    if name.kind == "folder":
        raise InvalidInputError("not_ours", f"{name.folder} was not downloaded by qwen3emb", f"rm -r {name.folder}")
    if name.kind == "demo":
        folder = ondisk.demo_folder()
        if not folder.is_dir():
            raise _nothing(name, revision)
        return RemoveResult(DEMO, (folder,), _delete(folder))
    known = [r for r in ondisk.downloads() if r.repo == name.repo]
    chosen = [r for r in known if r.named(revision)]
    freed = 0
    if revision is None:
        freed += huggingface.remove_unfinished(name.repo)
        freed += modelscope.remove_unfinished(name.repo, [r.folder for r in known])
    if not chosen and not freed:
        raise _nothing(name, revision)
    for record in chosen:
        if record.source == huggingface.SOURCE:
            freed += huggingface.remove(record.repo, record.pin)
        else:
            freed += modelscope.remove(record.repo, record.folder)
        records.forget(record)
    return RemoveResult(name.short, tuple(r.folder for r in chosen), freed)


def missing(name: ModelName, revision: str | None = None) -> UnfitError:
    """The error for a model that is not complete on disk."""
    at = f" at revision {revision}" if revision else ""
    again = f" --revision {revision}" if revision else ""
    return UnfitError(
        "model_missing",
        f"{name.given} is not complete on this machine{at}",
        "qwen3emb up --profile demo" if name.kind == "demo" else f"qwen3emb download {name.short}{again}",
    )


def _nothing(name: ModelName, revision: str | None) -> UnfitError:
    error = missing(name, revision)
    error.hint = "qwen3emb models list shows what can be removed"
    return error


def _row(key: str, record: Record) -> ModelRow:
    return ModelRow(
        key, record.repo, True, record.total_bytes, record.source, record.revision, record.commit, record.folder
    )


def recorded(name: ModelName, revision: str | None) -> Record:
    """The newest record even if a file of it is gone: that is what a verification is to find."""
    found = records.read_all(name.repo)
    found = [r for r in found if r.named(revision)]
    record = found[0] if found else huggingface.adopt(name.repo, revision)
    if record is None:
        raise missing(name, revision)
    return record


def _checked(folder: Path, files: tuple[RemoteFile, ...], progress: Progress) -> tuple[FileCheck, ...]:
    total, done = sum(f.size for f in files), 0
    checks = []
    progress.step(f"hashing {len(files)} files")
    for file in files:
        checks.append(_check(folder / file.path, file))
        done += file.size
        progress.update(done, total)
    return tuple(checks)


def _check(path: Path, file: RemoteFile) -> FileCheck:
    try:
        size = path.stat().st_size
        if size != file.size:
            return FileCheck(file.path, "damaged", file.expected, f"{size} bytes instead of {file.size}")
        found = hash_file(path, file)
    except FileNotFoundError:
        return FileCheck(file.path, "missing", file.expected, None)
    except OSError as error:
        return FileCheck(file.path, "damaged", file.expected, f"unreadable: {error.strerror}")
    if file.expected is None:
        return FileCheck(file.path, "unknown", None, found)
    return FileCheck(file.path, "ok" if found == file.expected else "damaged", file.expected, found)


def _verify_demo(progress: Progress) -> VerifyResult:
    """The demo model is made again elsewhere and compared: the same seed gives the same bytes."""
    folder = ondisk.demo_folder()
    if not folder.is_dir():
        raise missing(ModelName(DEMO, "demo"))
    with tempfile.TemporaryDirectory() as scratch:
        fresh = make_demo_model(Path(scratch) / DEMO)
        made = sorted(p for p in fresh.iterdir())
        files = tuple(
            RemoteFile(p.name, p.stat().st_size, hash_file(p, RemoteFile(p.name, 0)).removeprefix("sha256:"))
            for p in made
        )
    return VerifyResult(DEMO, DEMO, folder, sum(f.size for f in files), _checked(folder, files, progress))


def _verify_folder(name: ModelName) -> VerifyResult:
    """Nobody recorded hashes for a folder of the user's own: its structure was checked, its bytes stay unknown."""
    files = tuple(p for p in sorted(name.folder.rglob("*")) if p.is_file())
    checks = tuple(FileCheck(p.relative_to(name.folder).as_posix(), "unknown", None, None) for p in files)
    return VerifyResult(name.given, "folder", name.folder, sum(p.stat().st_size for p in files), checks)


def _delete(folder: Path) -> int:
    freed = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    return freed
