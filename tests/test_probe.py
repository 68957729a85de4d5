"""The probe against servers that answer rightly, wrongly, slowly and not at all."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import free_port

from qwen3emb_launch.probe import Target, Verdict, embed_once, fault_of

UNIT = [0.6, 0.8]


def body(vector: object) -> bytes:
    return json.dumps({"data": [{"embedding": vector, "index": 0}]}).encode()


def http(content: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n%s" % (status, len(content), content)


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[Target]:
    """A socket whose connections are handed to `answer` after the request was read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    try:
                        answer(connection)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield Target("127.0.0.1", listener.getsockname()[1], "m", 2)


def test_good_answer() -> None:
    """A unit vector of the right width is life."""
    with server(lambda c: c.sendall(http(body(UNIT)))) as target:
        assert embed_once(target, "x", 5).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (body([1.0]), "1 numbers"),
        (body([1.0, 0.0, 0.0]), "3 numbers"),
        (b'{"data": [{"embedding": [NaN, 1.0]}]}', "NaN"),
        (b'{"data": [{"embedding": [1e999, 1.0]}]}', "NaN or infinite"),
        (body([3.0, 4.0]), "length is 5"),
        (body([0.0, 0.0]), "length is 0"),
        (body(None), "not an embedding"),
        (body([None, 1.0]), "not an embedding"),
        (body("AAAA"), "not an embedding"),
        (b'{"data": []}', "not an embedding"),
        (b"[]", "not an embedding"),
        (b"<html>", "not an embedding"),
        (b"\xff\xfe\x00", "not an embedding"),
    ],
)
def test_wrong_answers_are_named(content: bytes, word: str) -> None:
    """Anything but a finite unit vector of the right width is wrong, and said in one sentence."""
    assert word in fault_of(content, 2)
    with server(lambda c: c.sendall(http(content))) as target:
        assert embed_once(target, "x", 5).verdict is Verdict.WRONG


def test_refusal_keeps_its_status() -> None:
    """Another status than 200 is told with the server's words."""
    with server(lambda c: c.sendall(http(b"queue is full", 503))) as target:
        answer = embed_once(target, "x", 5)
    assert (answer.verdict, answer.status) == (Verdict.REFUSED, 503)
    assert "queue is full" in answer.detail


def test_nobody_listens() -> None:
    """A closed port is unreachable at once: no time that was given is waited for."""
    answer = embed_once(Target("127.0.0.1", free_port(), "m", 2), "x", 60)
    assert answer.verdict is Verdict.UNREACHABLE
    assert answer.seconds < 30


@pytest.mark.parametrize("words", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nshort"])
def test_broken_connections(words: bytes) -> None:
    """A connection that ends before, within or instead of an answer is no life."""
    with server(lambda c: c.sendall(words)) as target:
        assert not embed_once(target, "x", 5).ok


def test_silence_is_slow() -> None:
    """No answer within the time is slow, whatever the time: the server still holds its own back then."""
    hold = threading.Event()
    waited: list[bool] = []
    with server(lambda _: waited.append(hold.wait(60))) as target:
        assert embed_once(target, "x", 0.2).verdict is Verdict.SLOW
        assert not waited
        hold.set()


def test_a_dripping_answer_is_slow() -> None:
    """Bytes that keep coming do not prolong the time: it is for the whole answer, which is far from its end then."""
    stop = threading.Event()
    dripped = itertools.count()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
        while not stop.wait(0.02) and next(dripped) < 1000:
            connection.sendall(b" ")

    with server(drip) as target:
        assert embed_once(target, "x", 0.3).verdict is Verdict.SLOW
        assert next(dripped) < 500
        stop.set()


def test_proxies_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment is not asked about this machine."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(lambda c: c.sendall(http(body(UNIT)))) as target:
        assert embed_once(target, "x", 5).ok


def test_key_is_sent() -> None:
    """The engine's API key goes as a bearer token."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(http(body(UNIT)))

        threading.Thread(target=serve, daemon=True).start()
        assert embed_once(Target("127.0.0.1", listener.getsockname()[1], "m", 2, "key-1"), "x", 5).ok
    assert b"authorization: bearer key-1" in seen[0].lower()
