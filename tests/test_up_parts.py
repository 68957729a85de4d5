"""Small parts of `up`: ports of private engines, a command on another port, free memory, long socket paths, and the
link that tells the gateway its engines."""

from __future__ import annotations

import ast
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from supervised import fake_plan, gateway_plan, until

from qwen3emb_launch import state
from qwen3emb_launch.argv import with_option
from qwen3emb_launch.cli.supervise import KEYS_VARIABLE, gateway_spec
from qwen3emb_launch.engine_process import scratch, strain
from qwen3emb_launch.engine_process.ports import PRIVATE_PORTS, check_free, private_port
from qwen3emb_launch.engine_process.rendezvous import PLACE
from qwen3emb_launch.errors import EngineFailedError, NetworkError, UnfitError
from qwen3emb_launch.gateway import config
from qwen3emb_launch.probe import Answer, Verdict
from qwen3emb_launch.up import gateway_runner
from qwen3emb_launch.up import runner as engine_runner
from qwen3emb_launch.up.events import Event, Probe, Probed
from qwen3emb_launch.up.gateway_runner import GatewayRunner, GatewaySpec
from qwen3emb_launch.up.link import GatewayLink
from qwen3emb_launch.up.process_runner import ProcessRunner
from qwen3emb_launch.up.room import available_memory
from qwen3emb_launch.up.runner import EngineRunner, engine_spec
from qwen3emb_launch.up.serving import snippet
from qwen3emb_launch.up.sockets import short_path
from qwen3emb_launch.up.starvation import starved
from qwen3emb_launch.weights import weights_sample


def test_private_ports_leave_room_for_sglangs_second_one() -> None:
    """A private port is free, and so is its port + 10000, outside the range of outgoing connections."""
    for _ in range(20):
        port = private_port("127.0.0.1")
        assert port in PRIVATE_PORTS
        assert port + 10000 < 32768
        check_free("127.0.0.1", port)


def test_an_engine_on_another_port() -> None:
    """Only the port changes, in the address and in the command."""
    spec = engine_spec(gateway_plan())
    other = spec.on_port(12345)
    assert other.url == "http://127.0.0.1:12345/v1"
    assert [w for w in other.argv if w != "12345"] == [w for w in spec.argv if w != str(spec.port)]
    assert with_option(("a", "--port", "1", "--x", "1"), "--port", "2") == ("a", "--port", "2", "--x", "1")


def test_available_memory(tmp_path: Path) -> None:
    """MemAvailable in bytes; None where the kernel does not tell it."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:   42 kB\n")
    assert available_memory(meminfo) == 42 * 1024
    meminfo.write_text("MemTotal: 100 kB\n")
    assert available_memory(meminfo) is None
    assert available_memory(tmp_path / "none") is None


def test_sockets_in_folders_with_long_names(tmp_path: Path) -> None:
    """A socket is bound and reached where its whole path would be too long for the kernel."""
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        with short_path(folder, "a.sock") as path:
            server.bind(path)
        server.listen(1)
        with short_path(folder, "a.sock") as path:
            client.connect(path)
    assert (folder / "a.sock").is_socket()


def test_the_names_that_supervisor_and_gateway_share() -> None:
    """The supervisor does not import the gateway; what it knows of it is what the gateway says."""
    assert config.KEYS_VARIABLE == KEYS_VARIABLE
    plan = gateway_plan()
    assert plan.gateway is not None
    assert config.from_dict({**plan.gateway, "upstreams": [{"url": "http://127.0.0.1:1/v1", "api_key": "k"}]})


def test_a_full_disk_does_not_keep_the_gateway_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings can be written at the first start and not at the second: those of the first serve again."""
    plan = gateway_plan()
    spec = gateway_spec(plan)
    assert spec is not None
    claim = state.claim(plan.name)
    runner = GatewayRunner(spec, claim, lambda _: None, set, lambda: {"http://127.0.0.1:1/v1": "k"})

    def full(*_: object) -> None:
        raise UnfitError("state_unwritable", "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(gateway_runner, "write_private", full)
        with pytest.raises(UnfitError):
            runner.command(claim.logs / "a.log")
    first = runner.command(claim.logs / "a.log")
    assert "k" in first.secrets
    monkeypatch.setattr(gateway_runner, "write_private", full)
    assert runner.command(claim.logs / "b.log").argv == first.argv
    runner.close()
    assert not runner.config.exists()
    claim.release()


def probed(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], Answer]) -> Probed:
    """What a probe of a running unit tells, once it is over."""
    told: SimpleQueue[Event] = SimpleQueue()
    claim = state.claim("probed")
    runner = ProcessRunner("engine", claim, told.put, set)
    monkeypatch.setattr(runner, "_process", SimpleNamespace(guard_pid=os.getpid()))
    monkeypatch.setattr(runner, "ask", lambda _: answer)
    try:
        runner.act(Probe(1, 0.1))
        event = told.get(timeout=30)
    finally:
        claim.release()
    assert isinstance(event, Probed)
    return event


