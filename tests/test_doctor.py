"""doctor: each judgement by table, the seed's mistakes by name, unknown staying unknown, and the command as a whole."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from qwen3emb_launch import explain, profile_files, recorded_flags
from qwen3emb_launch import gpu as inventory
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.doctor import command_line, engine, gpu, launch, machine, network, serving
from qwen3emb_launch.doctor.network import Answer
from qwen3emb_launch.doctor.report import Check, Status
from qwen3emb_launch.engines import EnvironmentStatus
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import EngineFacts, GpuFacts
from qwen3emb_launch.gpu import Holder, Survey
from qwen3emb_launch.paths import paths

GIB = 1 << 30
OK, WARN, FAIL, UNKNOWN = Status.OK, Status.WARN, Status.FAIL, Status.UNKNOWN
CARD = GpuFacts(0, "NVIDIA L4", "GPU-1", 24 * GIB, 24 * GIB, (8, 9), "580.95.05")
CUDA = EngineFacts("cuda", "cuda", "0.5.23", Path("/e/bin/python"), False, {})


def card(**changes: Any) -> GpuFacts:
    return GpuFacts(**{**CARD.__dict__, **changes})


def lines(checks: list[Check]) -> str:
    return "\n".join(f"{c.status} {c.says} -> {c.mend}" for c in checks)


# ---- GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("survey", "on_bus", "status", "word"),
    [
        (Survey((CARD,), (), "580.95.05"), 1, OK, "580.95.05"),
        (Survey(()), 0, OK, "no NVIDIA GPU"),
        (Survey(()), None, OK, "no NVIDIA GPU"),
        (Survey(()), 2, FAIL, "no driver"),
        (Survey((), (), "580.95.05"), 1, WARN, "shows this process no GPU"),
        (Survey((), ("NVML does not start: Driver/library version mismatch",)), 1, FAIL, "mismatch"),
        (Survey((CARD,), ("NVML: GPU 1 is left out: GPU is lost",), "580"), 2, FAIL, "lost"),
    ],
)
def test_the_driver(survey: Survey, on_bus: int | None, status: Status, word: str) -> None:
    """A card without a driver, a driver that does not match its library and a lost card each have their words."""
    check = gpu.driver(survey, on_bus)
    assert check.status is status
    assert word in check.says
    assert bool(check.mend) == (status is not OK)


@pytest.mark.parametrize(
    ("installed", "build", "status"),
    [
        ("580.95.05", "13.0", OK),
        ("580.65.06", "13.0", OK),
        ("575.57.08", "13.0", FAIL),
        ("535.183.01", "12.8", OK),
        ("515.10", "12.8", FAIL),
        ("580.95.05", "14.1", UNKNOWN),
        (None, "13.0", UNKNOWN),
        ("580.95.05", None, UNKNOWN),
    ],
)
def test_the_driver_against_the_engines_cuda(installed: str | None, build: str | None, status: Status) -> None:
    """Too old is a failure with both numbers; what cannot be compared stays unknown."""
    check = gpu.cuda(installed, build, CUDA)
    assert check.status is status
    if status is FAIL:
        assert str(installed) in check.says
        assert str(build) in check.says


def test_without_an_engine_the_driver_is_compared_with_nothing() -> None:
    """No engine, no verdict."""
    assert gpu.cuda("580", None, None).status is UNKNOWN


@pytest.mark.parametrize(("capability", "status"), [((7, 5), FAIL), ((8, 0), OK), ((12, 0), OK), (None, UNKNOWN)])
def test_compute_capability(capability: tuple[int, int] | None, status: Status) -> None:
    """Below 8.0 there is no bfloat16; a card that does not tell stays unknown."""
    assert gpu.capability(card(compute_capability=capability)).status is status


def test_memory_names_its_holders() -> None:
    """A card in use is a warning with pid, name and amount; whom the system hides is said to be hidden."""
    assert gpu.memory(CARD, []).status is OK
    held = gpu.memory(card(free_bytes=4 * GIB), [Holder(42, "python3", 19 * GIB), Holder(43, None, None)])
    assert held.status is WARN
    assert "pid 42 (python3, 19.0 GiB)" in held.says
    assert "pid 43 (?, ?)" in held.says
    assert "not told" in gpu.memory(card(free_bytes=4 * GIB), []).says


def test_device_files() -> None:
    """Missing and refused are different faults with different cures."""
    assert gpu.devices({"/dev/nvidiactl": True, "/dev/nvidia-uvm": True}).status is OK
    missing = gpu.devices({"/dev/nvidiactl": True, "/dev/nvidia-uvm": None})
    assert (missing.status, "nvidia-modprobe" in missing.mend) == (FAIL, True)
    refused = gpu.devices({"/dev/nvidiactl": False, "/dev/nvidia-uvm": None})
    assert (refused.status, "ls -l /dev/nvidiactl" in refused.mend) == (FAIL, True)


def test_the_compiler(tmp_path: Path) -> None:
    """nvcc where the engine will look, by CUDA_HOME of the engine, of the shell, then PATH; and a C++ compiler."""
    for name in ("own", "shell", "path"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "nvcc").touch(0o755)
    environ = {"CUDA_HOME": str(tmp_path / "shell"), "PATH": str(tmp_path / "path" / "bin")}
    assert str(tmp_path / "own") in gpu.compiler({"CUDA_HOME": str(tmp_path / "own")}, environ, "/usr/bin/c++").says
    assert str(tmp_path / "shell") in gpu.compiler({}, environ, "/usr/bin/c++").says
    del environ["CUDA_HOME"]
    assert str(tmp_path / "path") in gpu.compiler({}, environ, "/usr/bin/c++").says
    assert gpu.compiler({}, environ, None).status is FAIL
    assert gpu.compiler({"CUDA_HOME": str(tmp_path)}, environ, "/usr/bin/c++").status is FAIL


# ---- engines and profiles ------------------------------------------------------------------------------------------


def env(**changes: Any) -> EnvironmentStatus:
    given = {
        "name": "cuda", "state": "complete", "flavour": "cuda", "version": "0.5.23", "python": Path("/p"),
        "python_version": "3.12", "plugin": None, "adopted": False, "size_bytes": 1, "installed_at": 0.0,
    }  # fmt: skip
    return EnvironmentStatus(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "status", "word"),
    [
        ({}, OK, "0.5.23"),
        ({"version": "0.5.10", "adopted": True}, FAIL, "22518"),
        ({"version": "0.5.4", "adopted": True}, FAIL, "dimensions"),
        ({"version": "0.5.12", "adopted": True}, FAIL, "27343"),
        ({"version": "0.5.99"}, WARN, "newer"),
        ({"version": "0.5.16", "flavour": "cpu"}, FAIL, "sgl_kernel"),
        ({"state": "broken", "reason": "its python is gone: /p"}, FAIL, "its python is gone"),
        ({"state": "partial", "flavour": None, "version": None, "reason": "never completed"}, FAIL, "never completed"),
    ],
)
def test_engine_environments(changes: dict[str, Any], status: Status, word: str) -> None:
    """Known-bad releases carry their issue, broken environments the command that repairs them."""
    checks = engine.environments([env(**changes)], "cuda")
    named = [c for c in checks if c.name == "engine cuda"]
    assert status in {c.status for c in named}
    assert word in lines(named)
    assert all(c.mend for c in named if c.status is not OK)


def test_a_missing_engine_is_named_with_its_command() -> None:
    """A cpu environment does not serve a GPU machine."""
    checks = engine.environments([env(name="cpu", flavour="cpu", version="0.5.15.post1")], "cuda")
    assert "qwen3emb engine install cuda" in lines(checks)


PROFILE = """\
schema: 1
name: mine
description: mine
model: demo
engine: {flavour: cpu}
%s
"""


@pytest.mark.parametrize(
    ("text", "status", "word"),
    [
        ("", OK, "mine.yaml"),
        ("extra_args: [--enable-prompt-trust-remote-code]", FAIL, "--enable-prompt-trust-remote-code"),
        ("variants: {v: {description: d, extra_args: [--no-such-thing]}}", FAIL, "--no-such-thing"),
        ("settings: {dtype: float16}", WARN, "bfloat16"),
        ("nonsense: 1", FAIL, "nonsense"),
        ("extra_args: [--api-key, hunter2]", FAIL, "--api-key"),
    ],
)
def test_profiles_of_ones_own(text: str, status: Status, word: str) -> None:
    """Invented flags, float16 and broken files are seen before anything starts; shipped profiles are not listed."""
    paths().profiles.mkdir(parents=True)
    (paths().profiles / "mine.yaml").write_text(PROFILE % text)
    (check,) = engine.profiles(profile_files.available(), recorded_flags.engine(recorded_flags.CPU, "cpu"))
    assert check.status is status
    assert word in lines([check])
    assert "hunter2" not in lines([check])


# ---- what is to be served ------------------------------------------------------------------------------------------

RTX = card(name="NVIDIA GeForce RTX 4090")


@pytest.mark.parametrize(
    ("profile", "cards", "status", "word"),
    [
        ("rtx4090", [], FAIL, "needs an NVIDIA GPU"),
        ("rtx4090", [RTX], OK, "on NVIDIA GeForce RTX 4090"),
        ("rtx4090", [card(name="NVIDIA GeForce RTX 4090", free_bytes=GIB)], OK, "on NVIDIA GeForce RTX 4090"),
        ("rtx4090", [CARD], WARN, "this is NVIDIA L4"),
        ("rtx4090", [CARD, RTX], OK, "on NVIDIA GeForce RTX 4090"),
        ("l4", [card(name="Tesla T4", compute_capability=(7, 5))], FAIL, "bfloat16"),
        ("l4", [card(total_bytes=6 * GIB, free_bytes=6 * GIB)], FAIL, "does not fit"),
        ("demo", [], OK, "on the CPU"),
        ("cpu", [], OK, "on the CPU"),
        ("cpu", [card(compute_capability=(7, 5))], OK, "on the CPU"),
    ],
)
def test_a_profile_and_its_machine(profile: str, cards: list[GpuFacts], status: Status, word: str) -> None:
    """What `up` would refuse here fails, another card is a warning; who uses a card may be this profile."""
    chosen = profile_files.load(profile)
    here, model = explain.to_be_installed(chosen.engine.flavour), explain.published(chosen.model)
    found = launch.checks(chosen, cards, here, model, {})
    assert found[0].status is status
    assert word in lines(found)
    assert all(bool(check.mend) == (check.status is not OK) for check in found)


@pytest.mark.parametrize(("profile", "status"), [("cpu", FAIL), ("l4", OK)])
def test_a_profile_of_the_cpu_needs_the_machines_memory(profile: str, status: Status) -> None:
    """As `up` refuses it; a GPU's has its own."""
    chosen = profile_files.load(profile)
    here, model = explain.to_be_installed(chosen.engine.flavour), explain.published(chosen.model)
    (line,) = launch.checks(chosen, [CARD], here, model, {}, 4 * GIB)
    assert line.status is status
    assert ("does not fit" in line.says) is (status is FAIL)
    assert launch.checks(chosen, [CARD], here, model, {}, 16 * GIB)[0].status is OK


