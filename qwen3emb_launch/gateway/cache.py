"""Hot vectors in memory: bounded in bytes, evicted by S3-FIFO, stored in slabs that cannot fragment.

S3-FIFO (Yang et al., SOSP 2023): new keys pass a small queue first and only those asked for again reach the main one,
so a flood of texts seen once cannot push out the hot ones; a ghost table remembers who was turned away too early.
On Zipf traffic it beats LRU (benchmarks/gateway_cache.py, docs/gateway.md) and a hit changes one byte, no list.

A key is a digest of the exact text (or token ids) under the fingerprint of what made the vectors; see `digest`.
"""

from __future__ import annotations

import secrets
from array import array
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from qwen3emb_launch.gateway.answer import Vector
from qwen3emb_launch.gateway.tokens import Prepared

KEY_BYTES = 15  # 120 bits: no accidental collision in any cache that fits a machine; a bytes object of 48 bytes
OVERHEAD = 200  # bytes an entry takes beside its vector: key, dictionary slot, queue slot, ghost; checked by a test
SLAB_BYTES = 4 << 20
MAX_FREQ = 3
SMALL_SHARE = 0.1


class Keyer:
    """Makes cache keys. The key is secret, so that nobody can search for two texts with one digest.

    `secret` is kept with a disk cache (whose keys must mean the same after a restart), fresh otherwise.
    """

    def __init__(self, fingerprint: str, secret: bytes | None = None) -> None:
        base = blake2b(key=secret or secrets.token_bytes(32), digest_size=KEY_BYTES)
        base.update(fingerprint.encode() + b"\0")
        self._base = base

    def text(self, text: str) -> bytes:
        """The key of a text as it goes to the engine, instruction included."""
        digest = self._base.copy()
        digest.update(b"t")
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def prepared(self, prepared: Prepared) -> bytes:
        """The key of checked token ids as they go to the engine, EOS included (or of the text they stood for)."""
        ids = prepared.payload
        if isinstance(ids, str):
            return self.text(ids)
        digest = self._base.copy()
        digest.update(b"i")
        digest.update(array("Q", ids).tobytes())
        return digest.digest()


@dataclass
class CacheCounts:
    """What happened so far, in items."""

    hits: int = 0
    misses: int = 0
    inserted: int = 0
    evicted: int = 0


class VectorCache:
    """Full-width float32 vectors by key. `max_bytes` 0 keeps nothing."""

    def __init__(self, width: int, max_bytes: int) -> None:
        self.width = width
        self.entry_bytes = 4 * width + OVERHEAD
        self.capacity = max_bytes // self.entry_bytes
        self.counts = CacheCounts()
        self._rows = max(1, SLAB_BYTES // (4 * width))
        self._small_limit = max(1, int(self.capacity * SMALL_SHARE))
        self._ghost = array("Q", bytes(8 * max(1, self.capacity)))
        self._clear()

    def _clear(self) -> None:
        self._slabs: list[Vector] = []
        self._slots: dict[bytes, int] = {}
        self._keys: list[bytes] = []
        self._freq = bytearray()
        self._tokens = array("I")
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def used_bytes(self) -> int:
        """Bytes the entries take, vectors and bookkeeping."""
        return len(self._slots) * self.entry_bytes

    def get(self, key: bytes) -> tuple[Vector, int] | None:
        """The vector and its text's token count. The vector is the cache's own memory: read it before returning
        to the event loop, or copy it."""
        slot = self._slots.get(key)
        if slot is None:
            self.counts.misses += 1
            return None
        self.counts.hits += 1
        if self._freq[slot] < MAX_FREQ:
            self._freq[slot] += 1
        return self._row(slot), self._tokens[slot]

    def put(self, key: bytes, vector: Vector, tokens: int) -> None:
        """Keep a copy of a full-width vector. A key that is there already keeps its place."""
        if self.capacity == 0:
            return
        known = self._slots.get(key)
        if known is not None:
            self._row(known)[:] = vector
            self._tokens[known] = tokens
            return
        slot = self._evict() if len(self._slots) >= self.capacity else self._grow()
        self._row(slot)[:] = vector
        self._slots[key] = slot
        self._keys[slot] = key
        self._freq[slot] = 0
        self._tokens[slot] = tokens
        self.counts.inserted += 1
        place, mark = self._ghost_of(key)
        if self._ghost[place] == mark:
            self._ghost[place] = 0
            self._main.append(slot)
        else:
            self._small.append(slot)

    def clear(self) -> None:
        """Forget everything."""
        self._clear()
        self._ghost = array("Q", bytes(8 * max(1, self.capacity)))

    def _row(self, slot: int) -> Vector:
        slab, row = divmod(slot, self._rows)
        found: Vector = self._slabs[slab][row]
        return found

    def _grow(self) -> int:
        slot = len(self._keys)
        if slot == len(self._slabs) * self._rows:
            rows = min(self._rows, self.capacity - slot)
            self._slabs.append(np.empty((rows, self.width), np.float32))
        self._keys.append(b"")
        self._freq.append(0)
        self._tokens.append(0)
        return slot

    def _ghost_of(self, key: bytes) -> tuple[int, int]:
        """Place and mark in the ghost table: direct-mapped, so a newcomer forgets whoever had its place."""
        mark = int.from_bytes(key[:8], "little") | 1
        return mark % len(self._ghost), mark

    def _evict(self) -> int:
        """The slot of the entry that goes."""
        while True:
            if len(self._small) >= self._small_limit or not self._main:
                slot = self._small.popleft()
                if self._freq[slot] > 0:
                    self._freq[slot] = 0
                    self._main.append(slot)
                    continue
                place, mark = self._ghost_of(self._keys[slot])
                self._ghost[place] = mark
            else:
                slot = self._main.popleft()
                if self._freq[slot] > 0:
                    self._freq[slot] -= 1
                    self._main.append(slot)
                    continue
            del self._slots[self._keys[slot]]
            self.counts.evicted += 1
            return slot
