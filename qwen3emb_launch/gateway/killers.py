"""Texts that end engines: found by the batcher, then refused for a while, since clients ask again by themselves.

Those that may be one, because an engine ended with them in the air, are remembered too: a request may end before its
text is found out, and what repeats it must not begin anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from qwen3emb_launch.gateway.api_errors import ApiError

DEATHS = 3  # of engines with a text, the last of them alone with it, until it is the cause
REMEMBERED = 300.0  # seconds: not for ever, since what it met may be mended
MOST = 1_024
MOST_SUSPECTS = 8_192  # what a few full engines have in the air


class _Recent:
    """A number to a cache key, for a while, the last so many."""

    def __init__(self, most: int, clock: Callable[[], float]) -> None:
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[bytes, tuple[float, int]] = OrderedDict()

    def put(self, key: bytes, number: int) -> None:
        self._kept[key] = self._clock() + REMEMBERED, number
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def get(self, key: bytes) -> int:
        """0 for what is not there."""
        until, number = self._kept.get(key, (0.0, 0))
        if number and until <= self._clock():
            del self._kept[key]
            return 0
        return number

    def drop(self, key: bytes) -> None:
        self._kept.pop(key, None)


class Killers:
    """Cache keys of such texts, and of those that may be."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._found = _Recent(MOST, clock)
        self._suspects = _Recent(MOST_SUSPECTS, clock)

    def add(self, key: bytes) -> None:
        """This one did it."""
        self._found.put(key, 1)
        self._suspects.drop(key)

    def known(self, key: bytes) -> bool:
        """Whether it did, lately."""
        return self._found.get(key) > 0

    def suspect(self, key: bytes, deaths: int) -> None:
        """So many engines ended with this one, not yet proved to be the cause."""
        self._suspects.put(key, deaths)

    def deaths(self, key: bytes) -> int:
        """How many did, lately."""
        return self._suspects.get(key)

    def clear(self, key: bytes) -> None:
        """An engine answered it."""
        self._suspects.drop(key)

    def error(self, *, again: bool) -> ApiError:
        """What its clients get. `again`: it has just been tried, else it is not tried at all."""
        message = (
            f"{DEATHS} engines ended with this input, the last one alone with it"
            if again
            else f"engines ended with this input a while ago; it is not sent to one within {REMEMBERED:g} s of that"
        )
        return ApiError(502, "input_ends_engine", message, source="engine", final=True)
