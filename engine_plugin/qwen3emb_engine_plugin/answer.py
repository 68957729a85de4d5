"""The answer of /v1/embeddings as bytes: what FastAPI and pydantic would print, without walking the floats.

Pure: knows the shape of the answer from a probe of the engine's own models, nothing else of the engine.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson

Vector = Any  # np.ndarray of float32 (our scheduler side) or list of float (stock)


class AnswerWriter:
    """Writes answers in the form of the engine's `EmbeddingResponse`; keys in its order.

    `usage` is the engine's own usage object as a dict; only the two counts are set anew.
    """

    def __init__(self, usage: dict[str, Any]) -> None:
        self._usage = dict(usage)

    def write(self, vectors: Sequence[Vector], prompt_tokens: int, model: str, encoding_format: str) -> bytes:
        """The body. A vector that is an array is printed as the doubles that its float32 values are."""
        render = _base64 if encoding_format == "base64" else _floats
        parts = [b'{"data":[']
        for index, vector in enumerate(vectors):
            parts.append(b'{"embedding":' if index == 0 else b',{"embedding":')
            parts.append(render(vector))
            parts.append(b',"index":%d,"object":"embedding"}' % index)
        usage = {**self._usage, "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
        parts += (b'],"model":', orjson.dumps(model), b',"object":"list","usage":', orjson.dumps(usage), b"}")
        return b"".join(parts)


def _floats(vector: Vector) -> bytes:
    if isinstance(vector, np.ndarray):
        # Double first: the shortest text of a float32 is not the text of the same number as a double.
        return orjson.dumps(vector.astype(np.float64), option=orjson.OPT_SERIALIZE_NUMPY)
    return orjson.dumps(vector)


def _base64(vector: Vector) -> bytes:
    """A JSON string of little-endian float32, as OpenAI's clients decode it."""
    return b'"' + base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()) + b'"'
