"""From a name to complete, verified files: which hub, what is missing, does it fit, fetch, check, remember."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3emb_launch.catalog import shape_from_config
from qwen3emb_launch.disk import free_bytes
from qwen3emb_launch.errors import InvalidInputError, LaunchError, NetworkError, UnfitError
from qwen3emb_launch.hub import huggingface, modelscope, ondisk, records
from qwen3emb_launch.hub.checkpoint import read_checkpoint
from qwen3emb_launch.hub.listing import Listing, RemoteFile, needed
from qwen3emb_launch.hub.locking import exclusive
from qwen3emb_launch.hub.names import ModelName
from qwen3emb_launch.hub.records import Record
from qwen3emb_launch.hub.transfer import Body, Job, Meter, Retries, fetch_all
from qwen3emb_launch.progress import Progress

Source = Literal["auto", "huggingface", "modelscope"]
_AGAIN = ("hub_unreachable", "hub_unavailable", "hub_busy")
_GIVE_WAY = (*_AGAIN, "hub_garbled", "hub_incomplete")
_LISTING_TRIES = 4


@dataclass(frozen=True)
class DownloadResult:
    """What a download did, or with `dry_run` would do. Bytes are bytes; `seconds` is the whole of it.

    `already_here` means nothing was missing and no network call was made. `bytes_resumed` were on disk from an
    earlier, unfinished run, or shared with another revision.
    """

    model: str
    repo: str
    source: str
    revision: str
    commit: str | None
    path: Path
    files: tuple[RemoteFile, ...]
    bytes_total: int
    bytes_fetched: int
    bytes_resumed: int
    free_bytes: int
    seconds: float
    already_here: bool
    dry_run: bool


@dataclass(frozen=True)
class _Place:
    """A source's adapter, in the terms that a download needs."""

    describe: Callable[[str, str | None], Listing]
    open_body: Callable[[Listing, RemoteFile, int], AbstractContextManager[Body]]
    target: Callable[[Listing, RemoteFile], Path]
    folder: Callable[[Listing], Path]
    lock: Callable[[str], Path]


_PLACES = {
    adapter.SOURCE: _Place(adapter.describe, adapter.open_body, adapter.target, adapter.folder, adapter.lock)
    for adapter in (huggingface, modelscope)
}


def download(
    name: ModelName,
    progress: Progress,
    *,
    revision: str | None = None,
    source: Source = "auto",
    dry_run: bool = False,
    force: bool = False,
    retries: Retries | None = None,
) -> DownloadResult:
    """Make `name` (of kind `repo`) complete on disk, with no network call if it is.

    `force` asks the hub all the same and fetches what is missing by its listing: after bad files were deleted.

    Raises NetworkError, InvalidInputError (unknown repository or revision, not servable), UnfitError (disk).
    """
    started = time.monotonic()
    here = None if force else ondisk.find(name, revision, source)
    if here is not None:
        return _result(name, here, started, dry_run=dry_run)
    if huggingface.offline():
        raise huggingface.offline_error(name.repo)
    if source != "modelscope":
        huggingface.check_endpoint()
    retries = retries or Retries()
    progress.step(f"asking for {name.repo}")
    listing = _listing(name, revision, source, progress, retries)
    files = needed(listing.files, listing.repo)
    if dry_run:
        missing = _bytes_missing(listing, files)
        return _result(name, _record(listing, files), started, dry_run=True, would_fetch=missing)
    with exclusive(_PLACES[listing.source].lock(name.repo), name.short, progress, sleep=retries.sleep):
        here = None if force else ondisk.find(name, listing.pin, listing.source)
        if here is not None:  # another process brought it while this one waited
            return _result(name, here, started)
        meter = _fetch(name, listing, files, progress, retries)
        if listing.source == huggingface.SOURCE:
            huggingface.place(listing, files)
        record = _record(listing, files)
        read_checkpoint(record.folder)
        records.write(record)
    return _result(name, record, started, meter)


def _listing(name: ModelName, revision: str | None, source: Source, progress: Progress, retries: Retries) -> Listing:
    """Ask the hub that `source` names; `auto` goes from Hugging Face to ModelScope where the first does not answer.

    Only for the catalog's models and without a revision: elsewhere the same name may be somebody else's on the other
    hub, and revisions are not shared.
    """
    if source == "modelscope":
        return _described("modelscope", name.repo, revision, retries)
    if source == "huggingface" or name.model is None or revision is not None:
        return _described("huggingface", name.repo, revision, retries)
    silent = huggingface.silence()
    if not silent:
        try:
            return _described("huggingface", name.repo, None, retries)
        except NetworkError as error:
            if error.code not in _GIVE_WAY:
                raise
            first: LaunchError = error
    else:
        first = NetworkError("hub_unreachable", f"{huggingface.host()} {silent}", "--source modelscope")
    progress.step(f"{first.message}; asking ModelScope")
    try:
        return _described("modelscope", name.repo, None, retries)
    except LaunchError as second:
        raise NetworkError(
            "hub_unreachable",
            f"no hub gives {name.repo}: {first.message}; {second.message}",
            "check the network and proxy, or set HF_ENDPOINT to a mirror",
        ) from second


