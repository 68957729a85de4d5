"""Texts of an exact token count for an endpoint whose tokenizer is not at hand: its own `usage` is the ruler.

Two dozen short requests find what a four-letter word costs there, drop the words that cost otherwise, and find tails
for the remainder (a byte-level tokenizer pays five tokens a word). Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from qwen3emb_launch.bench.endpoint import count_tokens
from qwen3emb_launch.bench.spec import LoadSpec, Vocabulary
from qwen3emb_launch.bench.words import WORDS

Count = Callable[[str], int | None]

_SAMPLE = 6  # words from which the cost of a word is taken
_REPEATS = 8
_CHUNK = 64  # words checked by one request
_FEWEST = 64  # words below which texts would repeat too soon


def vocabulary_of(spec: LoadSpec) -> Vocabulary:
    """Calibrate on the endpoint of `spec`. Raises what `endpoint.embed` raises."""
    return calibrate(lambda text: count_tokens(spec, text))


def calibrate(count: Count, words: tuple[str, ...] = WORDS) -> Vocabulary:
    """The words whose cost is the common one, their cost, the fixed overhead (EOS) and the tails.

    `exact` is False when the endpoint does not count, or counts in a way that words do not explain.
    """
    inexact = Vocabulary(words)
    costs, overheads = [], []
    for word in words[:: max(1, len(words) // _SAMPLE)][:_SAMPLE]:
        one, many = count(f" {word}"), count(f" {word}" * (1 + _REPEATS))
        if one is None or many is None:
            return inexact
        costs.append((many - one) / _REPEATS)
        overheads.append(one)
    cost = median(costs)
    if cost < 1 or cost != int(cost):
        return inexact
    per_word = int(cost)
    overhead = int(median(overheads)) - per_word
    good = _uniform(count, list(words), per_word, overhead)
    if len(good) < _FEWEST or overhead < 0:
        return inexact
    fillers = [""]
    for rest in range(1, per_word):
        tail = _filler(count, good[0], per_word + overhead, rest)
        if tail is None:
            return Vocabulary(tuple(good), per_word, overhead, tuple(fillers))
        fillers.append(tail)
    return Vocabulary(tuple(good), per_word, overhead, tuple(fillers), exact=True)


def _uniform(count: Count, words: list[str], per_word: int, overhead: int) -> list[str]:
    """The words that cost `per_word`, found by halving the groups that do not add up."""
    good: list[str] = []
    pending = [words[i : i + _CHUNK] for i in range(0, len(words), _CHUNK)]
    while pending:
        group = pending.pop()
        if count("".join(f" {w}" for w in group)) == overhead + per_word * len(group):
            good += group
        elif len(group) > 1:
            middle = len(group) // 2
            pending += [group[:middle], group[middle:]]
    return good


def _filler(count: Count, word: str, base: int, rest: int) -> str | None:
    """A tail that costs `rest` tokens behind a word, or None."""
    candidates = ("a" * rest, " a" * rest, "." * rest, " " + "a" * (rest - 1), "." + "a" * (rest - 1))
    return next((tail for tail in candidates if count(f" {word}{tail}") == base + rest), None)