def test_a_launch_hears_the_environment_and_knows_its_models() -> None:
    """QWEN3EMB_SET_* decides here as it would in `up`; a model that nobody has seen stays unknown, no GPU does not."""
    chosen = profile_files.load("l4")
    here, model = explain.to_be_installed("cuda"), explain.published("4b")
    (refused,) = launch.checks(chosen, [CARD], here, model, {"QWEN3EMB_SET_TP": "none at all"})
    assert (refused.status, "TP" in refused.says) == (FAIL, True)
    assert [c.status for c in launch.checks(chosen, [CARD], here, None, {})] == [UNKNOWN]
    assert [c.status for c in launch.checks(chosen, [], here, None, {})] == [FAIL]


# ---- SGLang's command line -----------------------------------------------------------------------------------------

GOOD = (
    "python -m sglang.launch_server --model-path /m/Qwen3-Embedding-4B --is-embedding --context-length 32768 "
    """--json-model-override-args '{"is_matryoshka": true}' --host 127.0.0.1"""
)


def judged(text: str, version: str | None = "0.5.23", *, running: bool = False) -> list[Check]:
    launch = command_line.read(command_line.split(text))
    assert launch
    flags = recorded_flags.flags(version) if version in recorded_flags.versions() else None
    return command_line.judge(
        command_line.Launch(launch.options, launch.module, version, flags, None, running), "command"
    )  # fmt: skip


