"""The gateway's pure parts: cache, fair queue, tasks, keys, configuration, metrics, token rules, disk cache."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sqlite3
import stat
from collections import OrderedDict
from contextlib import closing
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3emb_launch.demo_model import EOS_ID, VOCAB, make_demo_model
from qwen3emb_launch.errors import InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.gateway import config as configuration
from qwen3emb_launch.gateway import keys, metrics, tasks
from qwen3emb_launch.gateway.access_log import AccessLog
from qwen3emb_launch.gateway.answer import encode, shrink
from qwen3emb_launch.gateway.api_errors import ApiError, clean, from_engine
from qwen3emb_launch.gateway.cache import Keyer, VectorCache
from qwen3emb_launch.gateway.disk_cache import DiskCache
from qwen3emb_launch.gateway.fair_queue import FairQueue, share
from qwen3emb_launch.gateway.host import usable_cores
from qwen3emb_launch.gateway.tokens import Prepared, TokenRules
from qwen3emb_launch.gateway.waiting_room import WaitingRoom
from qwen3emb_launch.gateway.work import BatchLimits, Item, Wait


def vector(seed: int, width: int = 8) -> np.ndarray:
    row = np.random.default_rng(seed).standard_normal(width).astype(np.float32)
    return row / np.linalg.norm(row)


# -- cache


def test_the_cache_never_holds_more_than_its_bytes_and_never_answers_another_keys_vector() -> None:
    cache = VectorCache(8, 100 * VectorCache(8, 0).entry_bytes)
    keyer = Keyer("f")
    for i in range(5000):
        number = random.Random(i).randrange(400)
        key = keyer.text(str(number))
        found = cache.get(key)
        if found is None:
            cache.put(key, vector(number), number)
        else:
            assert np.array_equal(found[0], vector(number))
            assert found[1] == number
        assert len(cache) <= 100
    assert cache.counts.evicted > 0
    cache.clear()
    assert cache.get(keyer.text("1")) is None


def test_a_cache_of_no_bytes_keeps_nothing() -> None:
    cache = VectorCache(8, 0)
    cache.put(b"k" * 15, vector(1), 1)
    assert cache.get(b"k" * 15) is None


def test_the_cache_beats_lru_on_zipf_traffic() -> None:
    random_ = np.random.default_rng(1)
    weights = 1 / np.arange(1, 10_001)
    trace = random_.choice(10_000, 60_000, p=weights / weights.sum())
    cache = VectorCache(1, 1000 * VectorCache(1, 0).entry_bytes)
    lru: OrderedDict[int, bool] = OrderedDict()
    ours = theirs = 0
    one = np.ones(1, np.float32)
    for text in map(int, trace):
        key = blake2b(text.to_bytes(4, "little"), digest_size=15).digest()
        ours += cache.get(key) is not None
        cache.put(key, one, 1)
        theirs += text in lru
        lru[text] = True
        lru.move_to_end(text)
        if len(lru) > 1000:
            lru.popitem(last=False)
    assert ours > 1.03 * theirs


def test_a_cached_wide_vector_takes_at_most_10500_bytes() -> None:
    """Measured on the interpreter's own allocations, with a full cache that has evicted as much again."""
    import tracemalloc

    keyer, one, count = Keyer("f"), vector(1, 2560), 2000
    tracemalloc.start()
    cache = VectorCache(2560, count * VectorCache(2560, 0).entry_bytes)
    for i in range(2 * count):
        cache.put(keyer.text(f"text {i}"), one, 9)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(cache) == count
    assert used / count < 10_500
    assert cache.entry_bytes < 10_500


