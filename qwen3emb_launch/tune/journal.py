"""Every result on disk as it comes: JSON lines, flushed to the disk one by one; a run goes on from them.

The first line says what was tuned; a journal of something else is not gone on with. A last line that a crash cut off is
dropped. One writer: the file is locked for as long as the run lasts.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3emb_launch.disk import disk_error
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.results import plain
from qwen3emb_launch.tune.trials import Moves, Round, Status, Trial

SCHEMA = 1
KIND = "qwen3emb-tune"
AGAIN = frozenset({Status.INTERRUPTED, Status.TIMEOUT})  # no results: a resumed run tries them again


class Journal:
    """One run's file, open and locked. `trials` and `rounds` are what it holds so far."""

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open, or make, the journal.

        Raises InvalidInputError (`journal_exists`, `journal_mismatch`, `bad_journal`), UnfitError (`tune_running` and
        what the disk says).
        """
        self.path = path
        self.trials: list[Trial] = []
        self.rounds: list[Round] = []
        self.finished = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise disk_error(error, path) from error
        try:
            self._lock()
            self._open(identity, resume)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Give the file and its lock back."""
        os.close(self._fd)

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self.trials.append(trial)
        self._write("trial", plain(trial))

    def begin_final(self, levels: Mapping[Moves, float]) -> None:
        """A final starts: rounds of an earlier one count no more."""
        self.rounds.clear()
        self._write("final", {"levels": [[list(map(list, k)), v] for k, v in levels.items()]})

    def add_round(self, one: Round) -> None:
        """Keep a round of the final."""
        self.rounds.append(one)
        self._write("round", plain(one))

    def end(self, how: str) -> None:
        """The run's last word: `done`, `interrupted`, `failed`."""
        self._write("end", {"how": how})

    # ---- the file -------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UnfitError(
                "tune_running", f"another `qwen3emb tune` writes {self.path}", "wait for it, or give another --out"
            ) from error

    def _open(self, identity: Mapping[str, Any], resume: bool) -> None:
        data = self._read()
        whole, _, rest = data.rpartition(b"\n")
        lines = whole.splitlines()
        if not lines:
            os.ftruncate(self._fd, 0)  # at most a first line that was cut off
            self._write("tune", {"schema": SCHEMA, "kind": KIND, "identity": plain(identity)})
            return
        events = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        self._check_header(events[0], identity if resume else None)
        self._replay(events[1:])
        if not resume:
            if self.finished or not self.trials:  # nothing in it that another run could lose
                self._set_aside(data)
                self._write("tune", {"schema": SCHEMA, "kind": KIND, "identity": plain(identity)})
                return
            raise InvalidInputError(
                "journal_exists",
                f"{self.path} holds an unfinished run of {len(self.trials)} trials",
                f"go on with --resume, or start over: rm {self.path}",
            )
        if rest:
            os.ftruncate(self._fd, len(data) - len(rest))
        self.finished = False

    def _read(self) -> bytes:
        size = os.fstat(self._fd).st_size
        return os.pread(self._fd, size, 0)

    def _parse(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            event = json.loads(line)
            return dict(event)
        except (ValueError, TypeError, RecursionError) as exc:
            raise self._bad(f"line {number}: {exc}") from exc

    def _check_header(self, header: Mapping[str, Any], identity: Mapping[str, Any] | None) -> None:
        if header.get("kind") != KIND:
            raise self._bad("its first line is not that of a tune journal")
        if header.get("schema", 0) > SCHEMA:
            raise self._bad(f"schema {header['schema']} is newer than {SCHEMA}")
        if identity is None:
            return
        differ = _differences(header.get("identity", {}), plain(identity))
        if differ:
            shown = "; ".join(f"{key}: {_short(then)} then, {_short(now)} now" for key, then, now in differ)
            raise InvalidInputError(
                "journal_mismatch",
                f"{self.path} is of another run: {shown}",
                "give the same options as then, or another --out",
                {"differ": [key for key, _, _ in differ]},
            )

    def _replay(self, events: list[dict[str, Any]]) -> None:
        for number, event in enumerate(events, 2):
            try:
                if event["event"] == "trial":
                    self.trials.append(Trial.from_dict(event["data"]))
                elif event["event"] == "final":
                    self.rounds.clear()
                elif event["event"] == "round":
                    self.rounds.append(Round.from_dict(event["data"]))
                self.finished = event["event"] == "end" and event["data"]["how"] == "done"
            except (KeyError, TypeError, ValueError) as exc:
                raise self._bad(f"line {number}: {exc!r}") from exc
        self.trials = [t for t in self.trials if t.status not in AGAIN and (t.moves or t.status is Status.OK)]

    def _set_aside(self, data: bytes) -> None:
        """Keep the finished run's lines under another name."""
        aside = self.path.with_name(self.path.name + ".1")
        try:
            aside.write_bytes(data)
            aside.chmod(0o600)
            os.ftruncate(self._fd, 0)
        except OSError as error:
            raise disk_error(error, aside) from error
        self.trials, self.rounds, self.finished = [], [], False

    def _write(self, event: str, data: Mapping[str, Any]) -> None:
        line = json.dumps({"event": event, "data": data} if event != "tune" else {"event": event, **data})
        whole = line.encode() + b"\n"
        size = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, whole) < len(whole):
                os.ftruncate(self._fd, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._fd)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _bad(self, what: str) -> InvalidInputError:
        return InvalidInputError(
            "bad_journal", f"{self.path} cannot be gone on with: {what}", f"start over: rm {self.path}"
        )


def _differences(kept: Mapping[str, Any], wanted: Mapping[str, Any], inside: str = "") -> list[tuple[str, Any, Any]]:
    """(key, then, now) of what is not the same, as deep as there are keys."""
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*kept, *wanted]):
        then, now = kept.get(key), wanted.get(key)
        if isinstance(then, Mapping) and isinstance(now, Mapping):
            found += _differences(then, now, f"{inside}{key}.")
        elif then != now:
            found.append((inside + key, then, now))
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"
