"""The gateway before a running engine against that engine alone: single-text clients, every text new.

    python benchmarks/gateway_gpu.py --engine http://127.0.0.1:21000/v1 --model-path FOLDER [--clients 64] [--json]
    python benchmarks/gateway_gpu.py ... --variant 'two={"calls": 2}' --variant 'four={"calls": 4}'
    python benchmarks/gateway_gpu.py ... --engine-pid PID --variant ids={} --variant 'texts={"model_path": ""}'

The engine is somebody else's and stays as it is; `--engine-pid` is its HTTP process, whose CPU time a text is looked at
too. A gateway for each variant (settings as in `qwen3emb gateway --config`) is started before it on this host. The load
comes from processes of its own (`qwen3emb bench`'s); each round goes to every endpoint in turn, every other round
backwards. Needs the gateway's packages (httptools, uvloop, orjson, numpy, pybase64, tokenizers) beside typer, rich,
platformdirs and psutil.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3emb_launch.bench.calibrate import vocabulary_of
from qwen3emb_launch.bench.load import run
from qwen3emb_launch.bench.spec import LoadSpec, Phase, Vocabulary
from qwen3emb_launch.gateway.pulse import process_state
from qwen3emb_launch.statistics import percentile

WAIT = 60.0


@dataclass
class Endpoint:
    """What is measured; `pid` of the gateway, None for the engine itself."""

    name: str
    url: str
    model: str
    pid: int | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    def cpu_seconds(self) -> float:
        """CPU time of the gateway and its workers so far."""
        if self.pid is None:
            return 0.0
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return sum(map(cpu_of, (self.pid, *map(int, children))))

    def engine_calls(self) -> tuple[float, float]:
        """Calls that the gateway made to the engine, and the texts in them."""
        if self.pid is None:
            return 0.0, 0.0
        text = get(self.url.removesuffix("/v1") + "/metrics").decode()
        rows = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]

        def total(name: str) -> float:
            """Of all workers."""
            return sum(float(value) for series, value in rows if series.partition("{")[0] == name)

        return total("qwen3emb_engine_calls_total"), total("qwen3emb_engine_call_items_sum")


def cpu_of(pid: int) -> float:
    """CPU seconds of one process so far; 0 for one that is gone."""
    return process_state(pid)[1]


def get(url: str) -> bytes:
    """The body of a GET, proxies ignored."""
    import urllib.request

    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        body: bytes = answer.read()
    return body


def served_model(url: str) -> str:
    """The engine's own name for its model."""
    return str(json.loads(get(f"{url}/models"))["data"][0]["id"])


