"""Faults that only some requests meet: an encoding, a batch, a second request, a text, load. See faulty_endpoint.py."""

from __future__ import annotations

import base64
import math
import struct
import unicodedata
from collections.abc import Callable
from typing import Any

from faulty_endpoint import Exchange, Fault, each_vector

from qwen3emb_launch.vectors import from_base64, to_base64


def _unit(vector: list[float]) -> list[float]:
    return [x / math.hypot(*vector) for x in vector]


def _coded(exchange: Exchange, pack: Callable[[list[float]], bytes]) -> tuple[int, Any]:
    """Base64 of that where base64 is asked."""
    if exchange.body.pop("encoding_format", None) != "base64":
        return exchange.forward()
    return each_vector(exchange, lambda v, _: base64.b64encode(pack(v)).decode())


def _float32(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


def _in_a_byte(vector: list[float]) -> list[float]:
    step = max(map(abs, vector)) / 127
    return [round(x / step) * step for x in vector]


def base64_of_float64(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: struct.pack(f"<{len(v)}d", *v))


def base64_of_float16(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: struct.pack(f"<{len(v)}e", *v))


def base64_of_big_endian(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: struct.pack(f">{len(v)}f", *v))


def base64_of_another_alphabet(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: base64.b64decode(to_base64(v).translate(str.maketrans("Aa", "aA"))))


def base64_of_bytes(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: _float32(_in_a_byte(v)))


def base64_unnormalised(exchange: Exchange) -> tuple[int, Any]:
    return _coded(exchange, lambda v: _float32([9 * x for x in v]))


def base64_ignores_dims(exchange: Exchange) -> tuple[int, Any]:
    if exchange.body.get("encoding_format") == "base64":
        exchange.body.pop("dimensions", None)
    return _coded(exchange, _float32)


def base64_reverses_batches(exchange: Exchange) -> tuple[int, Any]:
    asked = exchange.body.get("encoding_format") == "base64"
    status, answer = _coded(exchange, _float32)
    if status == 200 and asked:
        _move(answer, lambda vectors: vectors[::-1])
    return status, answer


def base64_unasked(exchange: Exchange) -> tuple[int, Any]:
    exchange.body.pop("encoding_format", None)
    return each_vector(exchange, lambda v, _: to_base64(v))


def _move(answer: dict[str, Any], order: Callable[[list[Any]], list[Any]]) -> None:
    vectors = order([item["embedding"] for item in answer["data"]])
    for item, vector in zip(answer["data"], vectors, strict=True):
        item["embedding"] = vector


def off_by_one_in_batches(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and len(answer["data"]) > 8:
        _move(answer, lambda vectors: [*vectors[1:], vectors[0]])
    return status, answer


def joins_batches(exchange: Exchange) -> tuple[int, Any]:
    """All texts of a batch are one text, and its vector is everybody's."""
    texts = exchange.texts
    if len(texts) < 2:
        return exchange.forward()
    exchange.body["input"] = " ".join(texts)
    status, answer = exchange.forward()
    if status == 200:
        answer["data"] = [{**answer["data"][0], "index": i} for i in range(len(texts))]
    return status, answer


def _scaled(answer: dict[str, Any], factor: float) -> None:
    for item in answer["data"]:
        vector = item["embedding"]
        item["embedding"] = [factor * x for x in (from_base64(vector) if isinstance(vector, str) else vector)]


def unnormalised_in_batches(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and len(answer["data"]) > 1:
        _scaled(answer, 5)
    return status, answer


def unnormalised_under_load(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and exchange.busy > 3:
        _scaled(answer, 5)
    return status, answer


def unnormalised_when_long(exchange: Exchange) -> tuple[int, Any]:
    texts = exchange.texts
    return each_vector(exchange, lambda v, i: [3 * x for x in v] if texts and len(texts[i]) > 1500 else v)


def not_a_number_for_accents(exchange: Exchange) -> tuple[int, Any]:
    texts = exchange.texts
    return each_vector(exchange, lambda v, i: [*v[:-1], math.nan] if texts and "é" in texts[i] else v)


def zeros_for_a_text(exchange: Exchange) -> tuple[int, Any]:
    texts = exchange.texts
    return each_vector(exchange, lambda v, i: [0.0] * len(v) if texts and texts[i].startswith("I want") else v)


def endless_integers(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: [10**400, *v[1:]])


def stored_in_int8(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: _unit(_in_a_byte(v)))


def stored_in_float8(exchange: Exchange) -> tuple[int, Any]:
    def e4m3(x: float) -> float:
        mantissa, exponent = math.frexp(x)
        return math.ldexp(round(mantissa * 16) / 16, exponent)

    return each_vector(exchange, lambda v, _: _unit([*map(e4m3, v)]))


def a_dimension_is_zero(exchange: Exchange) -> tuple[int, Any]:
    return each_vector(exchange, lambda v, _: _unit([0.0, *v[1:]]))


def _cached_later(exchange: Exchange, key: Callable[[str], str]) -> tuple[int, Any]:
    """A cache that is asked before a batch is computed and filled afterwards: within one batch nothing is found."""
    texts, dims, known = exchange.texts, exchange.body.get("dimensions"), dict(exchange.memory)

    def change(vector: list[float], i: int) -> list[float]:
        if not texts:
            return vector
        exchange.memory.setdefault(f"{dims} {key(texts[i])}", vector)
        return known.get(f"{dims} {key(texts[i])}", vector)

    return each_vector(exchange, change)


def caches_without_case(exchange: Exchange) -> tuple[int, Any]:
    return _cached_later(exchange, str.lower)


def caches_by_folded_width(exchange: Exchange) -> tuple[int, Any]:
    return _cached_later(exchange, lambda t: unicodedata.normalize("NFKC", t))


def caches_stripped(exchange: Exchange) -> tuple[int, Any]:
    return _cached_later(exchange, str.strip)


def caches_by_end(exchange: Exchange) -> tuple[int, Any]:
    return _cached_later(exchange, lambda t: t[-1000:])


def keeps_the_end(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.encode()[-512:].decode(errors="ignore") or t)
    return exchange.forward()


def replaces_tabs(exchange: Exchange) -> tuple[int, Any]:
    exchange.rewrite(lambda t: t.replace("\t", " "))
    return exchange.forward()


def dims_ignored_in_batches(exchange: Exchange) -> tuple[int, Any]:
    if isinstance(exchange.body.get("input"), list):
        exchange.body.pop("dimensions", None)
    return exchange.forward()


def dims_are_kept(exchange: Exchange) -> tuple[int, Any]:
    """Who asked for fewer dims once gets them for ever."""
    asked = exchange.body.get("dimensions")
    if isinstance(asked, int) and asked < 200:
        exchange.memory["dims"] = asked
    kept = None if asked else exchange.memory.get("dims")
    return each_vector(exchange, lambda v, _: _unit(v[:kept]))


def only_some_dims(exchange: Exchange) -> tuple[int, Any]:
    dims = exchange.body.get("dimensions")
    if isinstance(dims, int) and dims not in (256, 1024, 2560, 4096):
        return 400, {"error": {"message": f"dimensions {dims}: one of 256, 1024, 2560, 4096"}}
    return exchange.forward()


def _usage(exchange: Exchange, change: Callable[[int], tuple[int, int]]) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200:
        prompt, total = change(answer["usage"]["prompt_tokens"])
        answer["usage"] = {"prompt_tokens": prompt, "total_tokens": total}
    return status, answer


def usage_doubled(exchange: Exchange) -> tuple[int, Any]:
    return _usage(exchange, lambda n: (2 * n, 2 * n))


def usage_constant(exchange: Exchange) -> tuple[int, Any]:
    return _usage(exchange, lambda _: (7, 7))


def usage_contradicts_itself(exchange: Exchange) -> tuple[int, Any]:
    return _usage(exchange, lambda n: (n, 0))


def joins_lists_of_ids(exchange: Exchange) -> tuple[int, Any]:
    given = exchange.body.get("input")
    if isinstance(given, list) and given and isinstance(given[0], list):
        exchange.body["input"] = [[i for ids in given for i in ids]] * len(given)
    return exchange.forward()


def index_restarts(exchange: Exchange) -> tuple[int, Any]:
    """Batches are computed 32 at a time, and numbered so."""
    status, answer = exchange.forward()
    if status == 200:
        for i, item in enumerate(answer["data"]):
            item["index"] = i % 32
    return status, answer


def another_model(exchange: Exchange) -> tuple[int, Any]:
    status, answer = exchange.forward()
    if status == 200 and exchange.count % 9 == 5:
        answer["model"] = "text-embedding-ada-002"
    return status, answer


# Fault, the check of the quick level that must fail, and what its cause must say.
QUICK: list[tuple[Fault, str, str]] = [
    (base64_of_float64, "base64", "not of float32"),
    (base64_of_float16, "base64", "not of float32"),
    (base64_of_big_endian, "base64", "not little-endian"),
    (base64_of_another_alphabet, "base64", "not little-endian"),
    (base64_of_bytes, "base64", "coarser number format"),
    (base64_unnormalised, "throughout", "no L2 normalisation in base64"),
    (base64_ignores_dims, "base64", "`dimensions` is ignored in base64"),
    (base64_reverses_batches, "base64", "in batches is of another text"),
    (base64_unasked, "answers", "unasked"),
    (off_by_one_in_batches, "batch", "order is swapped"),
    (joins_batches, "batch", "is repeated"),
    (unnormalised_in_batches, "throughout", "no L2 normalisation in batches"),
    (unnormalised_under_load, "throughout", "no L2 normalisation under load"),
    (not_a_number_for_accents, "throughout", "overflow on some texts"),
    (zeros_for_a_text, "throughout", "zero vector"),
    (endless_integers, "finite", "every vector is NaN"),
    (stored_in_int8, "steps", "int8"),
    (stored_in_float8, "steps", "float8"),
    (a_dimension_is_zero, "demo_reference", "close to the right vectors"),
    (caches_without_case, "faithful", "lower-cased"),
    (caches_by_folded_width, "faithful", "NFKC"),
    (caches_stripped, "faithful", "white space is stripped"),
    (replaces_tabs, "faithful", "tabs"),
    (dims_ignored_in_batches, "dims", "ignored in batches"),
    (dims_are_kept, "dims", "kept for the next"),
    (only_some_dims, "dims", "refuses these `dimensions`"),
    (usage_doubled, "usage", "something else than the tokens"),
    (usage_constant, "usage", "does not count tokens"),
    (usage_contradicts_itself, "usage", "contradicts itself"),
    (another_model, "model_name", "another model"),
]
# The same of the full level.
FULL: list[tuple[Fault, str, str]] = [
    (unnormalised_when_long, "throughout", "no L2 normalisation .*for long texts"),
    (index_restarts, "throughout", "index fields are wrong"),
    (joins_lists_of_ids, "token_ids", "lists of token ids are mixed up"),
    (caches_by_end, "tail", "cached by their end"),
    (keeps_the_end, "tail", "beginning of long texts is cut"),
]
