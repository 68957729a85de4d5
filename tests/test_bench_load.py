"""The load engine: what it sends, when, over which wire, and that it sees every wrong answer."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from array import array
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from null_server import Behaviour, NullEndpoint, null_server

from qwen3emb_launch.bench import connection, lengths, load
from qwen3emb_launch.bench.answers import AnswerChecker
from qwen3emb_launch.bench.calibrate import MOST_REQUESTS, calibrate
from qwen3emb_launch.bench.connection import Connection, Target
from qwen3emb_launch.bench.figures import client_limits, figures_of
from qwen3emb_launch.bench.spec import LoadSpec, Phase, Vocabulary
from qwen3emb_launch.bench.texts import CorpusTexts, RepeatingTexts, WordTexts, capacity
from qwen3emb_launch.bench.word_costs import word_costs
from qwen3emb_launch.bench.words import WORDS
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.errors import InvalidInputError


def closed(url: str, clients: int = 4, seconds: float = 0.5, **changes: object) -> LoadSpec:
    """A closed loop without warm-up."""
    return LoadSpec(url=url, model="m", phases=(Phase("steady", seconds, clients),), **changes)


# Lengths and texts


@given(
    st.sampled_from(["7", "3-90", "3-90@40-60", "normal:50:20@5-80", "lognormal:40:1.5@2-300", "normal:9:30"]),
    st.integers(0, 999),
)
def test_draws_stay_within_their_bounds(text, seed) -> None:
    """Whatever the distribution, a draw lies between its bounds."""
    parsed = lengths.parse(text)
    assert parsed.low <= parsed.draw(random.Random(seed)) <= parsed.high


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("33@50-90", 50, 50), ("33@8-90", 33, 33), ("100-20000@16-2048", 100, 2048), ("5-9@7-7", 7, 7)],
)
def test_a_bound_holds_for_numbers_and_ranges_too(text, low, high) -> None:
    """None of it is ignored: draws are clamped into the bound."""
    parsed = lengths.parse(text)
    assert (parsed.low, parsed.high) == (low, high)
    assert all(low <= parsed.draw(random.Random(seed)) <= high for seed in range(99))


def test_draws_follow_the_distribution() -> None:
    """A log-normal's median is its first number."""
    parsed = lengths.parse("lognormal:120:0.8@1-100000")
    draws = sorted(parsed.draw(random.Random(seed)) for seed in range(2001))
    assert draws[1000] == pytest.approx(120, rel=0.1)


@pytest.mark.parametrize("text", ["", "0", "-3", "9-3", "abc", "normal:1", "normal:0:1", "5@1", "1-9999999"])
def test_a_bad_length_is_refused(text) -> None:
    """The message names the text, or the range that is wrong in it."""
    with pytest.raises(ValueError, match=r"no length|no range|lengths go|must be above"):
        lengths.parse(text)


def bytes_tokenizer(text: str) -> int:
    """One token a byte and an end token, as the demo model's."""
    return len(text.encode()) + 1


def words_tokenizer(text: str) -> int:
    """One token a word, two for some, and an end token."""
    return sum(2 if word in ("tony", "sept") else 1 for word in text.split()) + 1


def code_tokenizer(text: str) -> int:
    """One to three tokens a word, whichever by its letters, a letter a token otherwise: trained on something else."""
    costs = {word: 1 + sum(word.encode()) * 7 % 3 for word in WORDS}
    return sum(costs.get(word, len(word)) for word in text.split()) + 2


TOKENIZERS = [bytes_tokenizer, words_tokenizer, code_tokenizer]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("tokens", [7, 33, 512, 513, 2048, 400_001])
def test_texts_have_exactly_the_tokens_asked_for(tokenizer, tokens) -> None:
    """Calibrated by counting alone, whatever a word costs."""
    vocabulary = calibrate(tokenizer)
    assert vocabulary.exact
    source = WordTexts(vocabulary, lengths.parse(str(tokens)), seed=1, start=0, step=1)
    assert {tokenizer(json.loads(source.next())) for _ in range(5)} == {tokens}


class Asked:
    """A tokenizer that keeps what it was asked."""

    def __init__(self, tokenizer: Callable[[str], int | None]) -> None:
        self.tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, text: str) -> int | None:
        self.texts.append(text)
        return self.tokenizer(text)