def test_keys_depend_on_fingerprint_text_and_kind() -> None:
    secret = b"s"
    assert Keyer("a", secret).text("x") == Keyer("a", secret).text("x")
    assert Keyer("a", secret).text("x") != Keyer("b", secret).text("x")
    assert Keyer("a", secret).text("x") != Keyer("a", b"other").text("x")
    keyer = Keyer("a", secret)
    assert keyer.prepared(Prepared([1, 2], 2, True)) != keyer.prepared(Prepared([12], 1, True))
    assert len({keyer.text(t) for t in ("x", "x ", "X", "\udc00", "", "é", "e\u0301")}) == 7


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_smaller_vector_has_norm_1_and_the_same_direction(dims: int, seed: int) -> None:
    full = vector(seed)
    small = shrink(full, dims)
    assert abs(np.linalg.norm(small) - 1) < 1e-6
    assert np.allclose(small * np.linalg.norm(full[:dims]), full[:dims], atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20))
def test_floats_in_json_give_the_same_float32_back(values: list[float]) -> None:
    import json

    row = np.array(values, np.float32)
    assert np.array_equal(np.array(json.loads(encode(row, "float")), np.float32), row)


# -- disk cache


def disk(path: Path, fingerprint: str = "f", reference: np.ndarray | None = None, size: int = 1 << 20) -> DiskCache:
    return DiskCache(path / "c.db", fingerprint, vector(0) if reference is None else reference, size)


def test_the_disk_cache_survives_a_restart_and_is_private(tmp_path: Path) -> None:
    first = disk(tmp_path)
    for i in range(300):
        first.put(i.to_bytes(15, "little"), vector(i), i)
    first.close()
    assert stat.S_IMODE((tmp_path / "c.db").stat().st_mode) == 0o600
    second = disk(tmp_path)
    assert second.secret == first.secret
    for i in range(300):
        found = second.get(i.to_bytes(15, "little"))
        assert found is not None
        assert np.array_equal(found[0], vector(i))
        assert found[1] == i
    second.close()


@pytest.mark.parametrize("change", ["fingerprint", "reference", "width"])
def test_the_disk_cache_is_dropped_when_its_vectors_are_anothers(tmp_path: Path, change: str) -> None:
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    first.close()
    second = {
        "fingerprint": lambda: disk(tmp_path, fingerprint="g"),
        "reference": lambda: disk(tmp_path, reference=vector(5)),
        "width": lambda: disk(tmp_path, reference=vector(0, 16)),
    }[change]()
    assert second.get(b"k" * 15) is None
    assert second.secret != first.secret
    second.close()


def test_a_vector_that_the_disk_changed_is_a_miss(tmp_path: Path) -> None:
    first = disk(tmp_path)
    first.put(b"k" * 15, vector(1), 1)
    first.put(b"l" * 15, vector(2), 1)
    first.close()
    with sqlite3.connect(tmp_path / "c.db") as db:
        db.execute("UPDATE vectors SET vector = (SELECT vector FROM vectors WHERE id = 2) WHERE id = 1")
    db.close()
    second = disk(tmp_path)
    assert second.get(b"k" * 15) is None
    assert second.get(b"l" * 15) is not None
    assert second.broken == 1
    second.close()


@pytest.mark.parametrize("garbage", [b"", b"x", b"x" * 100_000])
def test_a_file_that_is_no_store_is_made_anew(tmp_path: Path, garbage: bytes) -> None:
    (tmp_path / "c.db").write_bytes(garbage)
    store = disk(tmp_path)
    store.put(b"k" * 15, vector(1), 1)
    store.close()
    again = disk(tmp_path)
    assert again.get(b"k" * 15) is not None
    again.close()


def test_the_disk_cache_keeps_within_its_bytes(tmp_path: Path) -> None:
    store = disk(tmp_path, size=100 * 160)
    for i in range(1000):
        store.put(i.to_bytes(15, "little"), vector(i), i)
    store.close()
    with sqlite3.connect(tmp_path / "c.db") as db:
        kept = [r[0] for r in db.execute("SELECT flags FROM vectors")]
    db.close()
    assert len(kept) == 100
    assert 999 in kept


def test_a_folder_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnfitError):
        disk(tmp_path / "file")


# -- fair queue


