"""The cache's choices, measured: hit rate of eviction policies on a Zipf trace, bytes an entry, disk stores.

python benchmarks/gateway_cache.py [--json]     # pip install theine cachebox lmdb for the other rows
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from qwen3emb_launch.gateway.cache import KEY_BYTES, Keyer, VectorCache


class Lru:
    def __init__(self, size: int) -> None:
        self.size, self.data = size, OrderedDict()

    def hit(self, key: bytes) -> bool:
        if key in self.data:
            self.data.move_to_end(key)
            return True
        self.data[key] = True
        if len(self.data) > self.size:
            self.data.popitem(last=False)
        return False


class Ours:
    def __init__(self, size: int) -> None:
        self.vector = np.zeros(1, np.float32)
        self.cache = VectorCache(1, 0)
        self.cache = VectorCache(1, size * self.cache.entry_bytes)

    def hit(self, key: bytes) -> bool:
        if self.cache.get(key) is not None:
            return True
        self.cache.put(key, self.vector, 1)
        return False


class Theine:
    def __init__(self, size: int) -> None:
        from theine import Cache

        self.cache = Cache(size)

    def hit(self, key: bytes) -> bool:
        found = self.cache.get(key)[1] if isinstance(self.cache.get(key), tuple) else self.cache.get(key)
        if found:
            return True
        self.cache.set(key, True)
        return False


class CacheboxLfu:
    def __init__(self, size: int) -> None:
        from cachebox import LFUCache

        self.cache = LFUCache(size)

    def hit(self, key: bytes) -> bool:
        if self.cache.get(key):
            return True
        self.cache[key] = True
        return False


def zipf(texts: int, exponent: float) -> np.ndarray:
    """How often each text is asked for, the hottest first."""
    weights = 1 / np.arange(1, texts + 1) ** exponent
    return weights / weights.sum()


def asked(texts: int, requests: int, exponent: float) -> list[bytes]:
    """The cache keys of a trace, the same at every call."""
    keyer = Keyer("bench", b"k")
    keys = [keyer.text(str(i)) for i in range(texts)]
    return [keys[i] for i in np.random.default_rng(1).choice(texts, requests, p=zipf(texts, exponent)).tolist()]


def policies(texts: int, cached: int, requests: int, exponent: float) -> dict[str, dict[str, float]]:
    """Hit rate after a warm-up of a quarter, and microseconds a request, of each policy on the same trace."""
    trace = asked(texts, requests, exponent)
    out = {
        "best possible (the hottest texts, known in advance)": {
            "hit_rate": round(float(zipf(texts, exponent)[:cached].sum()), 4),
            "us": 0.0,
        }
    }
    for name, kind in {
        "S3-FIFO (ours)": Ours,
        "LRU": Lru,
        "theine (W-TinyLFU)": Theine,
        "cachebox LFU": CacheboxLfu,
    }.items():
        try:
            policy = kind(cached)
        except ImportError:
            continue
        hits = 0
        began = time.perf_counter()
        for number, key in enumerate(trace):
            hit = policy.hit(key)
            hits += hit and number >= requests // 4
        took = time.perf_counter() - began
        out[name] = {"hit_rate": round(hits / (requests - requests // 4), 4), "us": round(1e6 * took / requests, 2)}
    return out


def split(texts: int, cached: int, requests: int, exponent: float) -> dict[str, dict[str, float]]:
    """Hit rate of 1, 2 and 4 workers, each with its share of the connections: with a part of the memory each, with all
    of it each, and with half of it as parts and half as a second level that all share (first in, first out)."""
    trace = asked(texts, requests, exponent)
    dealt = np.random.default_rng(2).integers(0, 4, requests).tolist()
    out = {}
    for workers in (1, 2, 4):
        kinds = {"a part each": (cached // workers, 0), "all of it each": (cached, 0)}
        kinds["half of it shared"] = (cached // 2 // workers, cached // 2)
        out[str(workers)] = {
            name: round(_split(trace, dealt, [Ours(own) for _ in range(workers)], shared), 4)
            for name, (own, shared) in kinds.items()
        }
    return out


def _split(trace: list[bytes], dealt: list[int], caches: list[Ours], shared: int) -> float:
    second: OrderedDict[bytes, bool] = OrderedDict()
    hits = 0
    for number, (key, to) in enumerate(zip(trace, dealt, strict=True)):
        hit = caches[to % len(caches)].hit(key)
        if not hit and shared:
            hit = key in second
            if not hit:
                second[key] = True
                if len(second) > shared:
                    second.popitem(last=False)
        hits += hit and number >= len(trace) // 4
    return hits / (len(trace) - len(trace) // 4)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(width: int, count: int) -> float:
    """Resident bytes an entry really takes, churn included."""
    vector = np.random.default_rng(1).standard_normal(width).astype(np.float32)
    keyer = Keyer("bench", b"k")
    before = resident()
    cache = VectorCache(width, count * (4 * width + 1000))
    cache.capacity = count
    cache._small_limit = count // 10
    cache._ghost = cache._ghost[:count]
    for i in range(3 * count):
        cache.put(keyer.text(f"text {i}"), vector, 9)
    return (resident() - before) / len(cache)


def stores(count: int, width: int) -> dict[str, dict[str, float]]:
    """Microseconds to read one vector, and to write one in batches of 256, of the disk stores."""
    vectors = [np.random.default_rng(i).standard_normal(width).astype(np.float32).tobytes() for i in range(64)]
    keys = [os.urandom(KEY_BYTES) for _ in range(count)]
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        db = sqlite3.connect(f"{folder}/a.db", isolation_level=None)
        db.execute("PRAGMA page_size=16384")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE v (id INTEGER PRIMARY KEY, key BLOB UNIQUE, vector BLOB)")
        began = time.perf_counter()
        for at in range(0, count, 256):
            db.execute("BEGIN")
            db.executemany(
                "INSERT INTO v (key, vector) VALUES (?, ?)",
                [(k, vectors[i % 64]) for i, k in enumerate(keys[at : at + 256])],
            )
            db.execute("COMMIT")
        write = (time.perf_counter() - began) / count
        out["sqlite3"] = {
            "write_us": 1e6 * write,
            "read_us": 1e6 * read(keys, lambda k: db.execute("SELECT vector FROM v WHERE key = ?", (k,)).fetchone()[0]),
        }
        try:
            import lmdb
        except ImportError:
            return out
        env = lmdb.open(f"{folder}/l", map_size=4 << 30, metasync=False, sync=False)
        began = time.perf_counter()
        for at in range(0, count, 256):
            with env.begin(write=True) as txn:
                for i, k in enumerate(keys[at : at + 256]):
                    txn.put(k, vectors[i % 64])
        write = (time.perf_counter() - began) / count

        def get(key: bytes) -> bytes:
            with env.begin() as txn:
                return txn.get(key)

        out["lmdb"] = {"write_us": 1e6 * write, "read_us": 1e6 * read(keys, get)}
    return out


def read(keys: list[bytes], get) -> float:  # noqa: ANN001
    times = []
    for key in keys[:: max(1, len(keys) // 3000)]:
        began = time.perf_counter()
        assert get(key)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--texts", type=int, default=100_000)
    options.add_argument("--cached", type=int, default=10_000)
    options.add_argument("--requests", type=int, default=1_000_000)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    entry = round(memory(2560, 10_000))  # first: memory that something else freed would flatter it
    result = {
        "zipf": {str(e): policies(args.texts, args.cached, args.requests, e) for e in (0.8, 1.0)},
        "workers": {str(e): split(args.texts, args.cached, args.requests, e) for e in (0.8, 1.0)},
        "bytes_per_2560_dim_entry": entry,
        "stores": stores(10_000, 2560),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(
        f"{args.cached:,} of {args.texts:,} texts cached, {args.requests:,} requests\n\n"
        "| policy | Zipf 0.8 | Zipf 1.0 | µs a request |\n|---|---|---|---|"
    )
    for name, row in result["zipf"]["1.0"].items():
        print(
            f"| {name} | {result['zipf']['0.8'][name]['hit_rate']:.1%} | {row['hit_rate']:.1%} | {row['us'] or '-'} |"
        )
    kinds = list(result["workers"]["1.0"]["1"])
    print("\nZipf 1.0\n\n| workers | " + " | ".join(kinds) + " |\n|---" + "|---" * len(kinds) + "|")
    for workers, rates in result["workers"]["1.0"].items():
        print(f"| {workers} | " + " | ".join(f"{rates[kind]:.1%}" for kind in kinds) + " |")
    print(
        f"\nResident bytes a cached 2560-dim vector: {result['bytes_per_2560_dim_entry']:,}\n\n"
        "| store | write, µs | read, µs |\n|---|---|---|"
    )
    for name, row in result["stores"].items():
        print(f"| {name} | {row['write_us']:.0f} | {row['read_us']:.0f} |")


if __name__ == "__main__":
    main()