@pytest.mark.parametrize(("tokenizer", "words", "most"), [(bytes_tokenizer, 491, 14), (words_tokenizer, 363, 10)])
def test_where_words_cost_the_same_a_dozen_requests_do(tokenizer, words: int, most: int) -> None:
    """Words in whose company one costs otherwise are done without: hundreds are left."""
    asked = Asked(tokenizer)
    vocabulary = calibrate(asked)
    assert len(asked.texts) <= most
    assert len(vocabulary.words) == words
    assert not {"tony", "sept"} & set(vocabulary.words) or tokenizer is bytes_tokenizer


def mixed(seed: int, shares: tuple[float, ...]) -> Callable[[str], int]:
    """A tokenizer to which words cost 1, 2, 3… by these shares."""
    source = random.Random(seed)
    costs = {word: source.choices(range(1, len(shares) + 1), shares)[0] for word in WORDS}
    return lambda text: sum(costs.get(word, len(word)) for word in text.split()) + 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "shares", [(0.6, 0.4), (0.3, 0.3, 0.2, 0.2), (0.1, 0.5, 0.4), (0.2,) * 5, (0.05, 0.05, 0.9), (0.9, 0.1)]
)
def test_whatever_words_cost_calibration_is_bounded_and_right(seed: int, shares: tuple[float, ...]) -> None:
    """Never more requests than the cap; each word kept costs what is said, and texts stay unique for millions."""
    tokenizer = mixed(seed, shares)
    asked = Asked(tokenizer)
    vocabulary = calibrate(asked)
    assert len(asked.texts) <= MOST_REQUESTS
    assert vocabulary.exact
    assert {tokenizer(f" {word}") - vocabulary.overhead for word in vocabulary.words} == {vocabulary.per_word}
    assert capacity(vocabulary, 6 * vocabulary.per_word + vocabulary.overhead) > 1e8
    assert sum(map(len, asked.texts)) < 40_000


def test_a_tokenizer_at_hand_spares_the_weighing() -> None:
    """All words of the commonest cost, confirmed by the endpoint; a file of another model is found out."""
    asked = Asked(code_tokenizer)
    known = calibrate(asked, costs=lambda words: {word: code_tokenizer(word) - 2 for word in words})
    assert known.exact
    assert len(asked.texts) <= 20
    assert len(known.words) > 100
    wrong = calibrate(code_tokenizer, costs=lambda words: dict.fromkeys(words, 1))
    assert wrong.exact
    assert {code_tokenizer(word) - 2 for word in wrong.words} == {wrong.per_word}
    assert calibrate(code_tokenizer, costs=lambda words: None).exact


def test_a_tokenizers_file_says_what_words_cost(tmp_path: Path) -> None:
    """The demo model's: a byte a token, nothing added. Another file, or none, says nothing."""
    folder = make_demo_model(tmp_path / "demo")
    assert word_costs(folder / "tokenizer.json", ["able", "é"]) == {"able": 5, "é": 3}
    assert word_costs(folder / "config.json", ["able"]) is None
    assert word_costs(tmp_path / "none.json", ["able"]) is None


@pytest.mark.parametrize(
    ("requests", "exact", "words"), [(1, False, 491), (9, False, 491), (40, True, 16), (96, True, 64)]
)
def test_calibration_goes_on_with_what_it_has_when_its_requests_are_spent(requests, exact, words) -> None:
    """With fewer words, still of a known cost, or with lengths in words."""
    asked = Asked(mixed(1, (0.3, 0.3, 0.2, 0.2)))
    vocabulary = calibrate(asked, requests=requests)
    assert len(asked.texts) <= requests
    assert vocabulary.exact is exact
    assert len(vocabulary.words) >= words


def test_a_slow_endpoint_is_asked_no_more_after_its_time() -> None:
    """Each look at the clock a second: six rounds of requests are sent, and what they found is used."""
    asked = Asked(code_tokenizer)
    vocabulary = calibrate(asked, seconds=6.5, clock=iter(range(100)).__next__)
    assert len(asked.texts) == 2 + 8 + 4 * 8
    assert vocabulary.exact
    assert len(vocabulary.words) >= 16