def test_a_query_is_next_though_a_thousand_texts_of_others_wait() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(1000):
        queue.push("bulk", "r1", f"b{i}")
    queue.push("bulk", "r2", "own query")
    queue.push("somebody", "r3", "query")
    assert {queue.pop(), queue.pop(), queue.pop()} == {"b0", "query", "own query"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=60), st.data())
def test_the_fair_queue_gives_every_item_once_in_order_within_its_request(pushed, data) -> None:
    queue: FairQueue[int] = FairQueue()
    for number, (client, request) in enumerate(pushed):
        queue.push(client, request, number)
    dropped: list[int] = []
    if pushed and data.draw(st.booleans()):
        dropped = queue.drop(*pushed[0])
    taken = []
    while queue:
        head = queue.peek()
        taken.append(queue.pop())
        assert head == taken[-1]
    assert sorted(taken + dropped) == list(range(len(pushed)))
    for wanted in set(pushed):
        own = [n for n in taken if pushed[n] == wanted]
        assert own == sorted(own)
    assert not list(queue.client_names())


def test_shares_of_the_queue() -> None:
    assert share(100, 1) == 75
    assert share(100, 2) == 50
    assert share(100, 100) == 12


@given(limit=st.integers(1, 40), waiting=st.lists(st.integers(0, 9), max_size=12), count=st.integers(1, 12))
def test_who_may_wait_is_decided_by_the_share_alone(limit, waiting, count) -> None:
    """The short way for an almost empty queue refuses and lets in as the rule does."""
    room = WaitingRoom(BatchLimits(queue=limit))
    with closing(asyncio.new_event_loop()) as loop:
        for number, client in enumerate(waiting):
            item = Item(number.to_bytes(15, "big"), Prepared("x", 1, exact=True))
            room.push(item, Wait(str(client), 1, 0.0, loop))
    mine, others = waiting.count(0), len(set(waiting))
    over_all, over_share = len(waiting) + count > limit, mine > 0 and mine + count > share(limit, others)
    assert (room.full_for("0", count) is not None) == (over_all or over_share)


# -- tasks


def test_the_shipped_table_is_the_seeds() -> None:
    table = tasks.load()
    assert {n: t.dims for n, t in table.tasks.items() if t.dims} == {
        "faq_match": 128, "intent_classify": 128, "code_search": 512, "legal_retrieval": 512, "default": 256,
    }  # fmt: skip
    assert table.choose("m").task is None
    assert table.choose("m:document").task.apply("x") == "x"
    assert table.choose("m:query").task.apply("x").startswith("Instruct: Given a web search query")
    assert table.choose("m:query:document").role == "document"
    assert table.choose("m", "query").task.name == "query"
    assert table.choose("m:document", "query").task.name == "document"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema: 1\ntasks: {a: {dims: 0}}", "dims"),
        ("schema: 1\ntasks: {a: {dim: 3, instruction: x}}", "did you mean 'dims'"),
        ("schema: 2\ntasks: {a: {instruction: x}}", "schema"),
        ("schema: 1\ntasks: {a: {role: reader}}", "role"),
        ("schema: 1\ntasks: {a: {role: query}}", "needs an instruction"),
        ("schema: 1\ndefault: b\ntasks: {a: {instruction: x}}", "default"),
        ("schema: 1\ntasks: {'a:b': {instruction: x}}", "colons"),
        ("schema: 1\ntasks: [a]", "mapping"),
        ("schema: 1\ntasks: {a: [", "line 2, column"),
        ("- x", "mapping"),
        ("!!python/object/apply:os.system ['true']", "line 1"),
        ("\x00", "unacceptable"),
    ],
)
def test_a_bad_table_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        tasks.load(tmp_path / "t.yaml")
    assert says in caught.value.message


# -- keys


def keyring(tmp_path: Path, text: str, **env: str) -> keys.Keyring:
    (tmp_path / "keys").write_text(text)
    return keys.load(tmp_path / "keys", env)


