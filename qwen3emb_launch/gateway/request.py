"""The body of `POST /v1/embeddings`, checked field by field before anything is done with it.

Whatever is wrong is answered as OpenAI would: 400, the parameter named, the item's index where it is one item's fault.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from qwen3emb_launch.errors import nearest
from qwen3emb_launch.gateway.answer import Encoding
from qwen3emb_launch.gateway.api_errors import ApiError, invalid

FIELDS = frozenset({"input", "model", "dimensions", "encoding_format", "user"})
KINDS = {type(None): "null", bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "a list"}


@dataclass(slots=True)
class EmbeddingRequest:
    """A request that has the right form: either `texts` or `ids` is filled."""

    texts: list[str]
    ids: list[list[int]]
    model: str
    dimensions: int | None
    encoding: Encoding

    @property
    def count(self) -> int:
        """How many vectors are asked for."""
        return len(self.texts) or len(self.ids)


def parse(body: bytes | bytearray, max_items: int = 2048) -> EmbeddingRequest:
    """Raises ApiError 400."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise bad_json(f"the body is not JSON: {exc}") from None
    if type(data) is not dict:
        raise bad_json(f"the body must be a JSON object, not {_kind(data)}")
    check_fields(data.keys())
    return check(data, max_items)


def bad_json(message: str) -> ApiError:
    """The error for a body that is no JSON object."""
    return invalid(message, code="bad_json")


def check_fields(names: Iterable[str]) -> None:
    """Raises ApiError 400 for one that is not known."""
    if FIELDS.issuperset(names):
        return
    unknown = min(set(names) - FIELDS)
    guess = nearest(unknown, set(FIELDS))
    shown = unknown if len(unknown) <= 60 else unknown[:60] + "..."
    raise invalid(f"unknown field {shown!r}" + (f": did you mean {guess!r}?" if guess else ""), shown, "unknown_field")


def check(data: dict[str, Any], max_items: int) -> EmbeddingRequest:
    """The request of a parsed body with known fields. Raises ApiError 400."""
    model = data.get("model")
    if type(model) is not str or not model:
        raise invalid("'model' must be a non-empty string", "model", "bad_model")
    dimensions = _whole(data.get("dimensions"))
    if dimensions is not None and type(dimensions) is not int:
        raise invalid(f"'dimensions' must be an integer, not {_kind(dimensions)}", "dimensions", "bad_dimensions")
    encoding = data.get("encoding_format")
    if encoding not in (None, "float", "base64"):
        raise invalid("'encoding_format' must be 'float' or 'base64'", "encoding_format", "bad_encoding_format")
    user = data.get("user")
    if user is not None and type(user) is not str:
        raise invalid(f"'user' must be a string, not {_kind(user)}", "user", "bad_user")
    if "input" not in data:
        raise invalid("'input' is missing", "input", "bad_input")
    texts, ids = inputs(data["input"], max_items)
    return EmbeddingRequest(texts, ids, model, dimensions, "base64" if encoding == "base64" else "float")


def inputs(value: Any, max_items: int) -> tuple[list[str], list[list[int]]]:
    """The four forms of `input`, as texts or as lists of token ids: a text, texts, token ids, lists of them."""
    if type(value) is str:
        _check_text(value, 0, 1)
        return [value], []
    if type(value) is not list:
        raise invalid(
            f"'input' must be a string, a list of strings, token ids or a list of them, not {_kind(value)}",
            "input", "bad_input",
        )  # fmt: skip
    if not value:
        raise invalid("'input' is an empty list", "input", "empty_input")
    first = type(_whole(value[0]))
    if first is int:
        return [], [_ids(value, 0, 1)]
    if len(value) > max_items:
        raise invalid(f"'input' has {len(value)} items; at most {max_items} are taken", "input", "too_many_items")
    if first is str:
        for index, text in enumerate(value):
            if type(text) is not str:
                raise invalid(
                    f"input[{index}] is {_kind(text)}, the items before it are strings", "input", "mixed_input", index
                )
            _check_text(text, index, len(value))
        return value, []
    if first is list:
        for index, ids in enumerate(value):
            if type(ids) is not list:
                raise invalid(
                    f"input[{index}] is {_kind(ids)}, the items before it are token ids", "input", "mixed_input", index
                )
            value[index] = _ids(ids, index, len(value))
        return [], value
    raise invalid(f"input[0] is {_kind(value[0])}, not a string or token ids", "input", "bad_input", 0)


def _check_text(text: str, index: int, count: int) -> None:
    if not text or text.isspace():
        raise invalid(f"{_item(index, count)} is blank", "input", "blank_input", index)
    if "\x00" in text:
        raise invalid(f"{_item(index, count)} contains a NUL character", "input", "nul_in_input", index)


def _ids(ids: list[Any], index: int, count: int) -> list[int]:
    """A list of token ids, checked."""
    if not ids:
        raise invalid(f"{_item(index, count)} is an empty list of token ids", "input", "blank_input", index)
    if set(map(type, ids)) == {int}:
        return ids
    whole = [_whole(token) for token in ids]
    for token in whole:
        if type(token) is not int:
            raise invalid(
                f"{_item(index, count)} holds {_kind(token)} among its token ids", "input", "mixed_input", index
            )
    return whole


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 256.0 is the integer 256."""
    return int(value) if type(value) is float and value.is_integer() else value


def _item(index: int, count: int) -> str:
    return f"input[{index}]" if count > 1 else "'input'"


def _kind(value: Any) -> str:
    """A JSON value's type, as JSON calls it."""
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
    }
    return names.get(type(value), "an object")