def slow() -> Answer:
    return Answer(Verdict.SLOW, 0.1, "no answer")


def cannot(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("can't start new thread")


def test_a_probe_that_cannot_be_watched_is_told_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread for the timer, no descriptor for /proc: a probe without evidence. One that is never told would be the
    last one, and the engine could hang for good."""
    with monkeypatch.context() as threads:
        threads.setattr(threading.Timer, "start", cannot)
        event = probed(threads, slow)
        assert (event.answer, event.strain) == (slow(), None)
    with monkeypatch.context() as proc:
        looked = threading.Event()

        def unreadable(_: int) -> NoReturn:
            looked.set()
            raise OSError("too many open files")

        def late() -> Answer:
            looked.wait(30)
            return slow()

        proc.setattr(strain, "sample", unreadable)
        assert probed(proc, late).answer == slow()


def test_a_question_that_breaks_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises; the reason is told."""
    event = probed(monkeypatch, cannot)
    assert event.answer.verdict is Verdict.UNREACHABLE
    assert "can't start new thread" in event.answer.detail


def test_a_probe_that_cannot_be_sent_says_nothing_about_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread for the probe itself: excused, as on a starved machine, and the supervisor goes on."""
    with monkeypatch.context() as threads:
        threads.setattr(threading.Thread, "start", cannot)
        event = probed(threads, slow)
    assert event.answer.verdict is Verdict.SLOW
    assert starved(event.strain)


def test_workers_of_a_gateway_share_one_deadline() -> None:
    """Each is asked within what the ones before it left of the probe's time; with nothing left the gateway is slow,
    and by no more than a timer is late."""
    plan = gateway_plan()
    given: list[float] = []

    def admin(*_: object) -> dict[str, list[object]]:
        given.append(float(str(_[-1])))
        threading.Event().wait(0.25)
        return {"upstreams": []}

    found = gateway_spec(replace(plan, gateway={**plan.gateway, "workers": 4}))
    assert found is not None
    claim = state.claim(plan.name)
    runner = GatewayRunner(replace(found, admin=admin), claim, lambda _: None, set, dict)
    assert runner.ask(60.0)().ok
    assert given == sorted(given, reverse=True)
    assert given[3] < 59.5
    answer = runner.ask(0.3)()
    assert answer.verdict is Verdict.SLOW
    assert len(given) < 8
    claim.release()


class FakeGateway:
    """The admin socket's answers, out of a dictionary; it can be silent, or forget what it was told."""

    def __init__(self) -> None:
        self.upstreams: dict[str, str] = {}
        self.keys: dict[str, str | None] = {}
        self.silent = False
        self.state = "up"
        self.changes: list[str] = []
        self.lock = threading.Lock()

    def __call__(
        self, path: str, method: str, route: str, body: dict[str, Any] | None = None, timeout: float = 60.0
    ) -> Any:
        with self.lock:
            if self.silent:
                raise NetworkError("gateway_silent", "no answer")
            self.changes += [method] if method != "GET" else []
            if (method, route) == ("POST", "/upstreams") and body:
                self.upstreams[body["url"]], self.keys[body["url"]] = self.state, body["api_key"]
            elif (method, route) == ("DELETE", "/upstreams") and body:
                self.upstreams.pop(body["url"], None)
            rows = [{"url": u, "state": s, "reason": "because"} for u, s in self.upstreams.items()]
            return {"upstreams": rows, "drained": True}


@pytest.fixture
def linked(tmp_path: Path) -> Any:
    gateway = FakeGateway()
    spec = gateway_spec(gateway_plan())
    assert spec is not None
    link = GatewayLink(
        GatewaySpec(spec.argv, spec.settings, spec.base_url, gateway, spec.keys_variable, False), tmp_path
    )
    yield link, gateway
    link.close()


def test_the_gateway_is_told_until_it_is_so(linked: Any) -> None:
    """What ought to be becomes so: after silence, after it has forgotten, and no call is made while it is away."""
    link, gateway = linked
    link.want({"http://a/v1": "key-a"})
    assert gateway.upstreams == {}
    gateway.silent = True
    link.there(True)
    gateway.silent = False
    until(lambda: list(gateway.upstreams) == ["http://a/v1"], "the first engine")
    assert gateway.keys["http://a/v1"] == "key-a"
    link.want({"http://b/v1": None})
    until(lambda: list(gateway.upstreams) == ["http://b/v1"], "the second in the place of the first")
    gateway.upstreams.clear()  # a worker that its parent started again
    until(lambda: list(gateway.upstreams) == ["http://b/v1"], "the engine told again")


def test_an_engine_that_was_away_is_another_one(linked: Any) -> None:
    """Gone and back at the same address before anybody could be told: the gateway still has to prove it anew."""
    link, gateway = linked
    link.there(True)
    link.want({"http://a/v1": "one"})
    until(lambda: gateway.changes == ["POST"], "the engine")
    with gateway.lock:
        link.want({})
        link.want({"http://a/v1": "two"})
    until(lambda: gateway.changes == ["POST", "DELETE", "POST"], "the same address once more")
    assert gateway.keys["http://a/v1"] == "two"


def test_an_engine_is_awaited_or_refused(linked: Any) -> None:
    """Waiting ends when it has traffic, with an error when it is refused or too late."""
    link, gateway = linked
    link.there(True)
    link.want({"http://a/v1": None})
    link.await_upstream("http://a/v1", 5, lambda: False)
    gateway.upstreams["http://a/v1"] = "refused"
    with pytest.raises(EngineFailedError) as caught:
        link.await_upstream("http://a/v1", 5, lambda: False)
    assert caught.value.code == "gateway_refuses"
    gateway.upstreams["http://a/v1"] = "down"
    with pytest.raises(EngineFailedError) as late:
        link.await_upstream("http://a/v1", 0.05, lambda: False)
    assert late.value.code == "gateway_silent"
    assert "because" in late.value.message
    assert os.environ.get(KEYS_VARIABLE) is None


def checkpoint(folder: Path, value: int) -> None:
    """One tensor of bytes, in the safetensors format."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes([value] * 8))


@pytest.fixture
def weighed(tmp_path: Path) -> Iterator[EngineRunner]:
    """The runner of an engine whose model is this test's folder."""
    claim = state.claim("weights")
    spec = replace(engine_spec(fake_plan()), model_path=tmp_path)
    runner = EngineRunner("engine", spec, claim, lambda _: None, set, check_argv=None)
    yield runner
    runner.close()
    claim.release()


def test_every_start_meets_at_a_place_of_its_own_and_at_no_port(
    tmp_path: Path, weighed: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file for each start, which the engine can open; the user's own word and several workers leave it out."""

    def place() -> str | None:
        return weighed.command(tmp_path / "a.log").env.get(PLACE)

    first = place()
    assert first
    assert first.startswith("file:///proc/")
    Path(first.removeprefix("file://")).write_text("of the first start")
    second = place()
    assert second
    assert Path(second.removeprefix("file://")).read_bytes() == b""
    one = weighed.spec
    for argv in (("--tp-size", "2"), ("--nnodes=2",), ("--dist-init-addr", "10.0.0.1:5000")):
        weighed.spec = replace(one, argv=(*one.argv, *argv))
        assert place() is None
    weighed.spec = replace(one, argv=(*one.argv, "--tp-size", "1"))
    assert place()
    monkeypatch.setenv(PLACE, "env://")
    assert place() == "env://"


@pytest.mark.parametrize("caps", [0, 1 << 10], ids=["undumpable", "CAP_NET_BIND_SERVICE"])
def test_where_an_engine_cannot_open_the_place_it_is_not_named(caps: int) -> None:
    """A supervisor opens its own descriptors even where another process of its user does not, as with capabilities of
    Python's file: such an engine meets at a port."""
    if caps and os.geteuid():
        pytest.skip("only root gives away capabilities")
    script = f"""
import ctypes, os
from qwen3emb_launch.engine_process.rendezvous import PLACE, Rendezvous
assert PLACE in Rendezvous().fresh(())
libc = ctypes.CDLL(None)
libc.prctl(8, 1)  # PR_SET_KEEPCAPS
if os.geteuid() == 0:
    os.setuid(65534)
if {caps}:
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)({caps}, {caps}))
libc.prctl(4, {int(bool(caps))})  # PR_SET_DUMPABLE
assert PLACE not in Rendezvous().fresh(())
if {caps}:
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    assert PLACE in Rendezvous().fresh(())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_temporary_files_have_a_folder_of_one_start(
    tmp_path: Path, weighed: EngineRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours alone, short enough for sockets; the next start gets another and the last one's goes. What torch keeps
    between starts does not lie there, and the profile's own TMPDIR goes first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(scratch, "LONGEST", 1000)
    first = weighed.command(tmp_path / "a.log")
    assert first.scratch
    assert (first.env["TMPDIR"], first.scratch.parent) == (str(first.scratch), tmp_path)
    assert first.scratch.stat().st_mode & 0o777 == 0o700
    assert not Path(first.env["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path)
    second = weighed.command(tmp_path / "b.log")
    assert second.scratch != first.scratch
    assert not first.scratch.exists()
    weighed.spec = replace(weighed.spec, env={"TMPDIR": "/elsewhere"})
    assert weighed.command(tmp_path / "c.log").env["TMPDIR"] == "/elsewhere"
    weighed.close()
    assert not list(tmp_path.glob("qwen3emb-*"))

    monkeypatch.setattr(scratch, "LONGEST", len(str(tmp_path)))
    weighed.spec = replace(weighed.spec, env={})
    long = weighed.command(tmp_path / "d.log")
    assert (long.scratch, long.env.get("TMPDIR")) == (None, os.environ.get("TMPDIR"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert weighed.command(tmp_path / "e.log").scratch is None
    assert not list(tmp_path.glob("qwen3emb-*"))


def test_pythons_own_sockets_fit_into_the_longest_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's template listens in multiprocessing's folder, which lies a level deeper than SGLang's sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as below:
        room = scratch.LONGEST - len("/qwen3emb-12345678")
        place = Path(below, "x" * (room - len(below) - 1))
        place.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        one = scratch.Scratch(place)
        told = one.fresh()
        assert len(told["TMPDIR"]) == scratch.LONGEST
        listen = "from multiprocessing.connection import Listener; Listener(family='AF_UNIX')"
        subprocess.run([sys.executable, "-c", listen], check=True, env={**os.environ, **told})
        one.close()


def test_a_folder_here_is_told_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR=. is where the supervisor is, not the engine or the guard, which removes it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", ".")
    monkeypatch.setattr(scratch, "LONGEST", 1000)
    one = scratch.Scratch(tmp_path)
    assert Path(one.fresh()["TMPDIR"]).parent == tmp_path
    one.close()


def test_a_cache_that_cannot_be_written_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's of an earlier start, or on a read-only disk: torch would end there, and knows a place itself."""
    for name in scratch.KEPT:
        monkeypatch.delenv(name, raising=False)
    one = scratch.Scratch(tmp_path)
    assert one.fresh()["TORCHINDUCTOR_CACHE_DIR"]
    (tmp_path / "inductor").chmod(0o500)
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "inductor")
    assert {"TMPDIR", "CUTE_DSL_CACHE_DIR"} == set(one.fresh())
    one.close()


def test_an_engine_is_not_started_again_on_other_weights(tmp_path: Path, weighed: EngineRunner) -> None:
    """Another checkpoint in the place of the first is refused before it is loaded, and so is one that cannot be read;
    the same one written anew is not."""
    checkpoint(tmp_path, 1)
    weighed.command(tmp_path / "a.log")
    checkpoint(tmp_path, 1)
    weighed.command(tmp_path / "b.log")
    checkpoint(tmp_path, 2)
    with pytest.raises(UnfitError, match="not those that this instance was started with") as refused:
        weighed.command(tmp_path / "c.log")
    assert refused.value.code == "model_changed"
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnfitError, match="cannot be read") as unreadable:
        weighed.command(tmp_path / "d.log")
    assert unreadable.value.code == "model_changed"
    checkpoint(tmp_path, 1)
    weighed.command(tmp_path / "e.log")


