"""An engine's answer, read and checked: as many vectors as asked for, each of the right width, every number finite."""

from __future__ import annotations

from binascii import Error as Base64Error
from typing import Any

import numpy as np
import orjson
import pybase64

from qwen3emb_launch.gateway.answer import Vector

NUMBER_BYTES = 32  # of JSON, a generous number
ANSWER_ROOM = 1 << 20  # bytes of an answer beside its numbers


class BadAnswerError(Exception):
    """An engine answered with something that must not be passed on."""


def most_bytes(count: int, width: int) -> int:
    """What an answer of so many vectors may take; one that is longer never ends, or is none."""
    return ANSWER_ROOM + count * width * NUMBER_BYTES


def read_vectors(body: bytes, count: int, width: int | None) -> tuple[list[Vector], int]:
    """The vectors in the order of the request, and the prompt tokens of them all (0 when the engine says none).

    Takes both wire forms, base64 of little-endian float32 and lists of numbers. Raises BadAnswerError.
    """
    try:
        data = orjson.loads(body)
        rows = data["data"]
        found: list[Vector | None] = [None] * count
        for position, row in enumerate(rows):
            index = row.get("index", position)
            if type(index) is not int or index < 0:
                raise BadAnswerError(f"the engine answered a vector for input {index!r}"[:300])
            found[index] = _vector(row["embedding"], width)
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, AttributeError, ValueError) as exc:
        raise BadAnswerError(f"the engine's answer cannot be read: {exc!r}"[:300]) from exc
    if len(rows) != count or any(v is None for v in found):
        raise BadAnswerError(f"the engine answered {len(rows)} vectors for {count} inputs")
    vectors: list[Vector] = found  # type: ignore[assignment]
    if len({v.shape[0] for v in vectors}) > 1:
        raise BadAnswerError("the engine answered vectors of different widths")
    usage = data.get("usage")
    tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return vectors, tokens if type(tokens) is int and tokens >= 0 else 0


def _vector(value: Any, width: int | None) -> Vector:
    if type(value) is str:
        try:
            vector = np.frombuffer(pybase64.b64decode(value, validate=True), dtype="<f4").astype(np.float32, copy=False)
        except Base64Error as exc:
            raise BadAnswerError(f"the engine's base64 is broken: {exc}") from exc
    else:
        vector = np.array(value, dtype=np.float32)
    if vector.ndim != 1 or not vector.shape[0] or (width is not None and vector.shape[0] != width):
        raise BadAnswerError(f"the engine answered a vector of shape {vector.shape}, wanted {width or 'some'} numbers")
    # One pass: a NaN or an infinity anywhere makes the sum of squares one too; a vector of zeros points nowhere.
    square = float(np.dot(vector, vector))
    if not 0.0 < square < float("inf"):
        raise BadAnswerError("the engine answered a vector that is zero or not finite")
    return vector
