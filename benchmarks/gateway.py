"""What the gateway costs and gains: added latency, hits a second, misses a second, memory, connections.

    python benchmarks/gateway.py [--json] [--seconds 3] [--smg "smg launch --model-path FOLDER"]    # needs wrk

The gateway runs on core 0; the load and the null engine (tests/null_engine.py, 2560 numbers) share core 1, so the
rows with misses measure three processes on two cores. `--smg` measures SMG (pip install smg) before the same engine.
Rows are medians of interleaved rounds. `others` is how many cores other programs kept busy meanwhile: near 0 on a quiet
machine. benchmarks/gateway_table.py sets these figures and others beside what the gateway is to reach.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE, GATEWAY, SMG = 18611, 18612, 18613

HIT = """wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = '{"model": "null", "input": "how do I return a parcel that never arrived?"%s}'
"""
MISS = """local n, seed = 0, os.time() * 1000 + %d
request = function()
  n = n + 1
  local body = '{"model": "null", "input": "how do I return parcel ' .. seed .. "-" .. %s .. ' that never arrived?"%s}'
  return wrk.format("POST", "/v1/embeddings", {["Content-Type"] = "application/json"}, body)
end
"""
CHECK = """done = function(summary)
  local e = summary.errors
  io.write(string.format("BAD %d\\n", e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@contextmanager
def process(*argv: str, core: int | None = None, port: int) -> Iterator[subprocess.Popen]:
    """A child on a core, until its port answers; ended with the block."""
    pinned = ["taskset", "-c", str(core), *argv] if core is not None else list(argv)
    child = subprocess.Popen(
        pinned, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not answers(port):
            if child.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{argv} did not start")
            time.sleep(0.05)
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        child.wait(20)


def answers(port: int) -> bool:
    """Whether a real embedding comes back."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/embeddings",
        b'{"model": "null", "input": "up?"}',
        {"content-type": "application/json"},
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wrk(port: int, script: str, connections: int, seconds: int) -> dict[str, float]:
    """Requests a second and the median latency in milliseconds; every answer must be a 2xx."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script + CHECK)
        file.flush()
        out = subprocess.run(
            ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", file.name,
             f"http://127.0.0.1:{port}/v1/embeddings"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", out).groups()
    bad = int(re.search(r"BAD (\d+)", out)[1])
    assert not bad, f"{bad} bad answers\n{out}"
    return {
        "per_s": float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]),
        "p50_ms": float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit],
    }


def miss(seed: int, more: str = "", distinct: str = "n") -> str:
    """A script of texts that are all new (or of `distinct`)."""
    return MISS % (seed, distinct, more)


def rows(seconds: int, rounds: int, ports: dict[str, int], pids: dict[str, int]) -> dict[str, dict[str, float]]:
    """Every row of the table, each server after the other within a round."""
    small, wide = ', "dimensions": 256', ', "encoding_format": "base64"'
    hit = {"hit_256_alone": (HIT % small, 1), "hit_256": (HIT % small, 32), "hit_2560_base64": (HIT % wide, 32)}
    missed: dict[str, tuple[Callable[[int], str], int]] = {
        "miss_alone": (lambda s: miss(s, wide), 1),
        "miss_32": (lambda s: miss(s, wide), 32),
        "repeat_32": (lambda s: miss(s, wide, "math.floor(n / 4)"), 32),
    }
    seen: dict[str, dict[str, list[float]]] = {}
    for round_number in range(rounds):
        for name, port in ports.items():
            work = {k: (f(round_number * 10 + port), c) for k, (f, c) in missed.items()}
            if name == "gateway":
                work |= hit
            for row, (script, connections) in work.items():
                before = cpu_seconds(pids[name])
                got = wrk(port, script, connections, seconds)
                got["cpu_us"] = 1e6 * (cpu_seconds(pids[name]) - before) / (got["per_s"] * seconds)
                for what, value in got.items():
                    seen.setdefault(f"{name}/{row}", {}).setdefault(what, []).append(value)
    return {k: {w: round(statistics.median(v), 3) for w, v in row.items()} for k, row in seen.items()}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far: what a request costs, whatever else runs on the machine."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """Bytes of a process and its children."""
    total = 0
    for task in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            stat = (task / "stat").read_text().rsplit(") ", 1)[1].split()
            if int(task.name) == pid or int(stat[1]) == pid:
                total += int((task / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def crowd(port: int, pid: int, idle: int, active: int) -> dict[str, float]:
    """Idle connections beside active ones: errors and memory. The idle ones must still be served afterwards."""
    links = [socket.create_connection(("127.0.0.1", port)) for _ in range(idle)]
    try:
        got = wrk(port, miss(7, ', "dimensions": 256'), active, 3)
        body = b'{"model": "null", "input": "still there?"}'
        head = b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
        bad = 0
        for link in links:
            link.settimeout(10)
            link.sendall(head + body)
            bad += not link.recv(65536).startswith(b"HTTP/1.1 200")
        return {"per_s": round(got["per_s"]), "idle_errors": bad, "megabytes": round(resident(pid) / 1e6)}
    finally:
        for link in links:
            link.close()


def measured(seconds: int, rounds: int, smg: str | None) -> dict[str, dict[str, float]]:
    """All rows."""
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt-get install wrk")
    engine = f"http://127.0.0.1:{ENGINE}/v1"
    with contextlib.ExitStack() as stack:
        null = [sys.executable, "tests/null_engine.py", "--port", str(ENGINE), "--dims", "2560"]
        pids = {"engine": stack.enter_context(process(*null, core=1, port=ENGINE)).pid}
        launch = [sys.executable, "-m", "qwen3emb_launch", "gateway", "--upstream", engine, "--port", str(GATEWAY)]
        pids["gateway"] = stack.enter_context(process(*launch, core=0, port=GATEWAY)).pid
        ports = {"engine": ENGINE, "gateway": GATEWAY}
        if smg:
            where = ["--host", "127.0.0.1", "--port", str(SMG), "--worker-urls", engine.removesuffix("/v1")]
            pids["smg"] = stack.enter_context(process(*smg.split(), *where, core=0, port=SMG)).pid
            ports["smg"] = SMG
        began, all_before, own_before = time.monotonic(), busy_seconds(), own_seconds(pids)
        result = rows(seconds, rounds, ports, pids)
        result["gateway/crowd"] = crowd(GATEWAY, pids["gateway"], 1000, 200)
        others = busy_seconds() - all_before - (own_seconds(pids) - own_before)
        result["others"] = {"cores": round(max(0.0, others) / (time.monotonic() - began), 2)}
    for name in ports:
        if name != "engine":
            added = result[f"{name}/miss_alone"]["p50_ms"] - result["engine/miss_alone"]["p50_ms"]
            result[f"{name}/added"] = {"p50_ms": round(added, 3)}
    return result


def busy_seconds() -> float:
    """CPU time of the whole machine so far, but for what runs in the idle class or niced."""
    user, _, system = Path("/proc/stat").read_text().split()[1:4]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def own_seconds(pids: dict[str, int]) -> float:
    """CPU time of these processes, of this one and of its ended children, so far."""
    ended, own = (resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    return sum(map(cpu_seconds, pids.values())) + sum(u.ru_utime + u.ru_stime for u in (ended, own))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with a run that is ended
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--smg", help="SMG's command, to be measured too")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    result = measured(args.seconds, args.rounds, args.smg)
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), "rows": result}))
        return
    print("| row | requests/s | p50, ms | CPU a request, µs | |\n|---|---|---|---|---|")
    for name, row in result.items():
        rest = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("per_s", "p50_ms", "cpu_us"))
        print(f"| {name} | {row.get('per_s', '-')} | {row.get('p50_ms', '-')} | {row.get('cpu_us', '-')} | {rest} |")


if __name__ == "__main__":
    main()