def test_weights_that_cannot_be_read_at_first_are_the_engines_to_complain_of(
    tmp_path: Path, weighed: EngineRunner
) -> None:
    """A folder without safetensors is started, again and again: there is nothing to compare."""
    for name in "ab":
        weighed.command(tmp_path / f"{name}.log")


def test_weights_on_a_file_system_that_hangs_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighed: EngineRunner
) -> None:
    """A restart fails after a bounded wait, and a later one goes on when the look is over: one thread hangs, however
    often it is tried."""
    checkpoint(tmp_path, 1)
    answers, looks = threading.Event(), 0

    def hangs(folder: Path) -> str | None:
        nonlocal looks
        looks += 1
        answers.wait(60)
        return weights_sample(folder)

    def command(wait: float) -> None:
        monkeypatch.setattr(engine_runner, "LOOK_FOR", wait)
        weighed.command(tmp_path / "a.log")

    command(60)
    monkeypatch.setattr(engine_runner, "weights_sample", hangs)
    for _ in range(2):
        with pytest.raises(UnfitError, match="were not read within"):
            command(0.05)
    assert looks == 1
    answers.set()
    command(60)
    assert looks == 1


def test_weights_that_were_replaced_while_the_engine_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weighed: EngineRunner
) -> None:
    """The first good answer of a start counts only if the weights are still those of before the start. Half written
    ones are asked for again; and what the engine has read stays, whatever happens on the disk later."""
    monkeypatch.setattr(engine_runner, "embed_once", lambda *_: Answer(Verdict.OK, 0.01))
    checkpoint(tmp_path, 1)
    weighed.command(tmp_path / "a.log")
    checkpoint(tmp_path, 2)
    assert weighed.ask(1)().verdict is Verdict.WRONG
    (tmp_path / "model.safetensors").write_bytes(b"half")
    assert weighed.ask(1)().verdict is Verdict.UNREACHABLE
    checkpoint(tmp_path, 1)
    assert weighed.ask(1)().ok
    checkpoint(tmp_path, 2)
    assert weighed.ask(1)().ok


def test_the_snippet_can_be_pasted_whatever_the_models_name() -> None:
    """Quotes in a name end neither Python's string nor the shell's."""
    name = """it's a "model" 模型"""
    text = snippet("http://[::1]:1/v1", name, 256)
    assert "curl -s 'http://[::1]:1/v1/embeddings' -H" in text
    (call,) = (line for line in text.splitlines() if line.startswith("answer"))
    assert {k.arg: ast.literal_eval(k.value) for k in ast.parse(call).body[0].value.keywords}["model"] == name
    words = shlex.split(text[text.index("curl") :])
    assert json.loads(words[words.index("-d") + 1])["model"] == name