def test_a_right_command_has_no_fault() -> None:
    """The smallest correct command passes on the newest release."""
    assert judged(GOOD) == []


@pytest.mark.parametrize(
    ("text", "version", "status", "word"),
    [
        (GOOD.replace("--is-embedding", ""), "0.5.23", FAIL, "--is-embedding is missing"),
        (f"{GOOD} --enable-prompt-trust-remote-code", "0.5.23", FAIL, "leave it out"),
        (f"{GOOD} --mem-fraction-statics 0.8", "0.5.23", FAIL, "--mem-fraction-static"),
        (f"{GOOD} --dtype float16", "0.5.23", WARN, "float16"),
        (f"{GOOD} --dtype half".replace("-4B", "-8B"), "0.5.23", FAIL, "Qwen3-Embedding/issues/164"),
        (f"{GOOD} --kv-cache-dtype fp8", "0.5.23", FAIL, "fp8_e4m3"),
        (GOOD.replace("Qwen3-Embedding-4B", "model"), "0.5.3", FAIL, "contains the word Embedding"),
        (f"{GOOD} --tokenizer-worker-num 4", "0.5.16", FAIL, "31890"),
        (f"{GOOD} --tokenizer-worker-num=4", "0.5.16", FAIL, "31890"),
        (f"{GOOD} --allow-auto-truncate", "0.5.23", FAIL, "<|endoftext|>"),
        (GOOD.replace("--context-length 32768", ""), "0.5.23", WARN, "40960"),
        (GOOD.replace("is_matryoshka", "other"), "0.5.23", WARN, "dimensions"),
        (GOOD.replace("127.0.0.1", "0.0.0.0"), "0.5.23", WARN, "other machines"),
        (f"{GOOD} --trust-remote-code", "0.5.23", WARN, "Python that the checkpoint brings"),
        ("python -m sglang.srt.server --model-path x", None, FAIL, "no SGLang has a module"),
        (f"{GOOD} --chunked-prefill-size", "0.5.23", FAIL, "needs a value"),
    ],
)
def test_mistakes_of_articles_are_named(text: str, version: str | None, status: Status, word: str) -> None:
    """Each mistake of the published recipes has its line, with what to write instead."""
    checks = judged(text, version)
    hit = [c for c in checks if word in c.says or word in c.mend]
    assert hit, lines(checks)
    assert hit[0].status is status
    assert hit[0].mend


