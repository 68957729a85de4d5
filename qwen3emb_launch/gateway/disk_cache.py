"""Vectors that survive a restart: SQLite in WAL mode, bounded in bytes, shared by the workers of one gateway.

SQLite is in the standard library, safe for several processes and a crash; a read takes 6 µs where LMDB takes 2
(benchmarks/gateway_cache.py), which is nothing beside the engine call it saves and not worth a dependency.
Reads happen on the event loop, writes in batches on a thread of their own. Every row carries a checksum: a vector that
the disk changed is a miss, never an answer. The store is begun anew when what made its vectors has changed.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sqlite3
import threading
import zlib
from pathlib import Path

import numpy as np

from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.gateway.answer import Vector

log = logging.getLogger(__name__)

SCHEMA = 1
BATCH = 256
PENDING = 4_096  # vectors waiting to be written; beyond that new ones are not kept
ROW_OVERHEAD = 128  # bytes a row takes beside its vector: key twice (row and index), flags, checksum
PATIENCE = 5.0  # seconds for others that hold it
MAGIC = b"SQLite format 3\0"
SPOILT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SAME = 0.9999  # the same engine and model, after a restart, on the probe text


def make_place(path: Path) -> None:
    """The folder and an empty file if there is none. Raises UnfitError (`no_disk_cache`)."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as exc:
        raise _unfit(path, exc) from exc


def _unfit(path: Path, exc: Exception) -> UnfitError:
    message = f"the disk cache {path} cannot be used: {exc}"
    return UnfitError("no_disk_cache", message, "check the folder's rights and space")