@pytest.mark.parametrize("tokenizer", [lambda _: None, lambda _: 5, lambda text: len(text) // 3])
def test_an_endpoint_that_does_not_count_gives_inexact_texts(tokenizer) -> None:
    """No usage, a constant, or a count that words do not explain: lengths are in words, and it is said."""
    assert not calibrate(tokenizer).exact


@pytest.mark.parametrize("known", [None, lambda words: dict.fromkeys(words, 0)])
def test_words_that_cost_nothing_are_not_texts_of_a_length(known) -> None:
    """An endpoint that counts only some words: whatever its file says, nothing is divided by their cost of 0."""
    tokenizer = lambda text: 1 + text.split().count(WORDS[0])  # noqa: E731
    assert not calibrate(tokenizer, costs=known).exact


def test_few_words_make_longer_serial_numbers() -> None:
    """Sixteen words: texts of eight and more are all different, as those of four are with hundreds."""
    few = Vocabulary(WORDS[:16], exact=True)
    source = WordTexts(few, lengths.parse("9"), seed=1, start=0, step=1)
    assert len({source.next() for _ in range(100_000)}) == 100_000
    assert capacity(few, 33) == 16**8
    assert capacity(few, 3) == 16**3


def test_a_hundred_thousand_texts_are_all_different_in_every_process() -> None:
    """Two processes' texts interleave without a repetition, and differ from the first words on."""
    vocabulary = Vocabulary(WORDS, exact=True)
    texts = []
    for worker in (0, 1):
        source = WordTexts(vocabulary, lengths.parse("8"), seed=worker, start=worker, step=2)
        texts += [source.next() for _ in range(50_000)]
    assert len(set(texts)) == 100_000
    assert len({t[:16] for t in texts[:1000]}) > 990
    assert capacity(vocabulary, 2) == len(WORDS) ** 2


def test_repeats_come_at_their_rate_from_texts_sent_before() -> None:
    """Of 10,000 texts with rate 0.3 about 3,000 were seen before."""
    fresh = WordTexts(Vocabulary(WORDS), lengths.parse("8"), 1, 0, 1)
    source = RepeatingTexts(fresh, 0.3, seed=1)
    texts = [source.next() for _ in range(10_000)]
    assert 10_000 - len(set(texts)) == pytest.approx(3000, abs=200)


def test_a_corpus_goes_round() -> None:
    """Lines are shared among processes and start again at the end."""
    source = CorpusTexts([b'"a"', b'"b"', b'"c"'], start=1, step=2)
    assert [source.next() for _ in range(4)] == [b'"b"', b'"a"', b'"c"', b'"b"']


# Answers


def answer(**changes: object) -> tuple[int, bytes]:
    """What the null server answers to one text of three words."""
    body = b'{"input": "a b c", "dimensions": 4, "encoding_format": "float"}'
    return NullEndpoint(Behaviour(**changes)).answer(b"", body)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("", ""),
        ("nan", "not_finite"),
        ("norm", "norm"),
        ("count", "count"),
        ("dims", "dims"),
        ("order", "order"),
        ("malformed", "malformed"),
        ("http_503", "http_503"),
    ],
)
def test_every_wrong_answer_has_its_kind(fault, kind) -> None:
    """And a right one has none."""
    status, body = answer(fault=fault)
    assert AnswerChecker(1, 4, unit_norm=True).check(status, body)[0] == kind


@pytest.mark.parametrize(
    "body", [b"[]", b"null", b'{"data": 3}', b'{"data": [{"embedding": "!!"}]}', b'{"data": [{"embedding": [null]}]}']
)
def test_any_shape_of_nonsense_is_a_kind_and_no_crash(body) -> None:
    """The checker never raises."""
    assert AnswerChecker(1, None, unit_norm=True).check(200, body)[0] in ("malformed", "not_finite", "dims")