def test_keys_are_never_repeated() -> None:
    """A key in a command line is a warning that does not show it."""
    text = lines(judged(f"{GOOD} --api-key hunter2 --admin-api-key=hunter3"))
    assert "every user of the machine can read it" in text
    assert "hunter" not in text


def test_what_depends_on_an_unknown_release_stays_unknown() -> None:
    """Without a release, rows for some of them are neither said nor denied; those for all of them still are."""
    checks = judged(f"{GOOD} --tokenizer-worker-num 4 --allow-auto-truncate", None)
    assert [c.status for c in checks if "tokenizer_workers_broken" in c.says] == [UNKNOWN]
    assert [c.status for c in checks if "endoftext" in c.says] == [FAIL]


def test_a_running_server_is_not_accused_of_flags_that_it_took() -> None:
    """Its own parser has passed them: abbreviations, options of releases never seen."""
    assert judged(f"{GOOD} --some-new-option 3", running=True) == []
    assert judged(f"{GOOD} --mem-fraction-st 0.5") == []  # argparse takes an unambiguous beginning


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("numactl -N0 /e/bin/python -m sglang.launch_server --model-path x", True),
        ("docker run --gpus all img python3 -m sglang.launch_server \\\n  --model-path x", True),
        ("/e/bin/sglang serve --model-path x", True),
        ("python -m vllm.entrypoints.openai.api_server", False),
        ("python -c 'import sglang.launch_server'", False),
        ("", False),
    ],
)
def test_where_a_launch_is_found(text: str, found: bool) -> None:
    """Wrappers before the command and continued lines are seen through."""
    assert (command_line.read(command_line.split(text)) is not None) == found


