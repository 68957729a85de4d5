"""Texts a second with and without the engine plugin, on the real engine, on a CPU.

    python benchmarks/plugin_cpu.py --json
    python benchmarks/plugin_cpu.py --without norms --without heap     # what these parts give

One thin layer with hidden size 2560: the full-length answers of the 4B model with next to no model behind them, so
that serving cost is what is measured. Two engines serve it, the stock one (SGLANG_PLUGINS=none) and the one with the
plugin; rounds alternate between them and the one not measured is frozen (SIGSTOP). The load is a closed loop of raw
connections in a process of its own which counts answers without parsing them; a sample is parsed afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3emb_launch.demo_model import DemoShape, make_demo_model
from qwen3emb_launch.engines.plugin_wheel import build_plugin_wheel

THIN = DemoShape(hidden_size=2560, layers=1, heads=4, kv_heads=2, head_dim=64, mlp_size=128, max_positions=4096)
PROMPT_CHARACTERS = 32  # and the end token: 33 tokens of the byte tokenizer
START_SECONDS = 300.0
ANSWER_SECONDS = 60.0


@dataclass
class Engine:
    """A bare SGLang and its process group."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    http_cpu_ms: list[float] = field(default_factory=list)
    engine_cpu_ms: list[float] = field(default_factory=list)

    def signal(self, what: int) -> None:
        """To every process of the engine."""
        os.killpg(self.process.pid, what)

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time used so far by the HTTP process and by all the others of the group."""
        ticks = os.sysconf("SC_CLK_TCK")
        main, others = 0.0, 0.0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(words[2]) == self.process.pid:
                used = (int(words[11]) + int(words[12])) / ticks
                if int(entry.name) == self.process.pid:
                    main += used
                else:
                    others += used
        return main, others


@contextmanager
def serving(
    name: str, python: Path, model: Path, site: Path, flags: list[str], log: Path, without: Sequence[str] = ()
) -> Iterator[Engine]:
    """Start an engine and wait for its first embedding; kill its group at the end.

    `plugin` has the parts that are on by themselves, and those of `without`, which the other one lacks.
    """
    port = _free_port()
    argv = [
        str(python), "-m", "sglang.launch_server", "--model-path", str(model), "--device", "cpu", "--is-embedding",
        "--context-length", "4096", "--max-total-tokens", "32768", "--disable-radix-cache",
        "--host", "127.0.0.1", "--port", str(port), *flags,
    ]  # fmt: skip
    environ = {
        **os.environ,
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        # Threads of the tiny matrix products would fight with the other processes for the cores, in both engines.
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(site),
        "SGLANG_PLUGINS": "qwen3emb" if name == "plugin" or without else "none",
    }
    environ |= {f"QWEN3EMB_PLUGIN_{part.upper()}": str(int(name == "plugin")) for part in without}
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, env=environ, start_new_session=True)
    engine = Engine(name, port, process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the {name} engine did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.25)
        if name == "plugin" and "answered by the fast route" not in log.read_text(errors="replace"):
            raise SystemExit(f"the plugin is not active:\n{log.read_text(errors='replace')[-3000:]}")
        yield engine
    finally:
        engine.signal(signal.SIGKILL)
        process.wait(30)


def _free_port() -> int:
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _request(text: str) -> bytes:
    body = json.dumps({"model": "thin", "input": text}).encode()
    head = (
        b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n"
    )
    return head % len(body) + body


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(_request("ready?"))
            return connection.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def load(port: int, clients: int, warm: float, seconds: float, round_: int, marks: Any, out: Any) -> None:
    """The client process: puts rate, latencies (s) and sampled bodies into `out`; `marks` tells when counting runs."""
    selector = selectors.DefaultSelector()
    serial = 0

    def text() -> str:
        nonlocal serial
        serial += 1
        return f"round {round_} text {serial} ".ljust(PROMPT_CHARACTERS, ".")[:PROMPT_CHARACTERS]

    state: dict[socket.socket, list[Any]] = {}
    for _ in range(clients):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        state[connection] = [bytearray(), 0, time.perf_counter()]
        connection.sendall(_request(text()))
    begin = time.perf_counter() + warm
    end = begin + seconds
    latencies: list[float] = []
    sample: list[bytes] = []
    told = False
    while (now := time.perf_counter()) < end:
        if not told and now >= begin:
            marks.put("counting")
            told = True
        events = selector.select(ANSWER_SECONDS)
        if not events:
            raise SystemExit(f"no answer within {ANSWER_SECONDS:.0f} s")
        for key, _ in events:
            connection = key.fileobj  # type: ignore[assignment]
            slot = state[connection]
            data = connection.recv(1 << 18)
            if not data:
                raise SystemExit("the engine closed a connection")
            slot[0] += data
            if not slot[1] and (split := slot[0].find(b"\r\n\r\n")) >= 0:
                head = bytes(slot[0][:split]).lower()
                if not head.startswith(b"http/1.1 200"):
                    raise SystemExit(f"refused: {bytes(slot[0])[:300]!r}")
                slot[1] = split + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            if slot[1] and len(slot[0]) >= slot[1]:
                done = time.perf_counter()
                if begin <= done < end:
                    latencies.append(done - slot[2])
                    if len(latencies) % 100 == 1:
                        sample.append(bytes(slot[0]))
                state[connection] = [bytearray(), 0, done]
                connection.sendall(_request(text()))
    marks.put("counted")
    out.put((len(latencies) / seconds, latencies, sample))


def check(sample: list[bytes]) -> None:
    """Each sampled answer is a unit vector of 2560 finite numbers for 33 tokens."""
    if not sample:
        raise SystemExit("no answer to check: the round was too short")
    for raw in sample:
        answer = json.loads(raw.split(b"\r\n\r\n", 1)[1])
        vector = answer["data"][0]["embedding"]
        norm = math.sqrt(sum(x * x for x in vector))
        if len(vector) != THIN.hidden_size or abs(norm - 1) > 0.01 or answer["usage"]["prompt_tokens"] != 33:
            raise SystemExit(f"a wrong answer: {len(vector)} numbers, norm {norm}, usage {answer['usage']}")


def measure(engine: Engine, clients: int, warm: float, seconds: float, round_: int) -> None:
    """One round against one engine, which runs alone meanwhile."""
    context = multiprocessing.get_context("spawn")
    marks, out = context.Queue(), context.Queue()
    engine.signal(signal.SIGCONT)
    client = context.Process(target=load, args=(engine.port, clients, warm, seconds, round_, marks, out))
    client.start()
    try:
        marks.get(timeout=ANSWER_SECONDS + warm)
        before = engine.cpu_seconds()
        marks.get(timeout=ANSWER_SECONDS + seconds)
        after = engine.cpu_seconds()
        rate, latencies, sample = out.get(timeout=ANSWER_SECONDS)
    finally:
        client.join(5)
        client.kill()
        engine.signal(signal.SIGSTOP)
    check(sample)
    texts = rate * seconds
    engine.rates.append(rate)
    engine.latencies += latencies
    engine.http_cpu_ms.append((after[0] - before[0]) / texts * 1000)
    engine.engine_cpu_ms.append((after[1] - before[1]) / texts * 1000)


def summary(engine: Engine) -> dict[str, Any]:
    """Medians over rounds; latencies over all answers; CPU in milliseconds a text."""
    ordered = sorted(engine.latencies)
    return {
        "texts_per_second": round(statistics.median(engine.rates), 1),
        "rounds": [round(rate, 1) for rate in engine.rates],
        "p50_ms": round(ordered[len(ordered) // 2] * 1000, 1),
        "p95_ms": round(ordered[int(len(ordered) * 0.95)] * 1000, 1),
        "http_process_cpu_ms": round(statistics.median(engine.http_cpu_ms), 2),
        "other_processes_cpu_ms": round(statistics.median(engine.engine_cpu_ms), 2),
    }


def versions(python: Path) -> dict[str, str]:
    """What served: the packages of the engine environment."""
    code = (
        "import json; from importlib.metadata import version as v\n"
        "print(json.dumps({p: v(p) for p in ('sglang', 'torch', 'fastapi', 'uvicorn', 'orjson')}))"
    )
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=60)
    result: dict[str, str] = json.loads(found.stdout)
    return {**result, "python": platform.python_version()}


def engine_environment() -> Path:
    """The cpu engine that `qwen3emb engine install cpu` built."""
    from qwen3emb_launch import engines

    return engines.find("cpu").python


def thin_model_and_plugin(folder: Path) -> tuple[Path, Path]:
    """The checkpoint that is served here, and the plugin laid out for PYTHONPATH."""
    with zipfile.ZipFile(build_plugin_wheel(folder)) as wheel:
        wheel.extractall(folder / "site")
    return make_demo_model(folder / "thin", THIN), folder / "site"


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # engines of a run that is ended end with it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path, help="python of a CPU engine (default: the installed one)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="counted time of a round")
    parser.add_argument("--warm", type=float, default=1.0, help="uncounted time before it")
    parser.add_argument("--flag", action="append", default=[], help="one more engine argument, for both")
    parser.add_argument(
        "--without", action="append", default=[], metavar="PART", help="against the plugin less this part, not stock"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    python = options.engine_python or engine_environment()
    with tempfile.TemporaryDirectory(prefix="plugin-cpu-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model, site = thin_model_and_plugin(folder)
        names = ("stock", "plugin")
        starts = [serving(n, python, model, site, options.flag, folder / f"{n}.log", options.without) for n in names]
        with ThreadPoolExecutor(len(starts)) as pool:
            found = dict(zip(names, pool.map(stack.enter_context, starts), strict=True))
        for engine in found.values():
            engine.signal(signal.SIGSTOP)
        for round_ in range(options.rounds):
            for name in names if round_ % 2 == 0 else names[::-1]:
                measure(found[name], options.clients, options.warm, options.seconds, round_)
    stock, plugin = found["stock"], found["plugin"]
    result = {
        "ratio": round(statistics.median(p / s for s, p in zip(stock.rates, plugin.rates, strict=True)), 2),
        "clients": options.clients,
        "without": options.without,
        "stock": summary(stock),
        "plugin": summary(plugin),
        "versions": versions(python),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }
    if options.json:
        print(json.dumps(result))
        return
    for name in ("stock", "plugin"):
        print(f"{name:7}", "  ".join(f"{key} {value}" for key, value in result[name].items()))  # type: ignore[attr-defined]
    print(f"ratio   {result['ratio']}")


if __name__ == "__main__":
    main()