def test_both_wires_are_read_and_a_width_must_stay() -> None:
    """base64 and float give the same verdict; the first answer's width holds for all."""
    checker = AnswerChecker(1, None, unit_norm=True)
    endpoint = NullEndpoint(Behaviour())
    assert (
        checker.check(*endpoint.answer(b"", b'{"input": "a", "dimensions": 8, "encoding_format": "base64"}'))[0] == ""
    )
    assert checker.wire == "base64"
    assert checker.check(*endpoint.answer(b"", b'{"input": "a", "dimensions": 8}'))[0] == ""
    assert checker.wire == "float"
    assert checker.check(*endpoint.answer(b"", b'{"input": "a", "dimensions": 9}'))[0] == "dims"


# The wire


class RawServer:
    """Answers each request with the next scripted bytes, in pieces; None closes the connection instead."""

    def __init__(self, *answers: list[bytes] | None) -> None:
        self.answers = list(answers)
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                pieces = self.answers.pop(0)
                if pieces is None:
                    return
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


async def exchange(server: RawServer, count: int) -> list[tuple[int, bytes, str]]:
    """Send `count` requests one after another over one connection."""
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    target = Target.of(f"http://127.0.0.1:{port}/v1", "/embeddings", {})
    loop = asyncio.get_running_loop()
    link = Connection(target, loop)
    got = []
    for _ in range(count):
        done = loop.create_future()
        link.send(target.request(b"{}"), lambda *a, done=done: done.set_result(a), loop.time() + 5)
        got.append(await asyncio.wait_for(done, 5))
    link.close()
    listening.close()
    return got


PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=1\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([PLAIN], b"ok"),
        ([PLAIN[i : i + 1] for i in range(len(PLAIN))], b"ok"),
        ([CHUNKED], b"abcde"),
        ([CHUNKED[:50], CHUNKED[50:60], CHUNKED[60:]], b"abcde"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN], b"ok"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length:  2 \r\nConnection: close\r\n\r\nok"], b"ok"),
    ],
)
def test_answers_are_read_however_they_are_framed_and_cut(pieces, body) -> None:
    """By length or chunked, in one piece or byte by byte; and the connection serves a second request."""
    assert asyncio.run(exchange(RawServer(pieces, pieces), 2)) == [(200, body, "")] * 2


def test_an_idle_connection_that_the_server_dropped_is_reopened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's idle time-out crossing a request is no failure of the load; a second drop is, and one in use is."""
    assert [x[2] for x in asyncio.run(exchange(RawServer([PLAIN], None, [PLAIN]), 2))] == ["", "reset"]
    monkeypatch.setattr(connection, "_IDLE", -1.0)
    server = RawServer([PLAIN], None, [PLAIN])
    assert [x[2] for x in asyncio.run(exchange(server, 2))] == ["", ""]
    assert server.connections == 2
    assert [x[2] for x in asyncio.run(exchange(RawServer([PLAIN], None, None), 2))] == ["", "reset"]


@pytest.mark.parametrize("garbage", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 70_000])
def test_what_is_no_answer_is_a_protocol_failure(garbage) -> None:
    """Garbage is not guessed at."""
    assert asyncio.run(exchange(RawServer([garbage]), 1))[0][2] == "protocol"


def test_a_header_with_a_line_break_is_refused() -> None:
    """A key from a file with a newline must not become a header of its own."""
    with pytest.raises(ValueError, match="line break"):
        Target.of("http://h/v1", "/embeddings", {"Authorization": "Bearer a\r\nX: y"})


# Loads


def in_flight(result: load.LoadResult, phase: load.PhaseTimes) -> float:
    """Requests on their way at a time, by Little's law: the same on a fast and on a busy machine."""
    overlap = (min(done, phase.ended) - max(sent, phase.began) for _, sent, done, _, _ in result.batch.rows())
    return sum(seconds for seconds in overlap if seconds > 0) / (phase.ended - phase.began)


