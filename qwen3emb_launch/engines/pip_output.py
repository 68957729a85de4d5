"""Reading what pip says: progress from its lines, and why it failed from its last ones. Pure.

pip is run with `--progress-bar raw` (24.1 and later), which writes `Progress 16384 of 900000` while it downloads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen3emb_launch.errors import CheckFailedError, LaunchError, NetworkError, UnfitError
from qwen3emb_launch.progress import Progress

BIG = 20_000_000  # bytes: a download worth a stage of its own

_UNITS = {"bytes": 1, "kB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}
_FETCH = re.compile(r"\s*(Downloading|Using cached) (\S+) \(([\d.]+) (bytes|kB|MB|GB)\)")
_WANT = re.compile(r"(?:Collecting|Processing|Requirement already satisfied:) (\S+)")
_RAW = re.compile(r"Progress (\d+) of (\d+)")
_CREDENTIALS = re.compile(r"(\w+://)[^/\s@]+@")
# Said once per package and index; nothing a reader of the last lines learns from.
_NOISE = ("WARNING: Location ", "Looking in ", "[notice]")


class PipReader:
    """Turns pip's lines into progress. `expected` is the number of packages asked for, None when unknown.

    `installing` is how many packages pip said it is installing now; it names none of them while it does.
    """

    def __init__(self, progress: Progress, expected: int | None = None) -> None:
        self.installing: int | None = None
        self._progress = progress
        self._expected = expected
        self._seen: set[str] = set()
        self._shown = 0
        self._big = False

    def feed(self, line: str) -> bool:
        """Take one line; False when it is mere progress, which no log should keep."""
        if raw := _RAW.match(line):
            if self._big:
                self._progress.update(int(raw[1]), int(raw[2]) or None)
            return False
        if want := _WANT.match(line):
            self._collect(want[1])
        elif fetch := _FETCH.match(line):
            self._big = fetch[1] == "Downloading" and float(fetch[3]) * _UNITS[fetch[4]] >= BIG
            if self._big:
                self._progress.step(f"downloading {_package(fetch[2])} ({fetch[3]} {fetch[4]})")
        elif line.startswith("Installing collected packages:"):
            self.installing, self._shown = line.count(",") + 1, 0
            self._progress.step(f"installing {self.installing} packages")
        elif line.startswith("Successfully installed"):
            self.installing = None
        return True

    def installed(self, done: int) -> None:
        """So many of them are on disk by now."""
        if self.installing and done < self.installing and _passes(done, self._shown, self.installing):
            self._shown = done
            self._progress.step(f"installing package {done} of {self.installing}")

    def _collect(self, wanted: str) -> None:
        self._seen.add(wanted)
        done, total = len(self._seen), self._expected
        if not _passes(done, self._shown, total or 250):
            return
        self._shown = done
        if total is None:
            self._progress.step(f"collecting packages ({done} so far)")
        elif done <= total:
            self._progress.step(f"collecting package {done} of {total}")


def _passes(done: int, shown: int, total: int) -> bool:
    """Whether `done` is the first, or a tenth of the total further than what was last shown."""
    return shown == 0 or 10 * (done - shown) >= total


def _package(file: str) -> str:
    """`torch-2.14.1-cp311-….whl` as `torch 2.14.1`."""
    parts = file.rsplit("/", 1)[-1].split("-")
    return " ".join(parts[:2]).removesuffix(".whl").removesuffix(".tar.gz")


def redact(line: str) -> str:
    """The line without the user and password of any address in it."""
    return _CREDENTIALS.sub(r"\1****@", line)


def last_lines(lines: Sequence[str], count: int = 8) -> list[str]:
    """pip's own last words, without its noise."""
    return [line for line in lines if line.strip() and not line.startswith(_NOISE)][-count:]


# Searched in this order in pip's whole output: a word in the line, the error's class, its code, what to do.
_CAUSES: tuple[tuple[str, type[LaunchError], str, str], ...] = (
    ("No space left on device", UnfitError, "disk_full", "free some space, then run the same command: it goes on"),
    ("Disk quota exceeded", UnfitError, "disk_full", "free some space, then run the same command: it goes on"),
    ("Permission denied", UnfitError, "folder_unwritable", "QWEN3EMB_DATA_DIR moves the folder"),
    ("Read-only file system", UnfitError, "folder_unwritable", "QWEN3EMB_DATA_DIR moves the folder"),
    ("DO NOT MATCH THE HASHES", NetworkError, "index_corrupt", "`pip cache purge`, or another index"),
    (
        "ResolutionImpossible",
        UnfitError,
        "engine_conflict",
        "is a constraint set? see `pip config list`, PIP_CONSTRAINT",
    ),
    ("conflicting dependencies", UnfitError, "engine_conflict", "is a constraint set? see `pip config list`"),
    ("401 Client Error", NetworkError, "index_refused", "the package index wants a login: see `pip config list`"),
    ("401 Error", NetworkError, "index_refused", "the package index wants a login: see `pip config list`"),
    ("403 Client Error", NetworkError, "index_refused", "the package index refused: see `pip config list`"),
    ("CERTIFICATE_VERIFY_FAILED", NetworkError, "index_tls", "set PIP_CERT to your network's certificate bundle"),
    ("SSLError", NetworkError, "index_tls", "set PIP_CERT to your network's certificate bundle"),
)
_UNREACHABLE = (
    "Retrying (Retry(", "NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "Max retries exceeded",
    "Temporary failure in name resolution", "Name or service not known", "Connection broken", "IncompleteRead",
    "ProtocolError", "ConnectionResetError", "ProxyError", "Server Error",
)  # fmt: skip
_ABSENT = ("No matching distribution found", "Could not find a version that satisfies")


def failure(lines: Sequence[str], status: int, log: str) -> LaunchError:
    """Why pip failed, with its last lines. `log` is where the whole output is."""
    tail = last_lines(lines)
    said = "\n".join(f"    {line}" for line in tail) or "    (nothing)"
    details = {"pip": tail, "status": status, "log": log}
    text = "\n".join(lines)

    def error(kind: type[LaunchError], code: str, what: str, hint: str) -> LaunchError:
        return kind(
            code, f"{what} (pip exited with {status}). Its last lines:\n{said}\n  full log: {log}", hint, details
        )

    for word, kind, code, hint in _CAUSES:
        if word in text:
            return error(kind, code, f"installing the engine failed: {word[0].lower() + word[1:]}", hint)
    if any(word in text for word in _UNREACHABLE):
        return error(
            NetworkError,
            "index_unreachable",
            "the package index did not answer as it should",
            "check the network and `pip config list` (a mirror: PIP_INDEX_URL), then run the same command: it goes on",
        )
    if any(word in text for word in _ABSENT):
        return error(
            NetworkError,
            "package_missing",
            "the package index lacks a package this needs, or has no wheel of it for this Python and machine",
            "check `pip config list`: a mirror may be behind, a constraint too tight (PIP_INDEX_URL, PIP_CONSTRAINT)",
        )
    return error(CheckFailedError, "pip_failed", "installing the engine failed", "the last lines say why; run it again")
