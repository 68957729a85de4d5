"""Texts that end engines: found by the batcher, then refused for a while, since clients ask again by themselves."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from qwen3emb_launch.gateway.api_errors import ApiError

DEATHS = 3  # of engines with a text, the last of them alone with it, until it is the cause
REMEMBERED = 300.0  # seconds: not for ever, since what it met may be mended
MOST = 1_024


class Killers:
    """Cache keys of such texts, the last ones."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, key: bytes) -> None:
        """This one did it."""
        self._until[key] = self._clock() + REMEMBERED
        self._until.move_to_end(key)
        if len(self._until) > MOST:
            self._until.popitem(last=False)

    def known(self, key: bytes) -> bool:
        """Whether it did, lately."""
        until = self._until.get(key)
        if until is None:
            return False
        if until > self._clock():
            return True
        del self._until[key]
        return False

    def error(self, *, again: bool) -> ApiError:
        """What its clients get. `again`: it has just been tried, else it is not tried at all."""
        message = (
            f"{DEATHS} engines ended with this input, the last one alone with it"
            if again
            else f"engines ended with this input a while ago; it is not sent to one within {REMEMBERED:g} s of that"
        )
        return ApiError(502, "input_ends_engine", message, source="engine", final=True)
