"""The gateway as a process: `qwen3emb gateway`, its workers, signals, admin socket, TLS, files read again."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from supervised import gone

from qwen3emb_launch.errors import NetworkError
from qwen3emb_launch.gateway import admin_client, pulse
from tests.conftest import free_port
from tests.null_engine import NullEngine, in_thread


class Running:
    """A gateway process."""

    def __init__(self, argv: list[str], log: Path) -> None:
        with log.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qwen3emb_launch", "gateway", "--json", *argv],
                stdout=subprocess.PIPE,
                stderr=err,
            )
        self.log = log
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.where = json.loads(line)["result"]
        self.base = self.where["base_url"]

    def call(
        self, path: str, body: object = None, tls: ssl.SSLContext | None = None, **headers: str
    ) -> tuple[int, bytes]:
        """Status and body; `path` below the root."""
        request = urllib.request.Request(
            self.base.removesuffix("/v1") + path,
            json.dumps(body).encode() if body is not None else None,
            {"content-type": "application/json", **headers},
        )
        handlers: list = [urllib.request.ProxyHandler({})]
        if tls:
            handlers.append(urllib.request.HTTPSHandler(context=tls))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def vector(self, text: str, **more: object) -> np.ndarray:
        status, body = self.call("/v1/embeddings", {"model": "null", "input": text, **more})
        assert status == 200, body
        return np.array(json.loads(body)["data"][0]["embedding"], np.float32)


@contextmanager
def gateway(tmp_path: Path, *argv: str) -> Iterator[Running]:
    running = Running(["--port", str(free_port()), *argv], tmp_path / "gateway.log")
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.process.send_signal(signal.SIGTERM)
        running.process.wait(30)


def until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_it_serves_and_ends_with_0_on_sigterm_leaving_no_socket(tmp_path: Path) -> None:
    engine = NullEngine(64)
    socket = tmp_path / "run" / "admin.sock"
    with in_thread(engine) as served, gateway(tmp_path, "--upstream", served.url, "--admin-socket", str(socket)) as gw:
        assert np.array_equal(gw.vector("a"), engine.vector("a"))
        assert oct(socket.stat().st_mode & 0o777) == "0o600"
        gw.process.terminate()
        assert gw.process.wait(20) == 0
        assert not socket.exists()


def test_upstreams_come_and_go_through_the_admin_socket(tmp_path: Path) -> None:
    """Started without any engine; the first one is added, replaced by another, each step answered when it is done."""
    one, two = NullEngine(64), NullEngine(64)
    socket = tmp_path / "admin.sock"
    with in_thread(one) as first, in_thread(two) as second, gateway(tmp_path, "--admin-socket", str(socket)) as gw:
        assert gw.call("/ready")[0] == 503
        admin_client.call(socket, "POST", "/upstreams", {"url": first.url})
        assert np.array_equal(gw.vector("a"), one.vector("a"))
        assert gw.call("/ready")[0] == 200
        admin_client.call(socket, "POST", "/upstreams", {"url": second.url})
        until(lambda: [u["state"] for u in admin_client.call(socket, "GET", "/state")["upstreams"]] == ["up", "up"])
        gone = admin_client.call(socket, "DELETE", "/upstreams", {"url": first.url})
        assert gone == {"url": first.url, "drained": True}
        seen = one.calls
        for i in range(5):
            assert np.array_equal(gw.vector(f"t{i}"), two.vector(f"t{i}"))
        assert one.calls == seen
        for body, status in (({"url": "x"}, 400), ({}, 400)):
            with pytest.raises(Exception, match="no upstream"):
                admin_client.call(socket, "POST", "/upstreams", body)
            assert status == 400


def test_workers_share_the_port_the_disk_cache_and_their_numbers(tmp_path: Path) -> None:
    """A killed worker is started again, and no series of another one falls; a vector of one is a hit in the other."""
    engine = NullEngine(64)
    disk = tmp_path / "vectors.db"
    with in_thread(engine) as served, gateway(tmp_path, "--upstream", served.url, "--workers", "2",
                                              "--disk-cache", str(disk)) as gw:  # fmt: skip
        for i in range(40):
            assert np.array_equal(gw.vector(f"t{i}"), engine.vector(f"t{i}"))
        children = Path(f"/proc/{gw.process.pid}/task/{gw.process.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(workers) == 2

        def items() -> dict[str, int]:
            """By worker."""
            text = gw.call("/metrics")[1].decode()
            rows = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("qwen3emb_items_total")]
            return {series.partition("{")[2]: int(value) for series, value in rows}

        until(lambda: sum(items().values()) == 40)
        assert set(items()) == {'worker="0"}', 'worker="1"}'}
        until(lambda: disk.exists())
        asked = engine.items
        for i in range(40):
            gw.vector(f"t{i}")
        assert engine.items - asked < 40  # on either worker, most are found in memory or on disk
        before = items()
        shown = [json.loads(gw.call("/ui/state")[1]) for _ in range(8)]  # whichever worker is asked
        assert {s["series"]["qwen3emb_items_total"] for s in shown} == {sum(before.values())} == {80}
        assert len({s["p50_ms"] for s in shown}) == 1
        assert {s["upstreams"][0]["answered"] for s in shown} == {engine.calls - 2}  # but for the proof by each worker
        os.kill(workers[1], signal.SIGKILL)
        for i in range(10):  # those that the kernel deals to the dead one wait in its socket for the next
            assert np.array_equal(gw.vector(f"u{i}"), engine.vector(f"u{i}"))
        until(lambda: "started again" in gw.log.read_text())
        until(lambda: len(items()) == 2)
        assert items()['worker="0"}'] >= before['worker="0"}']
        os.kill(gw.process.pid, signal.SIGKILL)
        gw.process.wait(10)
        until(lambda: all(map(gone, workers)))  # a zombie is gone: this process may have become the one that adopts it


def test_a_worker_that_hangs_is_replaced_and_the_other_one_goes_on(tmp_path: Path) -> None:
    """The gateway stays, and the other worker; what the hung one had been dealt is answered by its successor."""
    engine = NullEngine(64)
    config = tmp_path / "config.json"
    with in_thread(engine) as served:
        config.write_text(
            json.dumps({"upstreams": [served.url], "workers": 2, "worker_stall": 1.0, "port": free_port()})
        )
        running = Running(["--config", str(config)], tmp_path / "gateway.log")
        try:
            pid = running.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
            os.kill(workers[0], signal.SIGSTOP)
            for i in range(12):
                assert np.array_equal(running.vector(f"t{i}"), engine.vector(f"t{i}"))
            until(lambda: gone(workers[0]))
            assert "worker 0 has hung for 1 s and is ended" in running.log.read_text()
            assert not gone(workers[1])
        finally:
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(30) == 0


@pytest.mark.parametrize(
    ("state", "share", "hung"),
    [("S", 0.0, True), ("T", 0.0, True), ("D", 0.0, False), ("R", 0.9, True), ("R", 0.1, False)],
)
def test_who_waits_for_a_processor_has_not_hung(
    monkeypatch: pytest.MonkeyPatch, state: str, share: float, hung: bool
) -> None:
    """Asleep while its loop is due, stopped, or computing for seconds; not with the parent kept from running too."""
    now = 100.0
    monkeypatch.setattr(pulse, "process_state", lambda _: (state, share * now))
    watch = pulse.Watch(10.0, lambda: now)
    found = []
    for _ in range(150):
        now += 0.1
        found.append(watch.hung(1, 100.0))
    assert not any(found[:99])
    assert found[-1] is hung
    now += 60  # stopped, with all workers
    assert not watch.hung(1, now - 59)
    assert not watch.hung(2, 0.0)  # one that is being started


def test_what_one_worker_is_told_all_do_and_a_restarted_one_too(tmp_path: Path) -> None:
    """The admin socket speaks for all workers: an engine counts as up when each of them has proved it."""
    one, two = NullEngine(64), NullEngine(64)
    socket = tmp_path / "admin.sock"

    def upstreams() -> dict[str, str]:
        return {u["url"]: u["state"] for u in admin_client.call(socket, "GET", "/state")["upstreams"]}

    with (
        in_thread(one) as first,
        in_thread(two) as second,
        gateway(tmp_path, "--upstream", first.url, "--workers", "2", "--admin-socket", str(socket)) as gw,
    ):
        until(lambda: upstreams() == {first.url: "up"})
        assert admin_client.call(socket, "GET", "/state")["workers"] == 2
        admin_client.call(socket, "POST", "/upstreams", {"url": second.url})
        until(lambda: upstreams() == {first.url: "up", second.url: "up"})
        assert admin_client.call(socket, "DELETE", "/upstreams", {"url": first.url})["drained"]
        assert upstreams() == {second.url: "up"}
        asked = one.calls
        children = Path(f"/proc/{gw.process.pid}/task/{gw.process.pid}/children").read_text().split()
        for child in children:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                until(lambda: _told(socket) == {"workers": 2, "ready": True})
        assert upstreams() == {second.url: "up"}
        for i in range(10):
            assert np.array_equal(gw.vector(f"t{i}"), two.vector(f"t{i}"))
        assert one.calls == asked


def _told(socket: Path) -> dict[str, object]:
    try:
        state = admin_client.call(socket, "GET", "/state")
    except NetworkError:  # its worker was just killed
        return {}
    return {"workers": state["workers"], "ready": state["ready"]}


def test_the_disk_cache_answers_after_a_restart_and_not_under_another_fingerprint(tmp_path: Path) -> None:
    engine = NullEngine(64)
    disk = ["--disk-cache", str(tmp_path / "vectors.db")]
    with in_thread(engine) as served:
        for fingerprint, fresh in (("one", True), ("one", False), ("two", True)):
            config = tmp_path / "config.json"
            config.write_text(json.dumps({"fingerprint": fingerprint, "upstreams": [served.url]}))
            with gateway(tmp_path, "--config", str(config), *disk) as gw:
                gw.vector("probe the new process")
                seen = engine.items
                assert np.array_equal(gw.vector("kept"), engine.vector("kept"))
                assert engine.items - seen == (1 if fresh else 0)


def test_tasks_and_keys_are_read_again_and_an_invalid_file_keeps_the_old_ones(tmp_path: Path) -> None:
    engine = NullEngine(64)
    tasks, keys = tmp_path / "tasks.yaml", tmp_path / "keys"
    tasks.write_text("schema: 1\ntasks: {mine: {dims: 32, role: document}}\n")
    keys.write_text("alice sk-a\n")
    with in_thread(engine) as served, gateway(tmp_path, "--upstream", served.url, "--tasks", str(tasks),
                                              "--api-keys", str(keys)) as gw:  # fmt: skip

        def dims(key: str = "sk-a") -> int:
            body = {"model": "null:mine", "input": "x"}
            status, answer = gw.call("/v1/embeddings", body, authorization=f"Bearer {key}")
            return len(json.loads(answer)["data"][0]["embedding"]) if status == 200 else -status

        assert dims() == 32
        tasks.write_text("schema: 1\ntasks: {mine: {dims: 48, role: document}}\n")
        until(lambda: dims() == 48)
        tasks.write_text("schema: 1\ntasks: {mine: {dims: oops}}\n")
        keys.write_text("bob sk-b\n")
        until(lambda: dims("sk-b") == 48)
        assert dims("sk-a") == -401
        log = gw.log.read_text()
        assert "the tasks stay as they were" in log
        assert "sk-" not in log


def test_it_speaks_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", str(key), "-out", str(cert), "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    engine = NullEngine(64)
    with in_thread(engine) as served, gateway(tmp_path, "--upstream", served.url, "--tls-cert", str(cert),
                                              "--tls-key", str(key)) as gw:  # fmt: skip
        assert gw.base.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        status, _ = gw.call("/v1/embeddings", {"model": "null", "input": "x"}, tls=context)
        assert status == 200


def test_spans_arrive_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--otel` with OpenTelemetry's own variables: OTLP over HTTP, the last spans sent before it ends."""
    seen: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with in_thread(NullEngine(64)) as served, gateway(tmp_path, "--upstream", served.url, "--otel") as gw:
            gw.vector("a secret text")
        collector.shutdown()
    assert {path for path, _ in seen} == {"/v1/traces"}
    sent = b"".join(body for _, body in seen)
    assert b"qwen3emb-gateway" in sent
    assert b"POST /v1/embeddings" in sent
    assert b"embeddings null" in sent
    assert b"secret" not in sent


