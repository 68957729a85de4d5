"""Texts of an exact token count for an endpoint: its own `usage` is the ruler, asked by few and short requests.

Two requests tell the fixed overhead (EOS), eight more whether common words cost the same there, which a large
vocabulary and a byte-level one both say yes to. Where they do not, the tokenizer's file says what each word costs, if
it is at hand and the endpoint's counts agree; else words are weighed, three by one request, until there are enough.
Standard library only; a tokenizer's file is read by whoever hands it in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qwen3emb_launch.bench.endpoint import count_tokens
from qwen3emb_launch.bench.spec import LoadSpec, Vocabulary
from qwen3emb_launch.bench.words import WORDS

Count = Callable[[str], int | None]
Costs = Callable[[Sequence[str]], Mapping[str, int] | None]

MOST_REQUESTS = 96
MOST_SECONDS = 20.0  # after which nothing more is asked; what is on its way is awaited
AT_ONCE = 8  # requests

_REPEATS = 8
_GROUP = 64  # words of one request: 321 tokens at five a word, which the shortest contexts take
_ENOUGH = 64  # words that keep texts of six of them unique for 69 billion
_FEWEST = 16  # words below which texts would repeat too soon
_WEIGHINGS = 72  # requests at most: what is left of them finds the tails
_WEIGHTS = (1, 5, 25)  # a word of four letters behind a space is one to five tokens: digits to the base five
_TAILS: tuple[Callable[[int], str], ...] = (  # what may cost n tokens behind a word
    lambda n: "a" * n,
    lambda n: " a" * n,
    lambda n: "." * n,
    lambda n: " " + "a" * (n - 1),
    lambda n: "." + "a" * (n - 1),
)

Found = TypeVar("Found")
# Asks for the counts of some texts at a time and gets them, or None when it must do with what it has.
_Asking = Generator[list[str], list[int] | None, Found]


def vocabulary_of(spec: LoadSpec, costs: Costs | None = None) -> Vocabulary:
    """Calibrate on the endpoint of `spec`; `costs` is its tokenizer where that is at hand.

    Raises what `endpoint.embed` raises.
    """
    return calibrate(lambda text: count_tokens(spec, text), costs=costs)


def calibrate(
    count: Count,
    words: tuple[str, ...] = WORDS,
    costs: Costs | None = None,
    *,
    requests: int = MOST_REQUESTS,
    seconds: float = MOST_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> Vocabulary:
    """Words that all cost the same, their cost, the fixed overhead (EOS) and the tails.

    `exact` is False when the endpoint does not count, or in a way that words do not explain within so many requests and
    seconds. `count` is called from several threads.
    """
    asking = _calibration(words, costs)
    asked, end = 0, clock() + seconds
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        texts = next(asking)
        while True:
            counts: list[int] | None = None
            if asked + len(texts) <= requests and clock() < end:
                asked += len(texts)
                answers = list(pool.map(count, texts))
                counts = [n for n in answers if n is not None]
                counts = counts if len(counts) == len(texts) else None
            texts = asking.send(counts)
    except StopIteration as done:
        found: Vocabulary = done.value
        return found
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _calibration(words: tuple[str, ...], costs: Costs | None) -> _Asking[Vocabulary]:
    """What to ask, and what follows from the answers."""
    inexact = Vocabulary(words)
    counts = yield [f" {words[0]}", f" {words[0]}" * (1 + _REPEATS)]
    if counts is None:
        return inexact
    one, many = counts
    cost, rest = divmod(many - one, _REPEATS)
    overhead = one - cost
    if rest or cost < 1 or overhead < 0:
        return inexact
    groups = _in_pieces(words, _GROUP)
    counts = yield [_text(group) for group in groups]
    if counts is None:
        return inexact
    per_word, good = _uniform(groups, [total - overhead for total in counts])
    if len(good) < _ENOUGH and costs is not None:
        per_word, good = yield from _looked_up(costs(words) or {}, overhead)
    if len(good) < _ENOUGH:
        per_word, good = yield from _weighed(words, overhead)
    if len(good) < _FEWEST:
        return inexact
    fillers = yield from _fillers(good[0], per_word, overhead)
    return Vocabulary(tuple(good), per_word, overhead, fillers, exact=len(fillers) == per_word)


def _uniform(groups: Sequence[Sequence[str]], totals: Sequence[int]) -> tuple[int, list[str]]:
    """The commonest cost and the words of the groups that add up to it.

    One token a word is the least there is, so each word of such a group costs one. At another cost a group of mixed
    words may add up by chance, half of all words do not.
    """
    by: dict[int, list[str]] = {}
    for group, total in zip(groups, totals, strict=True):
        if total % len(group) == 0:
            by.setdefault(total // len(group), []).extend(group)
    per_word, good = _most(by)
    sure = per_word == 1 or 2 * len(good) >= sum(map(len, groups))
    return (per_word, good) if sure else (1, [])


def _looked_up(costs: Mapping[str, int], overhead: int) -> _Asking[tuple[int, list[str]]]:
    """The words of the commonest cost by the tokenizer's file, as far as the endpoint agrees."""
    by: dict[int, list[str]] = {}
    for word, cost in costs.items():
        by.setdefault(cost, []).append(word)
    per_word, good = _most(by)
    pieces = _in_pieces(good, _GROUP)
    counts = (yield [_text(piece) for piece in pieces]) if pieces else None
    return per_word, _agreed(pieces, counts or [], per_word, overhead)