def test_a_server_of_the_tests_ends_in_order_while_it_accepts() -> None:
    """Connections came at the last moment: no coroutine is left that was never awaited, no socket to the collector."""
    words = ["_accept_connection"]  # in the collector's warnings may be other tests' sockets, too
    with warnings.catch_warnings(record=True) as seen, ExitStack() as clients:
        warnings.simplefilter("always")
        for _ in range(20):
            with null_server() as (url, _):
                port = int(url.rpartition(":")[2].partition("/")[0])
                words.append(f"laddr=('127.0.0.1', {port})")
                for _ in range(3):
                    clients.enter_context(socket.create_connection(("127.0.0.1", port)))
        gc.collect()
    assert not [told for one in seen if any(word in (told := str(one.message)) for word in words)]


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    """4 clients on a server that takes 20 ms each have 4 requests on their way all the time, none under 20 ms."""
    with null_server(Behaviour(delay=0.02)) as (url, endpoint):
        result = load.run(closed(url, 4, 1.5))
    figures = figures_of(result, result.phases[-1], None)
    assert figures.failed == {}
    assert in_flight(result, result.phases[-1]) == pytest.approx(4, rel=0.1)
    assert figures.latency.p50 >= 20
    assert endpoint.answered == result.sent == len(result.batch)


def test_an_open_loop_counts_from_the_scheduled_moment() -> None:
    """Twice as much as a serial server can do: the queue shows in the latency, as a closed loop would hide."""
    with null_server(Behaviour(delay=0.01, serial=True)) as (url, _):
        spec = LoadSpec(url=url, model="m", shape="open", phases=(Phase("steady", 1.0, 200),), seed=3, max_in_flight=20)
        result = load.run(spec)
    figures = figures_of(result, result.phases[-1], None)
    assert figures.latency.p50 is not None
    assert figures.latency.p50 > 150
    assert max(s - a for a, s in zip(result.batch.scheduled, result.batch.sent, strict=True)) > 0.2
    assert result.unfinished + len(result.batch) == pytest.approx(200, abs=60)


def test_poisson_arrivals_repeat_with_the_seed_and_have_their_rate() -> None:
    """The same seed schedules the same moments; gaps are as spread as exponential ones."""
    with null_server() as (url, _):
        spec = LoadSpec(url=url, model="m", shape="open", phases=(Phase("steady", 1.0, 300),), seed=5)
        one, two = (sorted(load.run(spec).batch.scheduled) for _ in range(2))
    assert len(one) == pytest.approx(300, abs=70)
    late = abs(one[0] - two[0])  # a run begins some milliseconds into its window, which cuts the last ones off
    assert abs(len(one) - len(two)) <= 6 + 600 * late
    both = min(len(one), len(two))
    gaps = [[b - a for a, b in pairwise(x[:both])] for x in (one, two)]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-6)
    mean = sum(gaps[0]) / len(gaps[0])
    assert sum((g - mean) ** 2 for g in gaps[0]) / len(gaps[0]) == pytest.approx(mean**2, rel=0.5)


def test_every_fault_in_ten_is_counted_by_its_kind() -> None:
    """One answer in ten is wrong: the error rate is a tenth and the first message is kept."""
    with null_server(Behaviour(fault="norm", fault_every=10)) as (url, endpoint):
        result = load.run(closed(url, 2, 5, requests=200))
    figures = figures_of(result, result.phases[-1], None)
    assert endpoint.answered == 200
    assert figures.failed == {"norm": 20}
    assert figures.error_rate == pytest.approx(0.1)
    assert "norm" in figures.details["norm"]


@pytest.mark.parametrize(("fault", "kind"), [("hang", "timeout"), ("reset", "reset"), ("http_503", "http_503")])
def test_failures_of_the_connection_have_their_kind(fault, kind) -> None:
    """A hang ends at the time-out, a reset at once, and the load goes on."""
    with null_server(Behaviour(fault=fault, fault_every=5)) as (url, _):
        result = load.run(closed(url, 2, 1.2, timeout=0.3, drain=1.0))
    kinds = {kind for *_, kind in result.batch.rows()}
    assert kind in kinds
    assert "" in kinds