def test_a_broken_command_is_the_users() -> None:
    """An open quote, or no SGLang at all, is exit status 2, not a verdict."""
    for text in ("python -m 'sglang.launch_server", "ls -l"):
        with pytest.raises(InvalidInputError) as refused:
            serving.of_command(text)
        assert refused.value.code == "bad_command"


def test_a_running_server_is_seen_with_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that runs SGLang for an embedding model is judged by the release beside its python."""
    site = tmp_path / "env/lib/python3.12/site-packages"
    (site / "sglang-0.5.3.dist-info").mkdir(parents=True)
    (tmp_path / "env/bin").mkdir()
    python = tmp_path / "env/bin/python3"
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/__init__.py").touch()
    (tmp_path / "sglang/launch_server.py").write_text(
        "import sys; sys.stdout.write('up\\n'); sys.stdout.flush(); sys.stdin.read()"
    )
    words = [str(python), "-m", "sglang.launch_server", "--model-path", "/m/qwen3-embedding", "--dtype", "half"]
    with subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        mine = psutil.Process(process.pid)
        mine.info = {"pid": process.pid, "cmdline": mine.cmdline()}  # type: ignore[attr-defined]
        monkeypatch.setattr(psutil, "process_iter", lambda _: [mine])
        text = lines(serving.checks())
        process.communicate(b"")
    assert "--is-embedding is missing" in text
    assert "sglang 0.5.3: weights load only" in text
    assert "22518" in text


# ---- the machine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (machine.system("x86_64", "Linux"), OK),
        (machine.system("aarch64", "Linux"), WARN),
        (machine.memory(16 * GIB, 32 * GIB, None), OK),
        (machine.memory(16 * GIB, 32 * GIB, 2 * GIB), WARN),
        (machine.memory(1 * GIB, 32 * GIB, None), WARN),
        (machine.open_files(1024, 524288), WARN),
        (machine.open_files(1024, 1024), FAIL),
        (machine.open_files(65536, 65536), OK),
        (machine.open_files(-1, -1), OK),
        (machine.processes(100), WARN),
        (machine.processes(-1), OK),
        (machine.file_size(1 << 20), FAIL),
        (machine.file_size(-1), OK),
        (machine.shared_memory(64_000_000), WARN),
        (machine.shared_memory(8 * GIB), OK),
        (machine.shared_memory(None), UNKNOWN),
        (machine.huge_pages("madvise", 0, 32 * GIB), OK),
        (machine.huge_pages("always", 16 * GIB, 32 * GIB), WARN),
        (machine.huge_pages(None, 0, 32 * GIB), UNKNOWN),
        (machine.huge_pages("never", None, 32 * GIB), UNKNOWN),
        (machine.clock(1_800_000_000, 0), OK),
        (machine.clock(1_800_000_000, 5), WARN),
        (machine.clock(1_800_000_000, None), UNKNOWN),
        (machine.clock(0, 0), FAIL),
        (machine.clock(5e9, 0), FAIL),
    ],
)
def test_the_machine(check: Check, status: Status) -> None:
    """Limits, memory, clock: each by its numbers, and what is not told stays unknown."""
    assert check.status is status
    assert bool(check.mend) or status in (OK, UNKNOWN)


def test_disk(tmp_path: Path) -> None:
    """Room is compared with what is needed, in a folder that may not be there yet; a file in the way is said."""
    assert machine.disk("models", tmp_path / "not/yet", 1000, "the model").status is OK
    short = machine.disk("models", tmp_path, 1 << 60, "the model")
    assert short.status is FAIL
    assert "the model takes" in short.says
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert machine.disk("models", tmp_path / "locked/x", 1, "x").status is FAIL


def test_ports() -> None:
    """A port in use, or its second one, or one too high, is named with one that is free."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        check = machine.port(number, [])
        assert check.status is FAIL
        assert f"{os.getpid()}" in check.says or number > 55535
        if number - 10000 > 1024:
            second = machine.port(number - 10000, [], bare=True)
            assert second.status is FAIL
            assert "+ 10000" in second.says
            assert machine.port(number - 10000, []).status is OK  # behind the gateway the engine has ports of its own
    assert machine.port(62000, [], bare=True).status is FAIL
    assert machine.port(62000, []).status is OK  # above the ports of outgoing connections: free


