"""Vectors as the answer's JSON, put together from ready pieces: no dictionary, no walk over floats in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
import pybase64

Vector: TypeAlias = npt.NDArray[np.float32]
Encoding: TypeAlias = Literal["float", "base64"]


def shrink(vector: Vector, dims: int | None) -> Vector:
    """The first `dims` components brought back to norm 1; the vector itself when `dims` is None or its full width.

    A full-width vector is passed on as the engine made it, not normalised again. Always a copy or the same object,
    never a view of somebody's memory that could be written later.
    """
    if dims is None or dims == vector.shape[0]:
        return vector
    head = vector[:dims]
    length = float(np.sqrt(np.dot(head, head)))
    return head / np.float32(length) if length > 0 else head.copy()


def encode(vector: Vector, encoding: Encoding) -> bytes:
    """One vector as JSON: shortest floats that give the same float32 back, or base64 of little-endian float32."""
    if encoding == "float":
        return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)
    return b'"' + pybase64.b64encode(vector.tobytes()) + b'"'


def embeddings(vectors: Sequence[bytes], model: str, tokens: int) -> list[bytes]:
    """The body of a good answer in pieces, from encoded vectors in the request's order."""
    parts = [b'{"object":"list","data":[']
    last = len(vectors) - 1
    for index, vector in enumerate(vectors):
        parts.append(b'{"object":"embedding","index":%d,"embedding":' % index)
        parts.append(vector)
        parts.append(b"}," if index < last else b"}")
    parts.append(
        b'],"model":%b,"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (orjson.dumps(model), tokens, tokens)
    )
    return parts