def _described(source: str, repo: str, revision: str | None, retries: Retries) -> Listing:
    tries = _LISTING_TRIES if source == huggingface.SOURCE else 1  # ModelScope's client tries four times itself
    for failures in range(1, tries + 1):
        try:
            return _PLACES[source].describe(repo, revision)
        except NetworkError as error:
            if error.code not in _AGAIN or failures == tries:
                raise
            retries.pause(failures)
    raise AssertionError("unreachable")


def _jobs(listing: Listing, files: tuple[RemoteFile, ...]) -> list[Job]:
    """One job a content that is not in place; two files of equal content are one blob."""
    place = _PLACES[listing.source]
    jobs = {}
    for file in files:
        target = place.target(listing, file)
        if not (target.is_file() and target.stat().st_size == file.size):
            jobs[target] = Job(file, target.with_name(target.name + huggingface.PARTIAL), target)
    return list(jobs.values())


def _left(job: Job) -> int:
    """Bytes of a job still to come, judged by what an earlier run left."""
    there = job.partial.stat().st_size if job.partial.is_file() else 0
    return job.file.size - (there if there <= job.file.size else 0)


def _bytes_missing(listing: Listing, files: tuple[RemoteFile, ...]) -> int:
    return sum(_left(job) for job in _jobs(listing, files))


def _fetch(
    name: ModelName, listing: Listing, files: tuple[RemoteFile, ...], progress: Progress, retries: Retries
) -> Meter:
    jobs = _jobs(listing, files)
    meter = Meter(sum(f.size for f in files), progress)
    progress.step(f"{name.repo} from {listing.source}")
    meter.resumed(meter.total - sum(job.file.size for job in jobs))
    _check_room(listing, sum(_left(job) for job in jobs))
    body = _PLACES[listing.source].open_body

    def get(part: list[Job]) -> None:
        fetch_all(part, lambda file, offset: body(listing, file, offset), meter, retries)

    get([job for job in jobs if job.file.path == "config.json"])  # gigabytes only for what can be served
    _check_architecture(listing, files)
    get([job for job in jobs if job.file.path != "config.json"])
    return meter


def _check_room(listing: Listing, missing: int) -> None:
    folder = _PLACES[listing.source].target(listing, listing.files[0]).parent
    free = free_bytes(folder)
    if missing > free:
        raise UnfitError(
            "disk_full",
            f"{listing.repo} needs {missing / 1e9:.2f} GB more, and {folder} has {free / 1e9:.2f} GB free",
            "free some space, or choose another disk: HF_HOME (Hugging Face), QWEN3EMB_DATA_DIR (ModelScope)",
            details={"needed_bytes": missing, "free_bytes": free},
        )


def _check_architecture(listing: Listing, files: tuple[RemoteFile, ...]) -> None:
    import json

    config = next(f for f in files if f.path == "config.json")
    path = _PLACES[listing.source].target(listing, config)
    try:
        shape_from_config(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InvalidInputError(
            "bad_config",
            f"config.json of {listing.repo} is no JSON: {error}",
            "qwen3emb models list shows models that work",
        ) from error


def _record(listing: Listing, files: tuple[RemoteFile, ...]) -> Record:
    folder = _PLACES[listing.source].folder(listing)
    return Record(listing.source, listing.repo, listing.revision, listing.commit, folder, files, time.time())


def _result(
    name: ModelName,
    record: Record,
    started: float,
    meter: Meter | None = None,
    *,
    dry_run: bool = False,
    would_fetch: int | None = None,
) -> DownloadResult:
    already_here = meter is None and would_fetch is None
    fetched = meter.fetched if meter else (would_fetch or 0)
    return DownloadResult(
        model=name.short,
        repo=record.repo,
        source=record.source,
        revision=record.revision,
        commit=record.commit,
        path=record.folder,
        files=record.files,
        bytes_total=record.total_bytes,
        bytes_fetched=fetched,
        bytes_resumed=0 if already_here else max(0, record.total_bytes - fetched),
        free_bytes=free_bytes(record.folder),
        seconds=round(time.monotonic() - started, 3),
        already_here=already_here,
        dry_run=dry_run,
    )