def test_the_kernels_own_numbers_are_read() -> None:
    """On Linux the gatherers find plausible facts, or None, never an exception."""
    checks = machine.checks(30000, [], engine_needed=0, model_needed=0)
    assert {"memory", "open files", "clock", "port 30000", "huge pages"} <= {c.name for c in checks}
    state = machine._clock_state()
    assert state is None or 0 <= state <= 5


# ---- the network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, OK),
        ({"HTTPS_PROXY": "http://me:hunter2@proxy:3128"}, WARN),
        ({"http_proxy": "proxy:3128", "no_proxy": "example.com"}, WARN),
        ({"http_proxy": "proxy:3128", "no_proxy": "localhost, 127.0.0.1"}, OK),
        ({"ALL_PROXY": "socks5://p:1", "NO_PROXY": "*"}, OK),
        ({"ALL_PROXY": "http://me:hunter2@[::1"}, WARN),
    ],
)
def test_proxies(environ: dict[str, str], status: Status) -> None:
    """A proxy that also catches local requests is a warning; its password is not shown."""
    check = network.proxy(environ)
    assert check.status is status
    assert "hunter2" not in check.says


def test_clocks_apart() -> None:
    """Minutes between this clock and a hub's are a warning; no answer is no verdict."""
    assert network.clocks({"a": Answer(False, "no")}) is None
    assert network.clocks({"a": Answer(True, apart=2.0)}).status is OK
    behind = network.clocks({"a": Answer(True, apart=300.0)})
    assert (behind.status, "300 s behind a" in behind.says) == (WARN, True)
    assert "ahead of" in network.clocks({"a": Answer(True, apart=-300.0)}).says


def test_hubs_are_asked_with_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that answers is ok with its clock; one that refuses or never answers is a warning within seconds."""
    import http.server
    import socket

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(network, "TIMEOUT", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    answer = network.reach(f"http://127.0.0.1:{server.server_port}")
    assert answer.reached
    assert answer.apart is not None
    assert math.isclose(answer.apart, 0, abs_tol=2)
    server.shutdown()
    server.server_close()
    asked: list[object] = []
    head = httpx.head
    monkeypatch.setattr(httpx, "head", lambda url, **more: asked.append(more["timeout"]) or head(url, **more))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://nosuchhost.invalid")
        checks = network.checks(offline=False)
    assert [c.status for c in checks if c.name.startswith("hub")] == [WARN, WARN]
    assert asked == [0.5, 0.5]
    assert not network.reach("http://[broken").reached


def test_a_hub_that_nothing_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking up its name, say, which has no time-out: the others' answers come all the same, in the time for all."""
    ended = threading.Event()
    monkeypatch.setattr(network, "TIMEOUT", 0.1)
    monkeypatch.setattr(network, "reach", lambda url: Answer("modelscope" in url or ended.wait(120)))
    checks = {c.name: c for c in network.checks(offline=False, environ={})}
    ended.set()
    assert (checks["hub huggingface"].status, checks["hub modelscope"].status) == (WARN, OK)
    assert "no answer within 0.1 s" in checks["hub huggingface"].says


def test_offline_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """--offline, or HF_HUB_OFFLINE, leaves the hubs unknown and makes no request."""
    monkeypatch.setattr(network, "reach", lambda _: pytest.fail("asked"))
    assert [c.status for c in network.checks(offline=True, environ={})] == [OK, UNKNOWN, UNKNOWN]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [c.status for c in network.checks(offline=False, environ={})] == [OK, UNKNOWN, UNKNOWN]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without GPU, engines and models, and nobody else's processes."""
    monkeypatch.setattr(inventory, "survey", lambda *_: Survey(()))
    monkeypatch.setattr(gpu, "pci_cards", lambda: 0)
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(serving, "checks", list)


