"""Hugging Face's hub: its listings, its files, and its cache, which every other tool on the machine shares.

Files go where huggingface_hub would put them (`models--owner--name/blobs/<hash>`, linked from `snapshots/<commit>/`,
the commit named in `refs/<branch>`), so nothing is downloaded twice on one machine. HF_ENDPOINT, HF_HOME,
HF_HUB_CACHE, HF_TOKEN (or `hf auth login`), HF_HUB_OFFLINE and the proxy variables mean what they always mean.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from qwen3emb_launch.addresses import unknown_host, web_address
from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError, LaunchError, NetworkError
from qwen3emb_launch.hub.listing import Listing, RemoteFile
from qwen3emb_launch.hub.records import Record
from qwen3emb_launch.hub.transfer import Body, BrokenTransfer

SOURCE = "huggingface"
DEFAULT_REVISION = "main"
PARTIAL = ".qwen3emb-partial"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BUSY = (408, 429, 500, 502, 503, 504)
_API_TIMEOUT = 15.0  # seconds
_SILENCE = 30.0  # seconds without a byte, then the transfer is taken up again


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT (a mirror), or the official one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def check_endpoint() -> None:
    """Raise InvalidInputError `bad_endpoint` when HF_ENDPOINT is no address: it would be asked, and waited for."""
    if web_address(endpoint()) is None:
        raise InvalidInputError(
            "bad_endpoint",
            f"HF_ENDPOINT is no web address: {endpoint().rsplit('@', 1)[-1]!r}",
            "for example HF_ENDPOINT=https://hf-mirror.com; unset it for Hugging Face itself",
        )


def host() -> str:
    """The endpoint for messages: without user and password, if it carries some."""
    parts = urlsplit(endpoint())
    return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"


def cache() -> Path:
    """The cache folder, by huggingface_hub's own rules, without importing it: looking around stays fast."""
    env = os.environ
    given = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE")
    if given:
        return Path(os.path.expandvars(given)).expanduser().absolute()
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.path.expandvars(home)).expanduser().absolute() / "hub"


def repo_folder(repo: str) -> Path:
    """Where the cache keeps one repository."""
    return cache() / f"models--{repo.replace('/', '--')}"


def lock(repo: str) -> Path:
    """The lock of one repository's downloads, beside the cache's own."""
    return cache() / ".locks" / repo_folder(repo).name / "qwen3emb.lock"


def offline() -> bool:
    """Whether the user forbade the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def silence(seconds: float = 3.0) -> str:
    """Why nothing at the endpoint answers within `seconds`, name resolution included; empty where something does."""
    import httpx2
    from huggingface_hub import get_session

    silent = f"did not answer within {seconds:g} s"
    found: list[str] = []

    def ask() -> None:
        try:
            get_session().head(endpoint(), timeout=seconds, follow_redirects=False)
        except httpx2.TimeoutException:
            found.append(silent)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no answer
            found.append(_unreached(error))
        else:
            found.append("")

    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(seconds)
    return found[0] if found else silent


def _unreached(error: Exception) -> str:
    """What kept a request from the endpoint, as the end of a sentence that begins with its address."""
    unknown = unknown_host(error, endpoint())
    return f"cannot be reached: {unknown.message if unknown else f'{type(error).__name__} {error}'.strip()}"


def describe(repo: str, revision: str | None) -> Listing:
    """The repository's files at a branch, tag or commit, in one call. Raises LaunchError."""
    from huggingface_hub import HfApi

    asked = revision or DEFAULT_REVISION
    try:
        info = HfApi(endpoint=endpoint()).model_info(repo, revision=asked, files_metadata=True, timeout=_API_TIMEOUT)
    except Exception as error:
        raise translate(error, repo, asked) from error
    files = tuple(
        RemoteFile(s.rfilename, int(s.size or 0), s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
        for s in info.siblings or ()
    )
    whole = all(s.size is not None for s in info.siblings or ()) and all(_has_hash(file) for file in files)
    if not files or not whole or not _COMMIT.fullmatch(info.sha or ""):
        raise NetworkError(
            "hub_incomplete",
            f"{host()} lists {repo} without a commit, or files without sizes and hashes",
            "unset HF_ENDPOINT, or try later",
        )
    return Listing(SOURCE, repo, asked, info.sha, files)


@contextlib.contextmanager
def open_body(listing: Listing, file: RemoteFile, offset: int) -> Iterator[Body]:
    """One file's bytes from `offset` on, redirects followed (the token goes to the hub's own host only).

    Raises BrokenTransfer for what may be tried again, LaunchError for the rest.
    """
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = f"{endpoint()}/{listing.repo}/resolve/{listing.pin}/{quote(file.path)}"
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}  # sizes and ranges count plain bytes
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        with get_session().stream("GET", url, headers=headers, timeout=_SILENCE) as response:
            if response.status_code == 416:  # what is here goes beyond what is there: from the start
                with open_body(listing, file, 0) as whole:
                    yield whole
                return
            if response.status_code in _BUSY:
                raise BrokenTransfer(f"{host()} answered {response.status_code}", _retry_after(response.headers))
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            resumed = response.status_code == 206 and _range_start(response.headers) == offset
            yield Body(offset if resumed else 0, response.iter_bytes())
    except httpx2.TransportError as error:
        raise BrokenTransfer(f"{host()}: {type(error).__name__} {error}".strip()) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError) as error:
        raise translate(error, listing.repo, listing.revision) from error


