"""What all well-formed requests of a run came to: failures, lengths, index fields, model names.

The checks look at a handful of answers each; what only some answers get wrong is seen here.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen3emb_launch.vectors import Vector, norm

LONG = 1000  # bytes of a text


@dataclass(frozen=True)
class Shape:
    """What a request was like, as far as it decides how an answer is made."""

    batch: bool = False
    dims: bool = False
    base64: bool = False
    long: bool = False
    busy: bool = False  # others were in the air

    @property
    def traits(self) -> frozenset[str]:
        """The names of what is true of it."""
        return frozenset(name for name in self.__dataclass_fields__ if getattr(self, name))


@dataclass(frozen=True)
class Length:
    """The vector whose length is furthest from 1, and its text. `off` is infinite where it has no direction."""

    off: float = -1.0
    length: float = 1.0
    text: str = ""


@dataclass
class Tally:
    """Counted so far. Safe to use from several threads."""

    asked: int = 0
    failures: list[str] = field(default_factory=list)
    lengths: dict[Shape, Length] = field(default_factory=dict)
    misnumbered: str = ""  # the first index fields that do not count 0, 1, 2 …
    models: Counter[str] = field(default_factory=Counter)  # as the answers name them
    in_flight: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> bool:
        """A request leaves; whether others are under way."""
        with self._lock:
            self.in_flight += 1
            return self.in_flight > 1

    def end(self) -> bool:
        """It is back, whatever came; whether others still are under way."""
        with self._lock:
            self.in_flight -= 1
            return self.in_flight > 0

    def count(self, failure: str | None) -> None:
        """A well-formed request, and why it was not answered with status 200."""
        with self._lock:
            self.asked += 1
            if failure:
                self.failures.append(failure)

    def look_at(
        self, shape: Shape, texts: Sequence[Any], vectors: Sequence[Vector], indices: Sequence[Any], model: Any
    ) -> None:
        """An answer to a request of that shape."""
        found = Length()
        for text, vector in zip(texts, vectors, strict=True):
            length = norm(vector)
            off = abs(length - 1) if 0 < length < math.inf else math.inf  # NaN fails both
            if off > found.off:
                found = Length(off, length, str(text))
        with self._lock:
            if found.off > self.lengths.get(shape, Length()).off:
                self.lengths[shape] = found
            if not self.misnumbered and list(indices) != list(range(len(vectors))):
                self.misnumbered = f"{_short(indices)} for {len(vectors)} texts"
            if isinstance(model, str) and model:
                self.models[model] += 1


def _short(indices: Sequence[Any]) -> str:
    shown = ", ".join(repr(i)[:20] for i in indices[:4])
    return f"[{shown}{', …' if len(indices) > 4 else ''}]"