def test_keys_names_limits_and_admin(tmp_path: Path) -> None:
    ring = keyring(tmp_path, "# ours\nalice sk-alice rpm=2\nsk-nameless\nroot sk-root admin\n",
                   QWEN3EMB_GATEWAY_API_KEYS="sk-env, ,")  # fmt: skip
    assert len(ring) == 4
    assert ring.who("Bearer sk-alice").name == "alice"
    assert ring.who("bearer  sk-nameless").name == "key-3"
    assert ring.who("Bearer sk-root").admin
    assert ring.who("Bearer sk-env").name == "env-1"
    for bad in (None, "", "Bearer", "Bearer ", "Basic sk-alice", "Bearer sk-alic", "Bearer sk-alicee", "Bearer \udc00"):
        with pytest.raises(ApiError) as caught:
            ring.who(bad)
        assert caught.value.status == 401
        assert "sk-" not in caught.value.message
    alice = ring.who("Bearer sk-alice")
    alice.check_rate(5)
    alice.check_rate(5)
    with pytest.raises(ApiError) as caught:
        alice.check_rate(5)
    assert caught.value.status == 429
    assert 0 < caught.value.retry_after <= 60


def test_a_key_with_limits_makes_the_ring_a_limited_one(tmp_path: Path) -> None:
    """What holds in one process only is known before several are started."""
    assert not keyring(tmp_path, "alice sk-alice\nroot sk-root admin\n").limited
    assert keyring(tmp_path, "alice sk-alice\nbob sk-bob tpm=1000\n").limited


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), (None, None)]
)
def test_cores_are_those_that_a_quota_pays_for(tmp_path: Path, text: str | None, cores: int | None) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    here = len(os.sched_getaffinity(0))
    assert usable_cores(tmp_path) == min(here, cores or here)


@pytest.mark.parametrize("text", ["", "# only\n", "a b c\n", "a k rpm=0\n", "a k rpm=x\n", "a k xpm=3\n", "k\nn k\n"])
def test_a_bad_keys_file_is_refused_without_showing_a_key(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        keyring(tmp_path, text)
    assert caught.value.code == "bad_keys"


# -- configuration


def test_a_configuration_survives_its_json(tmp_path: Path) -> None:
    import json

    config = configuration.GatewayConfig(
        upstreams=(configuration.UpstreamConfig("http://a:1/v1", "secret"),), models=("m",), hold=3.0, admin_port=9
    )
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    assert configuration.from_dict(configuration.read(tmp_path / "c.json")) == config
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"prot": 1}, "bad_gateway_config"),
        ({"port": "1"}, "bad_gateway_config"),
        ({"port": True}, "bad_gateway_config"),
        ({"port": 70000}, "bad_gateway_config"),
        ({"hold": -1}, "bad_gateway_config"),
        ({"workers": 0}, "bad_gateway_config"),
        ({"overflow": "cut"}, "bad_gateway_config"),
        ({"models": ["a:b"]}, "bad_gateway_config"),
        ({"models": "a"}, "bad_gateway_config"),
        ({"queue": 10}, "bad_gateway_config"),
        ({"tls_cert": "x"}, "bad_gateway_config"),
        ({"upstreams": [{"ulr": "x"}]}, "bad_gateway_config"),
        ({"upstreams": ["ftp://x"]}, "bad_upstream"),
        ({"upstreams": ["http://u:p@x/v1"]}, "bad_upstream"),
        ({"upstreams": ["http://x:99999/v1"]}, "bad_upstream"),
        ({"upstreams": ["http://[::1"]}, "bad_upstream"),
        ({"upstreams": ["http://a b/v1"]}, "bad_upstream"),
        ({"host": "0.0.0.0"}, "no_api_keys"),
        ({"host": "::"}, "no_api_keys"),
        ({"host": "example.org"}, "no_api_keys"),
    ],
)
def test_bad_settings_are_refused(data: dict, code: str) -> None:
    with pytest.raises(LaunchError) as caught:
        configuration.from_dict(data)
    assert caught.value.code == code