def envelope(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = run([*args, "--json"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return status, json.loads(out)


def test_a_bare_machine_is_told_what_to_do_next(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    """Nothing installed is a list of commands, not a failure."""
    status, answer = envelope(capsys, "doctor", "--offline")
    checks = {c["name"]: c for c in answer["result"]["checks"]}
    assert checks["engine"]["mend"] == "qwen3emb engine install cpu"
    assert checks["model"]["mend"].startswith("qwen3emb download")
    assert checks["hub huggingface"]["status"] == "unknown"
    counted = {s: sum(c["status"] == s for c in checks.values()) for s in ("ok", "warn", "fail", "unknown")}
    assert answer["result"]["summary"] == counted
    assert status == (1 if counted["fail"] else 0)


def test_any_failure_is_exit_status_1_with_the_whole_report(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    """A port in use fails the check; --json carries all lines beside the error."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        paths().profiles.mkdir(parents=True)
        (paths().profiles / "mine.yaml").write_text(PROFILE % f"server: {{port: {number}}}")
        status, answer = envelope(capsys, "doctor", "--offline", "--profile", "mine")
    assert (status, answer["error"]["code"]) == (1, "unfit")
    assert f"port {number}" in answer["error"]["message"]
    assert len(answer["result"]["checks"]) > 10


def test_a_profile_without_its_machine_fails(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    """A GPU's profile on a machine that has none: one failure, with the profiles that serve without."""
    status, answer = envelope(capsys, "doctor", "--offline", "--profile", "rtx4090")
    (line,) = [c for c in answer["result"]["checks"] if c["name"] == "launch"]
    assert (status, answer["error"]["code"], line["status"]) == (1, "unfit", "fail")
    assert "--profile cpu" in line["mend"]


def test_a_model_that_cannot_be_read_fails_the_launch(
    capsys: pytest.CaptureFixture[str], bare: None, tmp_path: Path
) -> None:
    """As `up` refuses it: unknown is what was not looked at."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    (tmp_path / "mine.yaml").write_text(PROFILE.replace("model: demo", f"model: {folder}") % "")
    status, answer = envelope(capsys, "doctor", "--offline", "--profile", str(tmp_path / "mine.yaml"))
    (line,) = [c for c in answer["result"]["checks"] if c["name"] == "launch"]
    assert (status, line["status"]) == (1, "fail")
    assert "config.json" in line["says"]


def test_a_profile_of_the_cpu_needs_no_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bare: None
) -> None:
    """A card that cannot serve fails the machine, and is a warning to a profile that goes without, as its cure says."""
    monkeypatch.setattr(inventory, "survey", lambda *_: Survey((card(compute_capability=(7, 5)),), (), "580.95.05"))
    for words, seen in (((), "fail"), (("--profile", "demo"), "warn")):
        _, answer = envelope(capsys, "doctor", "--offline", *words)
        (line,) = [c for c in answer["result"]["checks"] if c["name"] == "gpu 0 capability"]
        assert line["status"] == seen


def test_people_see_a_line_a_check_and_its_cure(capsys: pytest.CaptureFixture[str], bare: None) -> None:
    """Status first, the cure below; nothing is cut off in a pipe."""
    run(["doctor", "--offline", "-p", "demo"])
    out = capsys.readouterr().out
    assert "-> qwen3emb engine install cpu" in out
    assert all(line.split()[0] in ("ok", "warn", "fail", "unknown", "->") for line in out.splitlines())


def test_the_seeds_command_is_taken_apart(capsys: pytest.CaptureFixture[str]) -> None:
    """The published launch command: every mistake in one answer, on the release it was written for."""
    text = (
        "python -m sglang.launch_server --model-path /models/qwen3-4b --host 0.0.0.0 --port 30000 "
        "--mem-fraction-static 0.85 --dtype float16 --enable-prompt-trust-remote-code"
    )
    status, answer = envelope(capsys, "doctor", "--command", text)
    said = json.dumps(answer["result"])
    assert status == 1
    for word in ("--is-embedding is missing", "--enable-prompt-trust-remote-code", "float16", "other machines"):
        assert word in said
    _, old = envelope(capsys, "doctor", "--command", text, "--sglang", "0.5.3")
    assert "contains the word Embedding" in json.dumps(old["result"])
    status, fine = envelope(capsys, "doctor", "--command", GOOD)
    assert (status, fine["result"]["summary"]["ok"]) == (0, 1)
