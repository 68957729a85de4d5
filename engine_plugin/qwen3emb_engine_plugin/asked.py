"""Reading a request body. Only what is plainly well-formed is taken; the stock route answers everything else.

So errors, coercions and rare fields stay SGLang's own: there is no second opinion about what is valid.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

KNOWN = frozenset({"input", "model", "encoding_format", "dimensions", "user"})


class Asked(NamedTuple):
    """A plain request: `texts` or `ids` holds one entry an item, the other is None."""

    texts: list[str] | None
    ids: list[list[int]] | None
    dimensions: int | None
    encoding_format: str


def read(body: bytes) -> Asked | None:
    """The request, or None where the stock route has to look at it."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict or not value.keys() <= KNOWN:
        return None
    model = value.get("model", "")
    if type(model) is not str or ":" in model:  # `base:adapter` names a LoRA adapter
        return None
    dimensions = value.get("dimensions")
    encoding_format = value.get("encoding_format", "float")
    user = value.get("user")
    if (
        (dimensions is not None and type(dimensions) is not int)
        or encoding_format not in ("float", "base64")
        or (user is not None and type(user) is not str)
    ):
        return None
    items = value.get("input")
    if type(items) is str:
        return Asked([items], None, dimensions, encoding_format) if items.strip() else None
    if type(items) is not list or not items:
        return None
    kinds = set(map(type, items))
    if kinds == {str}:
        return Asked(items, None, dimensions, encoding_format) if all(map(str.strip, items)) else None
    if kinds == {int}:
        return Asked(None, [items], dimensions, encoding_format) if _are_ids(items) else None
    if kinds == {list}:
        return Asked(None, items, dimensions, encoding_format) if all(map(_are_ids, items)) else None
    return None


def _are_ids(items: list[Any]) -> bool:
    return bool(items) and set(map(type, items)) == {int} and min(items) >= 0 and max(items) < 2**31