def test_others_are_served_only_with_keys_or_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configuration.from_dict({"host": "0.0.0.0", "insecure": True})
    assert configuration.from_dict({"host": "::1"}).loopback
    monkeypatch.setenv("QWEN3EMB_GATEWAY_API_KEYS", "k")
    assert configuration.from_dict({"host": "0.0.0.0"})


# -- errors, metrics, access log


@pytest.mark.parametrize(
    "body",
    [
        {"object": "error", "message": "bad in /usr/lib/x/y.py line 3", "type": "BadRequest", "code": 400},
        {"error": {"message": "bad in /usr/lib/x/y.py", "type": "x", "param": "input"}},
        {"error": "bad in C:\\Users\\x\\y.py"},
        {"detail": "bad in file:///opt/x/y.py"},
        None,
    ],
)
def test_engine_errors_lose_their_paths(body) -> None:
    error = from_engine(400, body)
    assert error.source == "engine"
    assert not any(p in error.message for p in ("/usr", "/opt", "Users", ".py"))


def test_an_engines_endless_message_is_cut() -> None:
    assert len(clean("word " * 10_000)) < 700
    assert clean("use /v1 and a/b, 3/4 or and/or") == "use /v1 and a/b, 3/4 or and/or"


def test_prometheus_text_can_be_parsed_and_added_up() -> None:
    import re

    one = metrics.Metrics()
    one.requests[200, ""] += 3
    one.answered(0.003, 0.001, 0.001, 0.0)
    one.call(4, 40, 0.01)
    both = metrics.add_up([one.snapshot(), one.snapshot()])
    text = metrics.render(both)
    line = re.compile(r'[a-z_0-9]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? -?[0-9.e+-]+')
    for row in text.splitlines():
        assert row.startswith("# ") or line.fullmatch(row), row
    assert 'qwen3emb_requests_total{status="200",error_source=""} 6' in text
    assert 'qwen3emb_request_seconds_count{part="total"} 2' in text
    assert 'qwen3emb_engine_call_items_bucket{le="+Inf"} 2' in text
    for family in re.findall(r"# TYPE (\S+)", text):
        assert family in metrics.HELP


def test_the_dashboard_asks_for_series_that_exist() -> None:
    text = (Path(__file__).parents[1] / "docs" / "grafana-gateway.json").read_text()
    asked = [t["expr"] for panel in json.loads(text)["panels"] for t in panel.get("targets", [])]
    names = {name for expr in asked for name in re.findall(r"qwen3emb_\w+", expr)}
    assert len(names) >= 12
    for name in names:
        assert name in metrics.HELP or re.sub("_(bucket|sum|count)$", "", name) in metrics.HELP, name


def test_the_access_log_is_private_and_survives_a_full_disk(tmp_path: Path) -> None:
    async def main() -> None:
        log = AccessLog(str(tmp_path / "a.log"))
        log.write({"status": 200})
        log.flush()
        good = log._file
        log._file = os.open("/dev/full", os.O_WRONLY)
        for _ in range(3):
            log.write({"status": 201})
        log.flush()
        os.close(log._file)
        log._file = good
        log.close()

    asyncio.run(main())
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert len(lines) == 4
    assert stat.S_IMODE((tmp_path / "a.log").stat().st_mode) == 0o600


# -- tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo_model(tmp_path_factory.mktemp("m") / "demo")


def rules(model: Path, **more) -> TokenRules:
    return TokenRules.from_model(model, context_length=64, **more)


def one(prepared: list) -> Prepared:
    found = prepared[0]
    assert isinstance(found, Prepared), found
    return found


def test_counts_include_the_end_token_and_the_last_length_that_fits_does(model: Path) -> None:
    r = rules(model)
    assert one(r.texts_now(["abc"])).tokens == 4
    assert one(r.texts_now(["a" * 62])) == Prepared("a" * 62, 63, True)
    refused = r.texts_now(["fine", "a" * 63])[1]
    assert isinstance(refused, ApiError)
    assert "64 tokens" in refused.message
    assert "63" in refused.message
    assert refused.code == "context_length_exceeded"
    assert isinstance(r.texts_now(["é" * 32])[0], ApiError)