def test_a_dead_endpoint_is_not_hammered() -> None:
    """Refused connections are failures, tried again ten times a second, not ten thousand."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        result = load.run(closed(f"http://127.0.0.1:{reserved.getsockname()[1]}/v1", 2, 0.5))
    assert 0 < len(result.batch) <= 20
    assert {k for *_, k in result.batch.rows()} == {"connect"}


def test_two_processes_share_the_load_and_no_text() -> None:
    """Clients, requests and serial numbers are divided."""
    with null_server() as (url, endpoint):
        endpoint.texts = []
        result = load.run(closed(url, 3, 5, requests=301, processes=2, lengths="12", batch=2))
        texts = endpoint.texts
    assert len(result.batch) == 301
    assert len(texts) == len(set(texts)) == 602
    assert result.texts_taken >= 602


@pytest.mark.parametrize("hard", [4096, 300])
def test_as_many_clients_as_the_limit_of_open_files_allows(hard: int) -> None:
    """A low soft limit is raised; more clients than the hard one allows are refused, not blamed on the endpoint."""
    with null_server(Behaviour(delay=0.2)) as (url, _):
        spec = closed(url, clients=280, seconds=0.5, vocabulary=Vocabulary(WORDS))
        words = [sys.executable, "-m", "qwen3emb_launch.bench.load", "-"]
        limited = ["bash", "-c", f'ulimit -Sn 256 && ulimit -Hn {hard} && exec "$@"', "-", *words]
        ran = subprocess.run(limited, input=json.dumps(spec.to_dict()), capture_output=True, text=True, check=False)
    if hard == 4096:
        found = json.loads(ran.stdout)
        assert found["kinds"] == [""]
        assert len(found["requests"]["done"]) >= 280
    else:
        assert "280 clients in one process need 344 open files, and it may have 300" in ran.stderr


def test_warm_up_is_sent_but_not_measured() -> None:
    """The measured phase begins after it, and a request across the edge counts by its part."""
    with null_server(Behaviour(delay=0.05)) as (url, endpoint):
        spec = LoadSpec(url=url, model="m", phases=(Phase("warmup", 0.5, 2, measured=False), Phase("steady", 0.5, 2)))
        result = load.run(spec)
    phase = result.phases[-1]
    figures = figures_of(result, phase, None)
    assert endpoint.answered > figures.requests
    parts = [
        (min(done, phase.ended) - max(sent, phase.began)) / (done - sent) for _, sent, done, _, _ in result.batch.rows()
    ]
    inside = sum(part for part in parts if part > 0)
    assert figures.requests_per_s == pytest.approx(inside / (phase.ended - phase.began))
    assert figures.requests <= len([part for part in parts if part > 0]) < endpoint.answered
    assert in_flight(result, phase) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("cpu", "late", "lag", "latency", "limits"),
    [
        (0.95, 0.0, 0.001, 0.02, True),  # a closed loop of a process at its core's end
        (0.91, 0.0005, 0.001, None, True),
        (0.83, 0.0, 0.004, 0.02, False),
        (0.70, 0.004, 0.006, 0.020, True),  # busy, and a fifth of the tail is its own lateness
        (0.70, 0.004, 0.006, 0.200, False),
        (0.70, 0.0006, 0.006, 0.005, False),
        (0.06, 0.0010, 0.0027, 0.0277, False),  # an H100 behind a client with nothing to do: the tail has other causes
        (0.12, 0.0020, 0.0027, 0.0554, False),
        (0.06, 0.0020, 0.0027, 0.0341, False),
        (0.60, 5.0, 0.002, 6.0, False),  # every connection taken by an endpoint that does not keep up
        (0.60, 0.5, 0.5, None, False),
    ],
)
def test_the_client_is_the_limit_where_it_was_busy(cpu, late, lag, latency, limits: bool) -> None:
    """Near the end of its core, or half busy with its own lateness visible in the tail; else the endpoint is."""
    assert client_limits(cpu, late, lag, latency) is limits


def test_a_busy_client_is_in_the_figures() -> None:
    """The busiest process's core decides, whichever phase it was."""
    with null_server(Behaviour(delay=0.005)) as (url, _):
        result = load.run(closed(url, 2, 0.5))
    phase = result.phases[-1]
    found = [figures_of(result, replace(phase, cpu=cpu), None).client for cpu in (0.1, 0.95)]
    assert [(client.cpu, client.limited) for client in found] == [(0.1, False), (0.95, True)]


