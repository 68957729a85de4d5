"""The cache on disk: what it survives, what empties it, and whose files it leaves alone."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.gateway import disk_cache
from qwen3emb_launch.gateway.disk_cache import DiskCache
from tests.test_gateway_parts import vector
from tests.test_gateway_process import until


def disk(path: Path, fingerprint: str = "f", reference: np.ndarray | None = None, size: int = 1 << 20) -> DiskCache:
    return DiskCache(path / "c.db", fingerprint, vector(0) if reference is None else reference, size)


def test_the_disk_cache_survives_a_restart_and_is_private(tmp_path: Path) -> None:
    first = disk(tmp_path)
    for i in range(300):
        first.put(i.to_bytes(15, "little"), vector(i), i)
    first.close()
    assert stat.S_IMODE((tmp_path / "c.db").stat().st_mode) == 0o600
    second = disk(tmp_path)
    assert second.secret == first.secret
    for i in range(300):
        found = second.get(i.to_bytes(15, "little"))
        assert found is not None
        assert np.array_equal(found[0], vector(i))
        assert found[1] == i
    second.close()


@pytest.mark.parametrize("change", ["fingerprint", "reference", "width"])
def test_the_disk_cache_is_dropped_when_its_vectors_are_anothers(tmp_path: Path, change: str) -> None:
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    first.close()
    second = {
        "fingerprint": lambda: disk(tmp_path, fingerprint="g"),
        "reference": lambda: disk(tmp_path, reference=vector(5)),
        "width": lambda: disk(tmp_path, reference=vector(0, 16)),
    }[change]()
    assert second.get(b"k" * 15) is None
    assert second.secret != first.secret
    second.close()


def test_other_vectors_go_as_new_ones_come(tmp_path: Path) -> None:
    """To drop gigabytes at once would hold up the start, and the other workers."""
    first = disk(tmp_path)
    for i in range(400):
        first.put(i.to_bytes(15, "little"), vector(i), i)
    first.close()
    second = disk(tmp_path, fingerprint="g")
    kept = [400]
    for i in range(300):
        second.put(b"new" + i.to_bytes(12, "little"), vector(i), i)
        if i % 100 == 99:
            until(lambda i=i: second.get(b"new" + i.to_bytes(12, "little")) is not None)
            kept.append(second._read.execute("SELECT count(*) FROM vectors").fetchone()[0])
    second.close()
    assert kept == [400, 300, 200, 300]
    third = disk(tmp_path, fingerprint="g")
    assert all(third.get(b"new" + i.to_bytes(12, "little")) is not None for i in range(300))
    third.close()


def test_a_vector_that_the_disk_changed_is_a_miss(tmp_path: Path) -> None:
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    first.put(b"l" * 15, vector(2), 1)
    first.close()
    with sqlite3.connect(tmp_path / "c.db") as db:
        db.execute("UPDATE vectors SET vector = (SELECT vector FROM vectors WHERE id = 2) WHERE id = 1")
    db.close()
    second = disk(tmp_path)
    assert second.get(b"k" * 15) is None
    assert second.get(b"l" * 15) is not None
    assert second.broken == 1
    second.close()


def test_a_broken_row_is_written_anew(tmp_path: Path) -> None:
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    first.close()
    with sqlite3.connect(tmp_path / "c.db") as db:
        db.execute("UPDATE vectors SET crc = crc + 1")
    db.close()
    for found in (False, True):
        store = disk(tmp_path)
        assert (store.get(b"k" * 15) is not None) == found
        store.put(b"k" * 15, vector(1), 1)
        store.close()


def spoil(path: Path) -> None:
    """A store of 300 vectors with a hole in its middle."""
    store = disk(path)
    for i in range(300):
        store.put(i.to_bytes(15, "little"), vector(i), i)
    store.close()
    with (path / "c.db").open("r+b") as file:
        file.truncate(16384)


@pytest.mark.parametrize("before", [lambda path: (path / "c.db").write_bytes(b""), spoil])
def test_a_spoilt_store_is_made_anew(tmp_path: Path, before: Callable[[Path], object]) -> None:
    before(tmp_path)
    store = disk(tmp_path)
    store.put(b"k" * 15, vector(1), 1)
    store.close()
    again = disk(tmp_path)
    assert again.get(b"k" * 15) is not None
    again.close()


@pytest.mark.parametrize("content", [b"x", b"somebody's file" * 10_000], ids=["short", "long"])
def test_a_file_that_is_no_store_is_left_alone(tmp_path: Path, content: bytes) -> None:
    """A wrong path costs the cache, not the file."""
    (tmp_path / "c.db").write_bytes(content)
    with pytest.raises(UnfitError, match="left alone"):
        disk(tmp_path)
    assert (tmp_path / "c.db").read_bytes() == content


def test_a_database_with_other_tables_of_those_names_is_left_alone(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "c.db")) as db:
        db.execute("CREATE TABLE about (theirs)")
        db.execute("INSERT INTO about VALUES (1)")
        db.commit()
        with pytest.raises(UnfitError, match="no such column"):
            disk(tmp_path)
        assert db.execute("SELECT theirs FROM about").fetchall() == [(1,)]


def test_a_store_that_others_hold_is_not_taken_from_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup, somebody at work on it by hand: it is waited for, then done without, never removed."""
    monkeypatch.setattr(disk_cache, "PATIENCE", 0.2)
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    until(lambda: first.get(b"k" * 15) is not None)
    with closing(sqlite3.connect(tmp_path / "c.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnfitError, match="locked"):
            disk(tmp_path)
        other.execute("COMMIT")
    first.close()
    again = disk(tmp_path)
    assert again.get(b"k" * 15) is not None
    again.close()


def test_a_full_disk_costs_what_comes_then_and_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = DiskCache._open

    def small(store: DiskCache) -> sqlite3.Connection:
        db = opened(store)
        db.execute("PRAGMA max_page_count=8")  # SQLite answers as on a full disk
        return db

    store = disk(tmp_path)
    store.put(b"k" * 15, vector(1), 1)
    store.close()
    monkeypatch.setattr(DiskCache, "_open", small)
    store = disk(tmp_path)
    for i in range(5_000):
        store.put(i.to_bytes(15, "little"), vector(i), i)
        if store.dropped:
            break
    store.close()
    assert store.dropped
    assert "disk is full" in caplog.text
    monkeypatch.undo()
    again = disk(tmp_path)
    assert again.get(b"k" * 15) is not None
    again.close()


def test_another_process_that_closes_the_store_leaves_our_log_alone(tmp_path: Path) -> None:
    """The last one removes the write-ahead log, which nobody is who has not lost its locks."""
    mine = disk(tmp_path)
    mine.put(b"k" * 15, vector(1), 1)
    until(lambda: mine.get(b"k" * 15) is not None)
    log = (tmp_path / "c.db-wal").stat().st_ino
    script = """
import sys
from pathlib import Path
from qwen3emb_launch.gateway.disk_cache import DiskCache
from tests.test_gateway_parts import vector
DiskCache(Path(sys.argv[1]) / "c.db", "f", vector(0), 1 << 20).close()
"""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, check=True)
    assert (tmp_path / "c.db-wal").stat().st_ino == log
    mine.close()


def test_a_store_that_is_cut_while_it_is_used_ends_nobody(tmp_path: Path) -> None:
    """In a process of its own: what is mapped into memory and gone from the disk is a SIGBUS."""
    script = """
import sys, time
from pathlib import Path
from qwen3emb_launch.gateway.disk_cache import DiskCache
from tests.test_gateway_parts import vector
path = Path(sys.argv[1]) / "c.db"
store = DiskCache(path, "f", vector(0, 2560), 1 << 26)
vectors = [vector(i, 2560) for i in range(2000)]
for i, one in enumerate(vectors):
    store.put(i.to_bytes(15, "little"), one, i)
while path.stat().st_size < 1 << 20:
    time.sleep(0.001)
found = [store.get(i.to_bytes(15, "little")) for i in range(2000)]
path.open("r+b").truncate(16384)
for i in range(2000):
    kept = store.get(i.to_bytes(15, "little"))
    assert kept is None or (kept[0] == vectors[i]).all()
store.close()
print("lived")
"""
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=root, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "lived\n"), ran.stderr


def test_the_disk_cache_keeps_within_its_bytes(tmp_path: Path) -> None:
    store = disk(tmp_path, size=100 * 160)
    for i in range(1000):
        store.put(i.to_bytes(15, "little"), vector(i), i)
    store.close()
    with sqlite3.connect(tmp_path / "c.db") as db:
        kept = [r[0] for r in db.execute("SELECT flags FROM vectors")]
    db.close()
    assert len(kept) == 100
    assert 999 in kept


def test_a_folder_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnfitError):
        disk(tmp_path / "file")