def folder(listing: Listing) -> Path:
    """The commit's snapshot: the folder to serve from."""
    return repo_folder(listing.repo) / "snapshots" / listing.pin


def target(listing: Listing, file: RemoteFile) -> Path:
    """Where the cache keeps this content: by its hash."""
    return repo_folder(listing.repo) / "blobs" / str(file.sha256 or file.git_sha1)


def place(listing: Listing, files: tuple[RemoteFile, ...]) -> None:
    """Link the blobs into the commit's snapshot and name the commit for its branch."""
    snapshot = folder(listing)
    try:
        for file in files:
            pointer = snapshot / file.path
            pointer.parent.mkdir(parents=True, exist_ok=True)
            fresh = pointer.with_name(f".{pointer.name}.{os.getpid()}")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(os.path.relpath(target(listing, file), pointer.parent))
            fresh.replace(pointer)
        if listing.revision != listing.commit:
            ref = repo_folder(listing.repo) / "refs" / listing.revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            fresh = ref.with_name(f".{ref.name}.{os.getpid()}")
            fresh.write_text(listing.pin, encoding="utf-8")
            fresh.replace(ref)
    except OSError as error:
        raise disk_error(error, snapshot) from error


def adopt(repo: str, revision: str | None) -> Record | None:
    """What another tool has put into the cache, as a record made on the fly; None when there is no such snapshot."""
    root = repo_folder(repo)
    asked = revision or DEFAULT_REVISION
    commit = asked
    if not _COMMIT.fullmatch(asked):
        try:
            commit = (root / "refs" / asked).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    snapshot = root / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    found = [path for path in snapshot.rglob("*") if path.is_file()]
    files = tuple(_adopted(path, path.relative_to(snapshot).as_posix()) for path in sorted(found))
    at = snapshot.stat().st_mtime
    return Record(SOURCE, repo, asked, commit, snapshot, files, at) if files else None