def test_truncation_keeps_the_end_token(model: Path) -> None:
    cut = one(rules(model, overflow="truncate").texts_now(["b" * 500]))
    assert cut.truncated
    assert cut.payload == [ord("b")] * 62 + [EOS_ID]
    assert cut.tokens == 63


def test_token_ids_get_their_end_token_and_keep_the_bounds(model: Path) -> None:
    r = rules(model)
    assert r.ids([1, 2]).payload == [1, 2, EOS_ID]
    assert r.ids([1, 2, EOS_ID]).payload == [1, 2, EOS_ID]
    for bad in ([VOCAB], [-1], [2**63], [1, 100_000]):
        with pytest.raises(ApiError) as caught:
            r.ids(bad)
        assert caught.value.code == "bad_token_id"
        assert "check_embedding_ctx_length" in caught.value.message
    with pytest.raises(ApiError) as caught:
        r.ids([1] * 63)
    assert caught.value.code == "context_length_exceeded"
    assert rules(model, overflow="truncate").ids([1] * 100).payload == [1] * 62 + [EOS_ID]


def test_a_huge_text_is_refused_without_being_tokenised(model: Path) -> None:
    r = rules(model)
    r.tokenizer = None if r._surely_too_long("x" * 10_000_000) else r.tokenizer
    assert r.tokenizer is None


def test_a_folder_without_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        TokenRules.from_model(tmp_path, context_length=64)
    assert caught.value.code == "no_tokenizer"


def bpe_rules(page: Path = Path(__file__)) -> TokenRules:
    """A tokenizer with merges, trained on a page of text: what makes one list of ids its own and another foreign."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([page.read_text(encoding="utf-8")], trainer)
    return TokenRules(tokenizer, vocab_size=tokenizer.get_vocab_size())


@pytest.mark.parametrize("page", ["test_gateway_parts.py", "test_gateway_http.py"])
def test_another_tokenizers_ids_are_told_from_our_own_whole_or_cut(page: str) -> None:
    """Whatever the tokenizer: one that never saw a character makes several ids of it, which a cut may part."""
    r = bpe_rules(Path(__file__).with_name(page))
    assert r.tokenizer is not None
    text = "def test_the_cache_beats_lru(): the request is answered when 包裹 is back — naïve 🙂 at last"
    own = r.tokenizer.encode(text).ids
    for start in range(len(own) - 1):
        for end in range(start + 1, len(own) + 1):
            assert not r.looks_foreign(own[start:end]), r.tokenizer.decode(own[start:end])
    foreign = bpe_rules(Path(tasks.__file__)).tokenizer.encode(text).ids
    assert r.looks_foreign(foreign)
    with pytest.raises(ApiError) as caught:
        r.ids(foreign)
    assert caught.value.code == "foreign_token_ids"
    assert "check_embedding_ctx_length" in caught.value.message
    r.foreign = "accept"
    assert r.ids(foreign).payload == foreign


def test_foreign_ids_are_decoded_by_policy() -> None:
    """The text they stand for in the other table is what gets embedded."""

    class Table:
        def decode(self, ids: list[int]) -> str:
            return f"text of {len(ids)} ids"

    r = bpe_rules()
    assert r.tokenizer is not None
    text = "the request is answered when it is back, or it is not"
    foreign = bpe_rules(Path(tasks.__file__)).tokenizer.encode(text).ids
    assert r.looks_foreign(foreign)
    r.foreign, r._foreign_decoder = "decode", Table()
    assert r.ids(foreign).payload == f"text of {len(foreign)} ids"


def test_the_decode_policy_without_its_table_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InvalidInputError) as caught:
        TokenRules(foreign="decode")
    assert caught.value.code == "no_cl100k"
