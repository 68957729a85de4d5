"""Large bodies, read in steps: the same requests and refusals as in one go, and nobody waits meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import pairwise

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3emb_launch.gateway import large_body
from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.large_body import parse_large
from qwen3emb_launch.gateway.request import EmbeddingRequest, parse
from tests.gateway_bench import error, gateway, rows
from tests.null_engine import NullEngine, Served

TEXTS = st.text(st.sampled_from('ab\\"[]{},: \t\n\u00e9\u4e2d\U0001f600'), min_size=1, max_size=12)
IDS = st.lists(st.one_of(st.integers(0, 999), st.just(7.0)), min_size=1, max_size=12)
INPUTS = st.one_of(TEXTS, st.lists(TEXTS, max_size=9), IDS, st.lists(IDS, max_size=9), st.integers(-9, 9), st.none())
BODIES = st.fixed_dictionaries(
    {"model": TEXTS, "input": INPUTS},
    optional={"dimensions": st.one_of(st.none(), st.integers(1, 99)), "user": TEXTS, "other": st.none()},
)
MAX_ITEMS = 8
PUNCTUATION = [bytes([one]) for one in b',:[]{}"-1\\ ']


def whole(body: bytes) -> EmbeddingRequest | int:
    try:
        return parse(body, MAX_ITEMS)
    except ApiError as refused:
        return refused.status


def in_steps(body: bytes | bytearray) -> EmbeddingRequest | int:
    try:
        return asyncio.run(parse_large(body, MAX_ITEMS))
    except ApiError as refused:
        return refused.status


@pytest.fixture(autouse=True)
def tiny_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short bodies are cut everywhere."""
    if "tiny" in request.node.name:
        monkeypatch.setattr(large_body, "STEP", 5)
        monkeypatch.setattr(large_body, "QUOTES", 2)


@settings(max_examples=300, deadline=None)
@given(data=BODIES, spaced=st.booleans(), escaped=st.booleans())
def test_tiny_steps_give_what_one_go_gives(data: dict, spaced: bool, escaped: bool) -> None:
    body = orjson.dumps(data, option=orjson.OPT_INDENT_2 if spaced else 0)
    if escaped:
        body = body.decode().encode("ascii", "backslashreplace").replace(b"\\x", b"\\u00")
    assert in_steps(body) == whole(body)
    assert in_steps(bytearray(body)) == whole(body)


@settings(max_examples=600, deadline=None)
@given(
    data=BODIES,
    at=st.integers(0, 10_000),
    cut=st.integers(0, 3),
    put=st.one_of(st.sampled_from([b"", b"NaN", *PUNCTUATION]), st.binary(max_size=2)),
)
def test_tiny_steps_refuse_what_one_go_refuses(data: dict, at: int, cut: int, put: bytes) -> None:
    """A right body with some bytes cut out or put in. A list that one go would take to pieces may be given up early."""
    body = orjson.dumps(data)
    at %= len(body)
    spoilt = body[:at] + put + body[at + cut :]
    assert in_steps(spoilt) == whole(spoilt), spoilt


@pytest.mark.parametrize(
    ("body", "code", "param", "index"),
    [
        (b'{"model":"m","input":["a",1]}', "mixed_input", "input", 1),
        (b'{"model":"m","input":["a",{}]}', "mixed_input", "input", 1),
        (b'{"model":"m","input":[[1],"a"]}', "mixed_input", "input", 1),
        (b'{"model":"m","input":[{}]}', "bad_input", "input", 0),
        (b'{"model":"m","input":{}}', "bad_input", "input", None),
        (b'{"model":[],"input":"x"}', "bad_model", "model", None),
        (b'{"model":"m","input":["a",""]}', "blank_input", "input", 1),
        (b'{"model":"m","input":[' + b"[],"[:3] * 20 + b"[]]}", "too_many_items", "input", None),
        (b'{"model":"m","inputs":"x"}', "unknown_field", "inputs", None),
        (b'{"model":"m","input":[1,,2]}', "bad_json", None, None),
        (b'{"model":"m","input":[1111111,2,]}', "bad_json", None, None),
        (b'{"model":"m","input":[,1]}', "bad_json", None, None),
        (b'{"model":"m","input":"x"} x', "bad_json", None, None),
        (b"[]", "bad_json", None, None),
        (b"", "bad_json", None, None),
    ],
)
def test_refusals_of_tiny_steps_name_what_is_wrong(
    body: bytes, code: str, param: str | None, index: int | None
) -> None:
    with pytest.raises(ApiError) as refused:
        asyncio.run(parse_large(body, MAX_ITEMS))
    assert (refused.value.code, refused.value.param, refused.value.index) == (code, param, index)


MIB = 1 << 20
MANY = {
    "token ids": b"[" + b"151000," * (4 * MIB // 7) + b"1]",
    "lists of ids": b"[" + (b"[" + b"1000," * 3_000 + b"1],") * 500 + b"[1]]",
    "floats": b"[" + b"1e5," * (2 * MIB) + b"1]",
    "objects": b"[" + b"{}," * (3 * MIB) + b"{}]",
    "lists": b"[" + b"[]," * (3 * MIB) + b"[]]",
    "short texts": b"[" + b'"a",' * (2 * MIB) + b'"a"]',
    "texts": b"[" + b",".join(b'"%d %b"' % (i, b"x " * 4_000) for i in range(1_000)) + b"]",
    "quotes": b'"' + b'\\"' * (2 * MIB) + b'"',
    "backslashes": b'"' + b"\\\\" * (4 * MIB) + b'"',
}


@pytest.mark.parametrize("name", MANY)
def test_others_get_their_turn_while_a_large_body_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight megabytes no more than two steps are parsed between two turns, unless one text is longer."""
    parsed = 0
    parse_piece = large_body._loads

    def counted(piece: bytes) -> object:
        nonlocal parsed
        parsed += len(piece)
        return parse_piece(piece)

    monkeypatch.setattr(large_body, "_loads", counted)
    most = 9 * MIB if MANY[name].startswith(b'"') else 2 * large_body.STEP + large_body.LONGEST

    async def main() -> None:
        seen = [0]

        async def others() -> None:
            while True:
                seen.append(parsed)
                await asyncio.sleep(0)

        watching = asyncio.create_task(others())
        with contextlib.suppress(ApiError):
            await parse_large(b'{"model":"m","input":' + MANY[name] + b"}", 2048)
        watching.cancel()
        turns = [*seen, parsed]
        assert max(after - before for before, after in pairwise(turns)) <= most
        if name in ("floats", "objects", "lists", "short texts"):  # too many: the rest was not read
            assert parsed < 5 * MIB

    asyncio.run(main())


def test_a_large_request_is_answered_in_order_and_refused_in_openai_form() -> None:
    async def main() -> None:
        engine = NullEngine(64)
        async with Served(engine) as served, gateway(served) as gw:
            texts = [f"{i} " + "word " * 200 for i in range(1_000)]
            answer = await gw.post({"model": "null", "input": texts})
            assert [*map(tuple, rows(answer))] == [tuple(engine.vector(t)) for t in texts]
            refused = await gw.post({"model": "null", "input": [*texts, 7]})
            assert (refused.status, error(refused)["index"]) == (400, 1_000)

    asyncio.run(asyncio.wait_for(main(), 60))