class DiskCache:
    """One file. Raises UnfitError (`no_disk_cache`) when it cannot be opened."""

    def __init__(self, path: Path, fingerprint: str, reference: Vector, max_bytes: int) -> None:
        self.path = path
        self.width = int(reference.shape[0])
        self.max_rows = max(1, max_bytes // (4 * self.width + ROW_OVERHEAD))
        self.dropped = 0
        self.broken = 0
        self._fingerprint = fingerprint
        self._reference = reference
        try:
            self._read, self.secret = self._prepared()
        except sqlite3.DatabaseError as exc:
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF not in SPOILT:  # in use by others, or not ours
                raise _unfit(path, exc) from exc
            log.warning("the disk cache %s cannot be used (%s) and is made anew", path, exc)
            self._remove()
            try:
                self._read, self.secret = self._prepared()
            except (sqlite3.Error, OSError) as again:
                raise _unfit(path, again) from again
        self._queue: queue.Queue[tuple[bytes, bytes, int] | None] = queue.Queue(PENDING)
        self._writer = threading.Thread(target=self._write, name="disk-cache", daemon=True)
        self._writer.start()

    def _prepared(self) -> tuple[sqlite3.Connection, bytes]:
        """The first connection, and the secret that the keys were made with. Raises UnfitError, sqlite3.Error."""
        # Only before it: to close a file is to lose this process's locks on it, and with them SQLite's, so that another
        # process would take itself for the last one and remove the log that this one writes.
        make_place(self.path)
        with self.path.open("rb") as file:
            if file.read(len(MAGIC)) not in (b"", MAGIC):
                raise _unfit(self.path, ValueError("it is no SQLite file, so not ours, and left alone"))
        db = self._open()
        try:
            return db, self._prepare(db)
        except BaseException:
            db.close()
            raise

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        # Not mapped into memory: a bad sector or a truncated file would be a SIGBUS, and reads are no slower without.
        for pragma in ("page_size=16384", "journal_mode=WAL", "synchronous=NORMAL", "mmap_size=0"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _prepare(self, db: sqlite3.Connection) -> bytes:
        """The tables; gives the secret that the keys were made with. Rows of other vectors are under another one: never
        found again, and dropped as new ones come, since that of gigabytes at once would hold up all workers."""
        db.execute("BEGIN IMMEDIATE")
        db.execute("CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value BLOB)")
        db.execute(
            "CREATE TABLE IF NOT EXISTS vectors"
            " (id INTEGER PRIMARY KEY, key BLOB UNIQUE, flags INTEGER, crc INTEGER, vector BLOB)"
        )
        about = dict(db.execute("SELECT name, value FROM about"))
        if about and not self._same(about):
            log.warning("the disk cache %s is of other vectors: begun anew", self.path)
            about = {}
        if not about:
            last = db.execute("SELECT coalesce(max(id), 0) FROM vectors").fetchone()[0]
            about = {
                "schema": str(SCHEMA).encode(),
                "fingerprint": self._fingerprint.encode(),
                "reference": self._reference.astype("<f4").tobytes(),
                "secret": secrets.token_bytes(32),
                "others": str(last).encode(),  # ids of other vectors go up to here
            }
            db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", about.items())
        db.execute("COMMIT")
        self._others = int(about.get("others", b"0"))
        return bytes(about["secret"])

    def _same(self, about: dict[str, bytes]) -> bool:
        """Same schema, same fingerprint, and the probe text still gives the vector it gave then."""
        if about.get("schema") != str(SCHEMA).encode() or about.get("fingerprint") != self._fingerprint.encode():
            return False
        raw = about.get("reference", b"")
        if len(raw) != 4 * self.width or "secret" not in about:
            return False
        then = np.frombuffer(raw, "<f4")
        cosine = np.dot(then, self._reference) / (np.linalg.norm(then) * np.linalg.norm(self._reference))
        return bool(cosine >= SAME)

    def get(self, key: bytes) -> tuple[Vector, int] | None:
        """The vector and its flags; None for a miss, and for a row that does not match its checksum."""
        try:
            row = self._read.execute(
                "SELECT vector, flags, crc FROM vectors WHERE key = ? AND id > ?", (key, self._others)
            ).fetchone()
        except sqlite3.Error as exc:
            self._complain(exc)
            return None
        if row is None:
            return None
        raw, flags, crc = row
        if type(raw) is not bytes or len(raw) != 4 * self.width or _crc(key, raw, flags) != crc:
            self.broken += 1
            return None
        return np.frombuffer(raw, "<f4"), int(flags)

    def put(self, key: bytes, vector: Vector, flags: int) -> None:
        """Hand a vector to the writer; when that cannot keep up it is not kept."""
        try:
            self._queue.put_nowait((key, vector.astype("<f4", copy=False).tobytes(), flags))
        except queue.Full:
            self.dropped += 1

    def _write(self) -> None:
        try:
            db = self._open()
        except sqlite3.Error as exc:
            self._complain(exc)
            return
        while True:
            first = self._queue.get()
            batch = [first]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            wanted = [(k, f, _crc(k, v, f), v) for k, v, f in filter(None, batch)]
            try:
                self._commit(db, wanted)
            except sqlite3.Error as exc:
                self.dropped += len(wanted)
                self._complain(exc)
            if None in batch:
                db.close()
                return

    def _commit(self, db: sqlite3.Connection, wanted: list[tuple[bytes, int, int, bytes]]) -> None:
        """Write a batch and drop the oldest rows beyond the bound; ids only grow, so their span is the count. Rows of
        other vectors go twice as fast as new ones come."""
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("INSERT OR REPLACE INTO vectors (key, flags, crc, vector) VALUES (?, ?, ?, ?)", wanted)
            db.execute("DELETE FROM vectors WHERE id <= (SELECT max(id) FROM vectors) - ?", (self.max_rows,))
            oldest = "(SELECT min(id) FROM vectors)"
            db.execute(
                f"DELETE FROM vectors WHERE id <= ? AND id < {oldest} + ?",  # noqa: S608
                (self._others, 2 * len(wanted)),
            )
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # SQLite has ended it itself where the disk is full
                db.execute("ROLLBACK")
            raise

    def _complain(self, exc: Exception) -> None:
        self.broken += 1
        if self.broken in (1, 10, 100) or self.broken % 1000 == 0:
            log.warning("the disk cache %s fails (%d times so far): %s", self.path, self.broken, exc)

    def close(self) -> None:
        """Write what is waiting, then close."""
        self._queue.put(None)
        self._writer.join(10)
        self._read.close()


def _crc(key: bytes, vector: bytes, flags: int) -> int:
    return zlib.crc32(vector, zlib.crc32(key + flags.to_bytes(4, "little")))