def _weighed(words: Sequence[str], overhead: int) -> _Asking[tuple[int, list[str]]]:
    """Enough words of one cost, or as many as there was time to find: a word sent 1, 5 or 25 times is one digit."""
    by: dict[int, list[str]] = {}
    pending, over = _in_pieces(words, len(_WEIGHTS))[:_WEIGHINGS], False
    while pending and not over and len(_most(by)[1]) < _ENOUGH:
        some, pending = pending[:AT_ONCE], pending[AT_ONCE:]
        counts = yield [_text(w for w, n in zip(few, _WEIGHTS, strict=False) for _ in range(n)) for few in some]
        over = counts is None
        for few, total in zip(some, counts or [], strict=False):
            for word, cost in _digits(few, total - overhead):
                by.setdefault(cost, []).append(word)
    # At one token a word no tails are needed, which there is no time to find.
    per_word, good = (1, by[1]) if over and len(by.get(1, [])) >= _FEWEST else _most(by)
    pieces = _in_pieces(good, _GROUP)
    counts = (yield [_text(piece) for piece in pieces]) if pieces else None
    # Beside other words they may cost otherwise; without time to see, what each cost by itself has to do.
    return per_word, good if counts is None else _agreed(pieces, counts, per_word, overhead)


def _digits(few: Sequence[str], total: int) -> list[tuple[str, int]]:
    """The cost of each weighed word; none where the total is no sum of such costs."""
    rest = total - sum(_WEIGHTS[: len(few)])
    found = []
    for word in few:
        rest, digit = divmod(rest, _WEIGHTS[1])
        found.append((word, 1 + digit))
    return [] if rest else found


def _fillers(word: str, per_word: int, overhead: int) -> _Asking[tuple[str, ...]]:
    """Tails of 0, 1, 2… tokens behind a word, up to the first that none was found for."""
    found: dict[int, str] = {0: ""}
    for tail in _TAILS:
        missing = [n for n in range(1, per_word) if n not in found]
        counts = (yield [f" {word}{tail(n)}" for n in missing]) if missing else None
        if counts is None:
            break
        fits = zip(missing, counts, strict=True)
        found |= {n: tail(n) for n, total in fits if total == overhead + per_word + n}
    known = next(n for n in range(per_word + 1) if n not in found)
    return tuple(found[n] for n in range(known))


def _agreed(pieces: Sequence[Sequence[str]], counts: Sequence[int], per_word: int, overhead: int) -> list[str]:
    """The words of the pieces that cost what they should."""
    pairs = zip(pieces, counts, strict=False)
    return [word for piece, total in pairs if total == overhead + per_word * len(piece) for word in piece]


def _most(by: Mapping[int, list[str]]) -> tuple[int, list[str]]:
    """The cost that most words have; of equals the smaller, whose texts come nearer to a length.

    Words that cost nothing do not count: no number of them comes to a length.
    """
    known = [item for item in by.items() if item[0] >= 1]
    return max(known, key=lambda item: (len(item[1]), -item[0]), default=(1, []))


def _text(words: Iterable[str]) -> str:
    return "".join(f" {word}" for word in words)


def _in_pieces(words: Sequence[str], size: int) -> list[Sequence[str]]:
    return [words[i : i + size] for i in range(0, len(words), size)]