@pytest.mark.parametrize(
    ("argv", "status", "code"),
    [
        ([], 2, "no_upstream"),
        (["--upstream", "nonsense"], 2, "bad_upstream"),
        (["--upstream", "http://127.0.0.1:1/v1", "--host", "0.0.0.0"], 3, "no_api_keys"),
        (["--upstream", "http://127.0.0.1:1/v1", "--api-keys", "/nonexistent"], 2, "bad_keys"),
        (["--upstream", "http://127.0.0.1:1/v1", "--tasks", "/nonexistent"], 2, "bad_tasks"),
        (["--upstream", "http://127.0.0.1:1/v1", "--model-path", "/nonexistent"], 2, "no_tokenizer"),
        (["--upstream", "http://127.0.0.1:1/v1", "--overflow", "truncate"], 2, "no_tokenizer"),
        (["--upstream", "http://127.0.0.1:1/v1", "--overflow", "cut"], 2, "bad_gateway_config"),
        (["--upstream", "http://127.0.0.1:1/v1", "--cache-bytes", "lots"], 2, "bad_size"),
        (["--upstream", "http://127.0.0.1:1/v1", "--price", "free"], 2, "bad_price"),
        (["--upstream", "http://127.0.0.1:1/v1", "--tls-cert", "a", "--tls-key", "b"], 2, "bad_tls"),
        (["--upstream", "http://127.0.0.1:1/v1", "--workers", "2", "--tls-cert", "a", "--tls-key", "b"], 2, "bad_tls"),
        (["--upstream", "http://127.0.0.1:1/v1", "--access-log", "/nonexistent/x"], 3, "cannot_log"),
        (["--upstream", "http://127.0.0.1:1/v1", "--disk-cache", "/proc/nowhere/x"], 3, "no_disk_cache"),
        (["--config", "/nonexistent"], 2, "bad_gateway_config"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_listens(argv: list[str], status: int, code: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "qwen3emb_launch", "gateway", "--json", "--port", str(free_port()), *argv],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ran.returncode == status, ran.stderr
    assert json.loads(ran.stdout)["error"]["code"] == code


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with in_thread(NullEngine(64)) as served:
        port = served.port
        ran = subprocess.run(
            [sys.executable, "-m", "qwen3emb_launch", "gateway", "--json", "--port", str(port),
             "--upstream", served.url],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert ran.returncode == 3
    assert json.loads(ran.stdout)["error"]["code"] == "port_in_use"