@contextmanager
def gateway(name: str, engine: str, model_path: Path | None, settings: dict[str, Any], out: Path) -> Iterator[Endpoint]:
    """A gateway before the engine, once the engine has proved itself to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = {
        "upstreams": [engine],
        "port": port,
        "models": ["gateway"],
        "model_path": str(model_path or ""),
        **settings,
    }
    file = out / f"{name}.json"
    file.write_text(json.dumps(config))
    argv = [sys.executable, "-m", "qwen3emb_launch", "gateway", "--config", str(file)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    log = out / f"{name}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(argv, stdout=sink, stderr=sink, env=environ)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                get(base + "/ready")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"gateway {name} did not start:\n{log.read_text()[-3000:]}") from None
                time.sleep(0.1)
        yield Endpoint(name, f"{base}/v1", "gateway", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def measure(endpoint: Endpoint, spec: LoadSpec, texts_sent: int, engine_pid: int | None) -> int:
    """One round; the texts it took."""
    engine_cpu = cpu_of(engine_pid) if engine_pid else 0.0
    calls, cpu = endpoint.engine_calls(), endpoint.cpu_seconds()
    result = run(replace(spec, url=endpoint.url, model=endpoint.model, text_start=texts_sent))
    spent = endpoint.cpu_seconds() - cpu
    texts = max(1, len(result.batch))
    of_engine = {"engine_cpu_us": 1e6 * (cpu_of(engine_pid) - engine_cpu) / texts} if engine_pid else {}
    more = [after - before for after, before in zip(endpoint.engine_calls(), calls, strict=True)]
    phase = next(p for p in result.phases if p.measured)
    done = [r for r in result.batch.rows() if phase.began <= r[2] <= phase.ended]
    good = [1000 * (finished - scheduled) for scheduled, _, finished, _, kind in done if not kind]
    if not good:
        raise SystemExit(f"{endpoint.name}: no answer was right: {result.details}")
    span = phase.ended - phase.began
    endpoint.rounds.append(
        {
            "texts_per_s": len(good) / span,
            **{f"p{q}_ms": percentile(good, q) for q in (50, 95, 99)},
            "errors": float(len(done) - len(good) + result.unfinished),
            "texts_a_call": more[1] / more[0] if more[0] else 1.0,
            "gateway_cpu_us": 1e6 * spent / texts,
            **of_engine,
            "client_cpu": phase.cpu,
        }
    )
    return result.texts_taken


def variants(given: list[str]) -> dict[str, dict[str, Any]]:
    """`NAME={"setting": value}` each; the defaults when none is given."""
    if not given:
        return {"gateway": {}}
    return {name: json.loads(text or "{}") for name, _, text in (word.partition("=") for word in given)}


def machine() -> dict[str, Any]:
    """What the numbers hold for."""
    out: dict[str, Any] = {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0], "gpu": None}
    shown = "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
    with suppress(OSError):
        out["gpu"] = subprocess.run(shown, capture_output=True, text=True, check=False).stdout.strip() or None
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", required=True, help="base URL of the running engine, ending in /v1")
    parser.add_argument("--model-path", type=Path, help="the model's folder, for the gateway's tokenizer")
    parser.add_argument("--variant", action="append", default=[], help='NAME={"setting": value}; may be repeated')
    parser.add_argument("--clients", default="64", help="comma-separated: each is measured by itself")
    parser.add_argument("--tokens", default="33")
    parser.add_argument("--encoding", choices=["float", "base64"], default="float")
    parser.add_argument("--processes", type=int, default=4, help="of the load")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--engine-pid", type=int, help="its HTTP process: what it costs a text is measured as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    texts_sent, table, rates = 0, {}, {}
    vocabulary: Vocabulary | None = None
    with tempfile.TemporaryDirectory(prefix="gateway-gpu-") as scratch, ExitStack() as stack:
        engine = Endpoint("engine", options.engine.rstrip("/"), served_model(options.engine.rstrip("/")))
        found = [engine]
        for name, settings in variants(options.variant).items():
            found.append(stack.enter_context(gateway(name, engine.url, options.model_path, settings, Path(scratch))))
        for clients in map(int, options.clients.split(",")):
            spec = LoadSpec(
                url=engine.url, model=engine.model, lengths=options.tokens, encoding=options.encoding,
                phases=(Phase("warm-up", 1.0, clients, measured=False), Phase("measured", options.seconds, clients)),
                processes=options.processes,
            )  # fmt: skip
            vocabulary = vocabulary or vocabulary_of(spec)
            spec = replace(spec, vocabulary=vocabulary)
            for number in range(options.rounds):
                for endpoint in found if number % 2 == 0 else found[::-1]:
                    texts_sent += measure(endpoint, spec, texts_sent, options.engine_pid)
                    last = endpoint.rounds[-1]
                    shown = "  ".join(f"{k} {v:.1f}" for k, v in last.items())
                    print(f"{clients} clients, round {number}, {endpoint.name}: {shown}", file=sys.stderr, flush=True)
            for endpoint in found:
                key = f"{endpoint.name}/{clients}"
                rates[key] = [r["texts_per_s"] for r in endpoint.rounds]
                table[key] = {k: round(statistics.median(r[k] for r in endpoint.rounds), 2) for k in endpoint.rounds[0]}
                pairs = zip(rates[key], rates[f"engine/{clients}"], strict=True)
                table[key]["to_engine"] = round(statistics.median(a / b for a, b in pairs), 3)
                endpoint.rounds.clear()
    if options.json:
        about = {**machine(), "tokens": options.tokens, "encoding": options.encoding, "seconds": options.seconds}
        print(json.dumps({**about, "variants": variants(options.variant), "medians": table, "texts_per_s": rates}))
        return
    columns = list(next(iter(table.values())))
    print("| endpoint/clients | " + " | ".join(columns) + " |\n|---" * 1 + "|---" * len(columns) + "|")
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(str(row[c]) for c in columns) + " |")


if __name__ == "__main__":
    main()
