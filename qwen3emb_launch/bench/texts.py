"""The texts of a load: unique ones of a wanted length, or a corpus; each ready as JSON bytes. Standard library only.

Texts of words are a serial number written in words, then a slice of a long shuffled run of words: unique from the
first token on, so that no prefix cache helps, and cheap (0.5 microseconds for any length).
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Protocol

from qwen3emb_launch.bench import lengths
from qwen3emb_launch.bench.spec import LoadSpec, Vocabulary
from qwen3emb_launch.bench.words import WORDS

_POOL_WORDS = 1 << 16
_SERIAL_WORDS = 4  # at least
_SERIALS = 1 << 32  # texts that have a serial number of their own, if they are long enough
_RECENT = 1024  # a repeated text is one of this many sent last
_STRIDE = 2_654_435_761  # odd, large: neighbouring serials differ in every word
_WIDTH = 5  # a space and four letters


class TextSource(Protocol):
    """Gives one text after another as a JSON string in bytes, quotes included."""

    def next(self) -> bytes:
        """The next text."""


class WordTexts:
    """Unique texts whose token counts follow a distribution."""

    def __init__(self, vocabulary: Vocabulary, distribution: lengths.Lengths, seed: int, start: int, step: int) -> None:
        self._vocabulary = vocabulary
        self._lengths = distribution
        self._source = random.Random(seed)  # noqa: S311 - texts, not secrets
        self._serial = start
        self._step = step
        words = vocabulary.words
        if any(len(w) != _WIDTH - 1 for w in words) or len(words) < 2:
            raise ValueError("a vocabulary is two or more words of four letters")
        self._words = [" " + w for w in words]
        mixed = random.Random(1).choices(self._words, k=_POOL_WORDS)  # noqa: S311
        self._pool = "".join(mixed)
        self._digits = _serial_words(len(words))

    def next(self) -> bytes:
        """A text nobody has seen, unless it is too short to be unique (`capacity`)."""
        return self.text(self._lengths.draw(self._source)).encode()

    def text(self, tokens: int) -> str:
        """A text of `tokens` tokens, as near as this vocabulary comes, as a JSON string."""
        vocabulary = self._vocabulary
        count, rest = divmod(max(tokens - vocabulary.overhead, 0), vocabulary.per_word)
        if count == 0:
            count, rest = 1, 0  # nobody embeds an empty text
        tail = vocabulary.fillers[rest] if rest < len(vocabulary.fillers) else ""
        serial = self._spell(min(count, self._digits))
        left = count - self._digits
        if left <= 0:
            return f'"{serial}{tail}"'
        body = self._slice(left)
        return f'"{serial}{body}{tail}"'

    def _slice(self, count: int) -> str:
        pool = self._pool
        if count >= _POOL_WORDS:
            whole, count = divmod(count, _POOL_WORDS)
            return pool * whole + pool[: count * _WIDTH]
        at = self._source.randrange(_POOL_WORDS - count)
        return pool[at * _WIDTH : (at + count) * _WIDTH]

    def _spell(self, digits: int) -> str:
        """The serial number as `digits` words: a bijection below `capacity`."""
        base = len(self._words)
        space = base**digits
        stride = _STRIDE % space or 1
        while gcd(stride, space) != 1:
            stride += 1
        value = self._serial * stride % space
        self._serial += self._step
        out = []
        for _ in range(digits):
            value, digit = divmod(value, base)
            out.append(self._words[digit])
        return "".join(out)


def capacity(vocabulary: Vocabulary, tokens: int) -> int:
    """How many different texts of `tokens` tokens there are before the serial numbers repeat."""
    count = max(1, (tokens - vocabulary.overhead) // vocabulary.per_word)
    return int(len(vocabulary.words) ** min(count, _serial_words(len(vocabulary.words))))


def _serial_words(base: int) -> int:
    """Words of a serial number: more where there are few to choose from."""
    return next(n for n in itertools.count(_SERIAL_WORDS) if base**n >= _SERIALS)


class CorpusTexts:
    """The texts of a file, one JSON string a line, from line `start` on and round again."""

    def __init__(self, lines: Sequence[bytes], start: int, step: int) -> None:
        if not lines:
            raise ValueError("the corpus is empty")
        self._lines = lines
        self._at = start % len(lines)
        self._step = step

    def next(self) -> bytes:
        """The next line."""
        line = self._lines[self._at]
        self._at = (self._at + self._step) % len(self._lines)
        return line


class RepeatingTexts:
    """A share of texts sent before, drawn from the last thousand: what a cache in front of the engine would see."""

    def __init__(self, fresh: TextSource, rate: float, seed: int) -> None:
        self._fresh = fresh
        self._rate = rate
        self._source = random.Random(seed)  # noqa: S311
        self._recent: deque[bytes] = deque(maxlen=_RECENT)

    def next(self) -> bytes:
        """A known text with probability `rate`, else a fresh one."""
        recent = self._recent
        if recent and self._source.random() < self._rate:
            return recent[self._source.randrange(len(recent))]
        text = self._fresh.next()
        recent.append(text)
        return text


def source_of(spec: LoadSpec) -> TextSource:
    """The texts that `spec` asks for. Raises ValueError for a spec that cannot be met, OSError for its corpus."""
    fresh: TextSource
    if spec.corpus:
        fresh = CorpusTexts(Path(spec.corpus).read_bytes().splitlines(), spec.text_start, spec.processes)
    else:
        vocabulary = spec.vocabulary or Vocabulary(WORDS)
        fresh = WordTexts(vocabulary, lengths.parse(spec.lengths), spec.seed, spec.text_start, spec.processes)
    return RepeatingTexts(fresh, spec.repeat_rate, spec.seed) if spec.repeat_rate else fresh
