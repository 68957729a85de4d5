"""A large request body read in steps, between which others get their turn.

Parsed in one go, 32 MiB hold all others back for up to four seconds and take a gigabyte, where they are made of many
small values. Here the parser gets one text or some thousand token ids at a time, and what `input` cannot be is refused
where it stands: the rest is not read.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import orjson

from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.gateway.request import EmbeddingRequest, bad_json, check, check_fields, inputs

STEP = 1 << 18  # bytes read in one go: a millisecond, or three where they are token ids
QUOTES = 1 << 12  # escaped ones looked at in one go
MOST_IDS = 1 << 20  # in one list: more than any model takes
LONGEST = 1 << 16  # bytes of a number, with the white space around it
SPACE = re.compile(rb"[ \t\n\r]*")
SCALAR = re.compile(rb"[-+.\w]+")  # a number, true, false, null, or nonsense that the parser refuses
QUOTE, BRACKET, BRACE = b'"[{'


async def parse_large(body: bytes | bytearray, max_items: int) -> EmbeddingRequest:
    """As `request.parse`. Raises ApiError 400."""
    return check(await _Reader(body, max_items).read(), max_items)


def _loads(piece: bytes | bytearray) -> Any:
    try:
        return orjson.loads(piece)
    except orjson.JSONDecodeError as exc:
        raise bad_json(exc.msg) from None


class _Reader:
    """One body. `_at` is where reading has come to."""

    def __init__(self, body: bytes | bytearray, max_items: int) -> None:
        self._body = body
        self._max_items = max_items
        self._at = 0
        self._rested = 0

    async def read(self) -> dict[str, Any]:
        """The object. A name that is there twice counts as it stands last."""
        data: dict[str, Any] = {}
        if not self._comes(b"{"):
            raise bad_json("the body must be a JSON object")
        more = not self._comes(b"}")
        while more:
            if self._next() != QUOTE:
                raise bad_json("a field's name is missing")
            name = await self._string()
            check_fields((name,))
            if not self._comes(b":"):
                raise bad_json("a colon is missing")
            data[name] = await self._value(name)
            more = self._goes_on(b"}")
        if self._next() is not None:
            raise bad_json("something follows the object")
        return data

    async def _value(self, name: str) -> Any:
        first = self._next()
        if first == QUOTE:
            return await self._string()
        if first == BRACKET and name == "input":
            return await self._input()
        if first in (BRACKET, BRACE):
            kind = "a list" if first == BRACKET else "an object"
            raise invalid(f"{name!r} must not be {kind}", name, f"bad_{name}")
        return self._scalar()

    async def _input(self) -> list[Any]:
        """Texts, lists of token ids, or token ids."""
        self._at += 1
        first = self._next()
        if first not in (QUOTE, BRACKET, BRACE, ord("]")):
            return await self._numbers()
        items: list[Any] = []
        more = not self._comes(b"]")
        while more:
            if len(items) >= self._max_items:
                message = f"'input' has more than {self._max_items} items; at most {self._max_items} are taken"
                raise invalid(message, "input", "too_many_items")
            here = self._next()
            if here == QUOTE == first:
                items.append(await self._string())
            elif here == BRACKET == first:
                self._at += 1
                items.append(await self._numbers())
            else:
                raise self._stranger(items, here)
            more = self._goes_on(b"]")
        return items

    def _stranger(self, items: list[Any], here: int | None) -> ApiError:
        """The error for an item that is not as those before it: what `inputs` says of it."""
        kinds: dict[int | None, Any] = {QUOTE: "a text", BRACKET: [0], BRACE: {}}
        try:
            inputs([*items, kinds[here] if here in kinds else self._scalar()], self._max_items + 1)
        except ApiError as error:
            return error
        return bad_json("an item is missing")

    async def _numbers(self) -> list[Any]:
        """What is left of a list of numbers, in pieces cut at commas."""
        end = self._body.find(b"]", self._at)
        if end < 0:
            raise bad_json("a list has no end")
        out: list[Any] = []
        start = self._at
        while True:
            cut = self._body.find(b",", min(self._at + STEP, end), end)
            here = self._body[self._at : end if cut < 0 else cut]
            if len(here) > STEP + LONGEST:
                raise bad_json("a number is too long")
            piece = _loads(b"[" + here + b"]")
            if not piece and (cut >= 0 or self._at > start):
                raise bad_json("a number is missing")
            out += piece
            if len(out) > MOST_IDS:
                message = f"the input is more than {MOST_IDS} tokens long, which no model takes"
                raise invalid(message, "input", "context_length_exceeded")
            if cut < 0:
                self._at = end + 1
                await self._rest()
                return out
            self._at = cut + 1
            await self._rest()

    async def _string(self) -> str:
        start, seen = self._at, 0
        while True:
            self._at = self._body.find(b'"', self._at + 1)
            if self._at < 0:
                raise bad_json("a string has no end")
            if not self._escaped(start):
                break
            seen += 1
            if not seen % QUOTES:
                await asyncio.sleep(0)
        self._at += 1
        text: str = _loads(self._body[start : self._at])
        await self._rest()
        return text

    def _escaped(self, start: int) -> bool:
        """Whether the quote here is a part of the string: an odd number of backslashes is before it."""
        span = 16
        while True:
            before = self._body[max(start + 1, self._at - span) : self._at]
            slashes = len(before) - len(before.rstrip(b"\\"))
            if slashes < len(before) or span >= self._at - start:
                return slashes % 2 == 1
            span *= 16

    def _scalar(self) -> Any:
        self._next()
        found = SCALAR.match(self._body, self._at)
        if found is None or found.end() - self._at > LONGEST:
            raise bad_json("a value is missing, or too long")
        self._at = found.end()
        return _loads(found[0])

    def _next(self) -> int | None:
        """The character behind white space, None at the end."""
        found = SPACE.match(self._body, self._at)
        self._at = found.end() if found else self._at
        return self._body[self._at] if self._at < len(self._body) else None

    def _comes(self, character: bytes) -> bool:
        """Whether this character is next; then it is read."""
        here = self._next() == character[0]
        self._at += here
        return here

    def _goes_on(self, end: bytes) -> bool:
        """Whether a comma is next, and not the end."""
        if self._comes(b","):
            return True
        if self._comes(end):
            return False
        raise bad_json("a comma is missing")

    async def _rest(self) -> None:
        """Others' turn, when a step was done."""
        if self._at - self._rested > STEP:
            self._rested = self._at
            await asyncio.sleep(0)