def test_a_timeline_reaches_the_end_of_its_phase() -> None:
    """Three points of 100 requests/s, though the phase was a hair shorter than its three seconds."""
    with null_server() as (url, _):
        result = load.run(closed(url, 1, 0.1))
    done = [n / 100 + 0.005 for n in range(300)]
    rows = {"scheduled": [at - 0.004 for at in done], "sent": done, "done": done}
    batch = load.Batch(**{k: array("d", v) for k, v in rows.items()}, tokens=array("l", [33] * 300))
    batch.kind.extend([0] * 300)
    phase = replace(result.phases[0], began=0.0, ended=2.99997)
    timeline = figures_of(replace(result, batch=batch, phases=[phase]), phase, None).timeline
    assert [(at, round(rate), round(p50 or 0), round(p95 or 0)) for at, rate, p50, p95 in timeline] == [
        (0.0, 100, 4, 4), (1.0, 100, 4, 4), (2.0, 100, 4, 4),
    ]  # fmt: skip


def test_a_burst_changes_the_number_of_clients() -> None:
    """Three phases, three levels, each with its own figures."""
    phases = (Phase("before", 0.5, 1), Phase("burst", 0.5, 6), Phase("after", 0.5, 1))
    with null_server(Behaviour(delay=0.02)) as (url, _):
        result = load.run(LoadSpec(url=url, model="m", phases=phases))
    assert [in_flight(result, phase) for phase in result.phases] == pytest.approx([1, 6, 1], rel=0.2, abs=1.0)


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The load ends early, in order, and says so."""
    with null_server() as (url, endpoint):

        def interrupt() -> None:
            deadline = time.monotonic() + 30  # before the load runs, the signal would end the tests instead
            while endpoint.answered < 50 and time.monotonic() < deadline:
                time.sleep(0.02)
            signal.raise_signal(signal.SIGINT)

        ctrl_c = threading.Thread(target=interrupt)
        ctrl_c.start()
        result = load.run(closed(url, 2, 60))
        ctrl_c.join()
    assert result.interrupted
    assert len(result.batch) > 10
    assert result.phases[-1].ended < 50


def test_no_worker_outlives_its_parent(tmp_path: Path) -> None:
    """A bench killed with SIGKILL leaves no process that goes on loading."""
    script = tmp_path / "bench.py"
    with null_server() as (url, endpoint):
        script.write_text(
            "from qwen3emb_launch.bench import load\nfrom qwen3emb_launch.bench.spec import LoadSpec, Phase\n"
            f"load.run(LoadSpec(url={url!r}, model='m', phases=(Phase('steady', 300, 2),)))\n"
        )
        parent = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
        deadline = time.monotonic() + 60
        while endpoint.answered < 50 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert endpoint.answered >= 50
        parent.kill()
        parent.wait()
        while time.monotonic() < deadline:
            seen = endpoint.answered
            time.sleep(0.3)
            if endpoint.answered == seen:
                return
    pytest.fail("requests still came")


def test_a_spec_that_cannot_run_is_an_input_error() -> None:
    """The worker's reason reaches the caller."""
    with pytest.raises(InvalidInputError, match="no http"):
        load.run(closed("ftp://x/v1"))
    with pytest.raises(InvalidInputError):
        load.run(closed("http://127.0.0.1:9/v1", processes=0))


def test_the_key_is_sent_and_never_in_what_a_record_keeps() -> None:
    """The endpoint sees it; the public form of the spec does not have it."""
    with null_server(Behaviour(api_key="sesame")) as (url, _):
        spec = closed(url, 1, 5, requests=3, api_key="sesame", headers={"X-Team": "a"})
        result = load.run(spec)
    assert {k for *_, k in result.batch.rows()} == {""}
    assert "sesame" not in json.dumps(result.to_dict()) + repr(spec)


def test_the_bare_command_calibrates_and_prints_raw_latencies(tmp_path: Path) -> None:
    """`python -m qwen3emb_launch.bench.load` needs nothing but a spec: what a GPU host without the launcher has."""
    with null_server() as (url, _):
        spec = {
            "url": url,
            "model": "m",
            "lengths": "33",
            "requests": 20,
            "phases": [{"name": "steady", "seconds": 5, "level": 2}],
        }
        path = tmp_path / "spec.json"
        path.write_text(json.dumps(spec))
        done = subprocess.run(
            [sys.executable, "-m", "qwen3emb_launch.bench.load", str(path)], capture_output=True, text=True, check=True
        )
    result = json.loads(done.stdout)
    assert len(result["requests"]["done"]) == 20
    assert set(result["requests"]["tokens"]) == {33}