def remove(repo: str, commit: str) -> int:
    """Delete one commit's files from the cache through the library, and unfinished ones; the bytes freed."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    freed = remove_unfinished(repo)
    try:
        strategy = scan_cache_dir(cache()).delete_revisions(commit)
        strategy.execute()
    except CacheNotFound:
        return freed
    except OSError as error:
        raise disk_error(error, repo_folder(repo)) from error
    return freed + strategy.expected_freed_size


def remove_unfinished(repo: str) -> int:
    """Delete what interrupted downloads left: partial files, and whole ones that no snapshot names; the bytes freed."""
    root = repo_folder(repo)
    pattern = f"blobs/*{PARTIAL}" if any(root.glob("snapshots/*")) else "blobs/*"
    freed = 0
    try:
        for path in root.glob(pattern):
            freed += path.stat().st_size
            path.unlink()
        if not any(root.glob("snapshots/*")):
            shutil.rmtree(root, ignore_errors=True)
    except OSError as error:
        raise disk_error(error, root) from error
    return freed


def translate(error: Exception, repo: str, revision: str) -> LaunchError:
    """What the client raised, as what happened."""
    import httpx2
    from huggingface_hub import errors as theirs

    if isinstance(error, theirs.OfflineModeIsEnabled):
        return offline_error(repo)
    if isinstance(error, theirs.HFValidationError):
        return InvalidInputError("unknown_model", f"{repo!r} is no hub id: {error}", "a hub id is owner/name")
    if isinstance(error, theirs.HfHubHTTPError):
        return _refused(error, repo, revision)
    if isinstance(error, (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError)):
        return NetworkError(
            "hub_unreachable",
            f"{host()} {_unreached(error)}",
            f"check the network and proxy, set HF_ENDPOINT to a mirror, or: {_elsewhere(repo)}",
        )
    if isinstance(error, OSError):
        return disk_error(error, cache())
    return NetworkError(
        "hub_garbled",
        f"{host()} answered about {repo} in a way that is not understood: {type(error).__name__} {error}",
        f"is HF_ENDPOINT a Hugging Face hub or a mirror of one? Else: {_elsewhere(repo)}",
    )


def offline_error(repo: str) -> NetworkError:
    """The error for a model that is not here while the user forbids to fetch it."""
    return NetworkError(
        "hub_offline", f"{repo} is not complete on disk and HF_HUB_OFFLINE forbids fetching it", "unset HF_HUB_OFFLINE"
    )


def _elsewhere(repo: str) -> str:
    """`up` has no choice of hubs: what was downloaded is what it finds."""
    return f"qwen3emb download {repo} --source modelscope"


def _refused(error: Any, repo: str, revision: str) -> LaunchError:
    from huggingface_hub import errors as theirs
    from huggingface_hub import get_token

    status = error.response.status_code
    page = f"{host()}/{repo}"
    if isinstance(error, theirs.GatedRepoError):
        return NetworkError(
            "gated_repo", f"{repo} is gated ({status})", f"accept its terms at {page}, then set HF_TOKEN"
        )
    if isinstance(error, theirs.RevisionNotFoundError):
        return InvalidInputError(
            "unknown_revision", f"{repo} has no revision {revision!r}", f"its branches and commits: {page}/commits"
        )
    if status == 401:
        said = "the token that was sent was not accepted" if get_token() else "no token was sent"
        return NetworkError(
            "hub_unauthorized",
            f"{host()} answered 401 for {repo}: there is no such repository, or it is private ({said})",
            "check the name; for a private one: export HF_TOKEN=... or hf auth login",
        )
    if status == 403:
        return NetworkError(
            "hub_forbidden", f"{host()} answered 403 for {repo}", f"may you see {page}? Does the token allow reading?"
        )
    if status == 404:
        return InvalidInputError(
            "unknown_repo", f"{host()} knows no model {repo} at {revision!r} (404)", "qwen3emb models list"
        )
    if status == 429:
        return NetworkError("hub_busy", f"{host()} answered 429: too many requests", "wait a minute, or set HF_TOKEN")
    if status >= 500:
        return NetworkError(
            "hub_unavailable", f"{host()} answered {status} for {repo}", f"try later, or: {_elsewhere(repo)}"
        )
    return NetworkError("hub_refused", f"{host()} answered {status} for {repo}", f"look at {page}")


def _adopted(path: Path, name: str) -> RemoteFile:
    """A cached file as it was listed once: the blob's name is its hash."""
    digest = path.resolve().name
    size = path.stat().st_size
    if re.fullmatch(r"[0-9a-f]{64}", digest):
        return RemoteFile(name, size, sha256=digest)
    return RemoteFile(name, size, git_sha1=digest if _COMMIT.fullmatch(digest) else None)


def _has_hash(file: RemoteFile) -> bool:
    """Whether the hash is one: it becomes a file name in the cache, so a hub may not choose it freely."""
    return bool(re.fullmatch(r"[0-9a-f]{64}", file.sha256 or "") or _COMMIT.fullmatch(file.git_sha1 or ""))


def _retry_after(headers: Any) -> float | None:
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _range_start(headers: Any) -> int | None:
    match = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))
    return int(match.group(1)) if match else None
