"""Models: by name to a complete folder on disk, from Hugging Face, ModelScope, a folder, or made locally.

    resolve("4b")                     -> ModelFacts, downloading what is missing
    local("4b")                       -> ModelFacts or None, without network
    download("4b", dry_run=True)      -> what would be fetched
    verify / remove / rows            -> the models on this machine

Names are a catalog key (`0.6b`, `4b`, `8b`), a hub id (`owner/name`), a folder, or `demo`.
"""

from __future__ import annotations

import re
from dataclasses import replace

from qwen3emb_launch.errors import CheckFailedError, InvalidInputError
from qwen3emb_launch.facts import ModelFacts
from qwen3emb_launch.hub import downloading, inventory, ondisk
from qwen3emb_launch.hub.downloading import DownloadResult, Source
from qwen3emb_launch.hub.inventory import FileCheck, ModelRow, RemoveResult, VerifyResult, rows
from qwen3emb_launch.hub.names import ModelName, parse
from qwen3emb_launch.progress import Progress, SilentProgress

_REVISION = re.compile(r"\w[\w./-]*")  # it becomes part of a path in the cache

__all__ = [
    "DownloadResult",
    "FileCheck",
    "ModelRow",
    "RemoveResult",
    "Source",
    "VerifyResult",
    "download",
    "local",
    "remove",
    "resolve",
    "rows",
    "verify",
]


def resolve(
    name: str,
    *,
    revision: str | None = None,
    source: Source = "auto",
    allow_download: bool = True,
    progress: Progress | None = None,
) -> ModelFacts:
    """A model ready to serve. What is complete on disk is taken as it is, with no network call.

    Raises InvalidInputError (unknown or unfit model), UnfitError (`model_missing` where downloading is not allowed,
    disk), NetworkError.
    """
    model = _parsed(name, revision)
    facts = _found(model, revision, source)
    if facts is None and allow_download:
        downloading.download(model, progress or SilentProgress(), revision=revision, source=source)
        facts = _found(model, revision, source)
    if facts is None:
        raise inventory.missing(model, revision)
    return facts


def local(name: str, *, revision: str | None = None) -> ModelFacts | None:
    """A model that is complete on disk, or None. No network; the demo model counts only once it was made.

    Raises InvalidInputError for a name that means nothing and a folder or download that cannot be served.
    """
    model = _parsed(name, revision)
    if model.kind == "demo" and not ondisk.demo_folder().is_dir():
        return None
    return _found(model, revision, "auto")


def download(
    name: str,
    *,
    revision: str | None = None,
    source: Source = "auto",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> DownloadResult:
    """Make a hub model complete on disk and say what that took. Errors as `resolve`."""
    model = _parsed(name, revision)
    if model.kind != "repo":
        raise InvalidInputError(
            "nothing_to_download",
            f"{name} is {'made locally' if model.kind == 'demo' else 'a folder on this machine'}",
            f"qwen3emb models show {name}",
        )
    return downloading.download(model, progress or SilentProgress(), revision=revision, source=source, dry_run=dry_run)


def verify(
    name: str, *, revision: str | None = None, repair: bool = False, progress: Progress | None = None
) -> VerifyResult:
    """Hash every byte of a model again. With `repair`, bad files are deleted, fetched and checked again.

    Raises CheckFailedError `corrupted_model` with the table as its `result`, UnfitError `model_missing`.
    """
    shown = progress or SilentProgress()
    model = _parsed(name, revision)
    try:
        return inventory.verify(model, revision, shown)
    except CheckFailedError as error:
        if not repair or model.kind == "folder":
            raise
        found: VerifyResult = error.result
    if model.kind == "demo":
        inventory.remove(model, None)
        ondisk.demo()
    else:
        record = inventory.recorded(model, revision)
        inventory.discard(found)
        pin = record.pin if record.source == "huggingface" else record.revision
        downloading.download(model, shown, revision=pin, source=_source(record.source), force=True)
    return replace(inventory.verify(model, revision, shown), repaired=tuple(f.path for f in found.bad))


def remove(name: str, *, revision: str | None = None) -> RemoveResult:
    """Delete a downloaded model (all revisions, or one). Raises InvalidInputError, UnfitError `model_missing`."""
    return inventory.remove(_parsed(name, revision), revision)


def _parsed(name: str, revision: str | None) -> ModelName:
    model = parse(name)
    if revision is not None and model.kind != "repo":
        raise InvalidInputError("no_revisions", f"{name} has no revisions to choose from", "leave --revision out")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidInputError(
            "unknown_revision", f"{revision!r} cannot be a revision", "a branch, a tag or a commit of the hub"
        )
    return model


def _found(model: ModelName, revision: str | None, source: Source) -> ModelFacts | None:
    if model.kind == "demo":
        return ondisk.demo()
    if model.kind == "folder":
        return ondisk.from_folder(model.folder)
    record = ondisk.find(model, revision, source)
    return None if record is None else ondisk.from_record(record, model)


def _source(name: str) -> Source:
    return "modelscope" if name == "modelscope" else "huggingface"
