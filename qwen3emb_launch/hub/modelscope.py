"""ModelScope's hub, through its own client (`modelscope-hub`): its listings and its files.

The client keeps no cache that other tools would share in this form, so files live in our data folder,
`models/modelscope/<owner>--<name>/<commit>/`. MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and the proxy variables are
honoured. Only the listing and the raw byte stream of the client are used; see hub/transfer.py for why.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError, LaunchError, NetworkError
from qwen3emb_launch.hub.listing import Listing, RemoteFile
from qwen3emb_launch.hub.transfer import Body, BrokenTransfer
from qwen3emb_launch.paths import paths

SOURCE = "modelscope"
DEFAULT_REVISION = "master"
_CHUNK = 1 << 18


def repo_folder(repo: str) -> Path:
    """Where one repository's files live."""
    return paths().models / SOURCE / repo.replace("/", "--")


def lock(repo: str) -> Path:
    """The lock of one repository's downloads."""
    return repo_folder(repo) / ".lock"


def describe(repo: str, revision: str | None) -> Listing:
    """The repository's files at a branch or tag. Raises LaunchError.

    ModelScope names no commit for a branch; the last commit among the files that serving could need stands for it.
    """
    asked = revision or DEFAULT_REVISION
    try:
        entries = _client().legacy.list_repo_files(repo, "model", asked)
        blobs = [e for e in entries if e.get("Type", "blob") == "blob"]
        files = tuple(RemoteFile(str(e["Path"]), int(e["Size"]), e.get("Sha256") or None) for e in blobs)
        last: dict[str, Any] = max(blobs, key=lambda e: int(e.get("CommittedDate") or 0), default={})
    except Exception as error:
        raise translate(error, repo, asked) from error
    commit = str(last.get("Revision") or "")
    return Listing(SOURCE, repo, asked, commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None, files)


@contextlib.contextmanager
def open_body(listing: Listing, file: RemoteFile, offset: int) -> Iterator[Body]:
    """One file's bytes from `offset` on. Raises BrokenTransfer for what may be tried again, LaunchError otherwise."""
    import requests
    import urllib3
    from modelscope_hub import APIError, HubError, NetworkError, RateLimitError, ServerError

    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={offset}-"} if offset else {})}
    try:
        response = _client().legacy.download_stream(listing.repo, "model", file.path, listing.revision, headers)
        with response:
            match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            resumed = response.status_code == 206 and match is not None and int(match.group(1)) == offset
            # read1 hands over what has arrived; iter_content fills whole chunks, and a cut would cost the last one
            yield Body(offset if resumed else 0, iter(lambda: response.raw.read1(_CHUNK), b""))
    except (RateLimitError, ServerError, NetworkError) as error:
        raise BrokenTransfer(f"{host()}: {_short(error)}", getattr(error, "retry_after", None)) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise BrokenTransfer(f"{host()}: {_short(error)}") from error
    except APIError as error:
        if error.status_code != 416 or not offset:
            raise translate(error, listing.repo, listing.revision) from error
    except HubError as error:
        raise translate(error, listing.repo, listing.revision) from error
    else:
        return
    with open_body(listing, file, 0) as whole:  # what is here goes beyond what is there: from the start
        yield whole


def folder(listing: Listing) -> Path:
    """The folder to serve from."""
    return repo_folder(listing.repo) / listing.pin.replace("/", "_")


def target(listing: Listing, file: RemoteFile) -> Path:
    """Where one file goes."""
    return folder(listing) / file.path


def remove(repo: str, commit_folder: Path) -> int:
    """Delete one download; the bytes freed."""
    freed = sum(p.stat().st_size for p in commit_folder.rglob("*") if p.is_file())
    try:
        shutil.rmtree(commit_folder)
        if not any(p.is_dir() for p in repo_folder(repo).iterdir()):
            shutil.rmtree(repo_folder(repo))
    except FileNotFoundError:
        return freed
    except OSError as error:
        raise disk_error(error, commit_folder) from error
    return freed


def remove_unfinished(repo: str, finished: list[Path]) -> int:
    """Delete what interrupted downloads left; the bytes freed."""
    root = repo_folder(repo)
    left = [p for p in (root.iterdir() if root.is_dir() else ()) if p.is_dir() and p not in finished]
    return sum(remove(repo, folder) for folder in left)


def host() -> str:
    """The endpoint in use."""
    return str(_client().legacy.endpoint)


def translate(error: Exception, repo: str, revision: str) -> LaunchError:
    """What the client raised, as what happened."""
    import modelscope_hub as theirs
    import requests

    if isinstance(error, theirs.NotExistError):
        return InvalidInputError(
            "unknown_repo", f"{host()} knows no model {repo} at {revision!r}", "qwen3emb models list"
        )
    if isinstance(error, theirs.AuthenticationError):
        return NetworkError(
            "hub_unauthorized", f"{host()} asks for a token for {repo}", "export MODELSCOPE_API_TOKEN=..."
        )
    if isinstance(error, theirs.PermissionDeniedError):
        return NetworkError("hub_forbidden", f"{host()} refuses {repo}", f"may you see {host()}/models/{repo}?")
    if isinstance(error, theirs.RateLimitError):
        return NetworkError("hub_busy", f"{host()} answered 429: too many requests", "wait a minute")
    if isinstance(error, theirs.ServerError):
        return NetworkError("hub_unavailable", f"{host()}: {_short(error)}", "try later, or use --source huggingface")
    if isinstance(error, (theirs.NetworkError, requests.RequestException)):
        return NetworkError(
            "hub_unreachable",
            f"{host()} cannot be reached: {_short(error)}",
            "check the network and proxy, or use --source huggingface",
        )
    if isinstance(error, theirs.APIError):
        return NetworkError("hub_refused", f"{host()}: {_short(error)}", f"look at {host()}/models/{repo}")
    if isinstance(error, OSError):
        return disk_error(error, repo_folder(repo))
    return NetworkError(
        "hub_garbled",
        f"{host()} answered about {repo} in a way that is not understood: {_short(error)}",
        "is MODELSCOPE_ENDPOINT right? Else try --source huggingface",
    )


def _client() -> Any:
    """The client for today's environment variables; one a set of them, for its connection pool."""
    import os

    return _made(os.environ.get("MODELSCOPE_ENDPOINT"), os.environ.get("MODELSCOPE_API_TOKEN"))


@lru_cache(maxsize=4)
def _made(_endpoint: str | None, _token: str | None) -> Any:
    import logging

    from modelscope_hub import HubApi, HubConfig

    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)  # its warnings tell of retries, ours of results
    return HubApi(config=HubConfig())  # reads the variables itself


def _short(error: Exception) -> str:
    """What went wrong, without the client's error codes and the requests that it prints along.

    For a failed connection that is the innermost reason: "Failed to resolve 'modelscope.cn' (...)".
    """
    line = (str(error).splitlines() or [type(error).__name__])[0]
    inner = re.search(r"\(Caused by \w+\((.*)\)\)$", line)
    if inner:
        return inner.group(1).strip("\"'").split(": ", 1)[-1]
    return re.sub(r"^(\[\w+\] )+", "", line)
