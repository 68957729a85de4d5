"""What the launcher itself costs: command latency, time added to the engine's start, memory, notice of a crash.

    python benchmarks/startup.py                 all of it, on the demo profile (needs the cpu engine environment)
    python benchmarks/startup.py --no-engine     command latency alone
    python benchmarks/startup.py --json

In turns: SGLang as anybody starts it, the very command that `up` starts (the plugin's, which imports once), and `up`;
times are medians over the rounds.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen3emb_launch import state
from qwen3emb_launch.argv import PLUGIN_MODULE, STOCK_MODULE, with_option
from qwen3emb_launch.engine_process.guard import parents
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.probe import Target, embed_once

QWEN3EMB = [str(Path(sys.executable).with_name("qwen3emb"))]
TARGETS = {"help_ms": 150, "status_ms": 150, "added_s": 1.0, "rss_mb": 80, "notice_s": 1.0}


def latency(args: Sequence[str], runs: int) -> float:
    """Median wall time of a command in milliseconds, one run left out as warm-up."""
    times = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        subprocess.run([*QWEN3EMB, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - begin)
    return 1000 * statistics.median(times[1:])


def free_port() -> int:
    """A port that nobody holds and that leaves room for SGLang's own port + 10000."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= 55535:
            return port


def bare(plan: dict[str, Any], port: int, *, stock: bool = False) -> float:
    """Seconds from the start of the engine alone to its first good embedding; `stock` without the plugin."""
    argv = with_option(plan["argv"], "--port", str(port))
    if stock:
        argv = tuple(STOCK_MODULE if word == PLUGIN_MODULE else word for word in argv)
    begin = time.perf_counter()
    engine = subprocess.Popen(
        argv,
        env={**os.environ, **plan["env"], **({"QWEN3EMB_PLUGIN": "0"} if stock else {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        target = Target("127.0.0.1", port, plan["served_model_name"], plan["max_dims"])
        while not embed_once(target, "ready?", 30).ok:
            if engine.poll() is not None:
                raise SystemExit(f"the bare engine ended with status {engine.returncode}")
            time.sleep(0.05)
        return time.perf_counter() - begin
    finally:
        os.killpg(engine.pid, signal.SIGKILL)
        engine.wait()


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def supervised(port: int) -> dict[str, float]:
    """One `up`: seconds to ready, memory while serving, seconds to notice a killed engine."""
    begin = time.perf_counter()
    command = [*QWEN3EMB, "up", "--profile", "demo", "--name", "bench-startup", "--port", str(port), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    answer = json.loads(process.stdout.readline())
    seconds = time.perf_counter() - begin
    if not answer["ok"]:
        raise SystemExit(answer["error"]["message"])
    guards = [pid for pid, parent in parents().items() if parent == process.pid]  # of the engine and of the gateway
    memory = rss_mb(process.pid) + sum(map(rss_mb, guards))
    gateway = next(u.process for u in state.running("bench-startup")[1].units if u.kind == "gateway")
    gateway_memory = rss_mb(gateway.pid) if gateway else 0.0
    events = state.find("bench-startup").events
    killed = time.time()
    os.kill(answer["result"]["engine_pids"][0], signal.SIGKILL)
    while State.RESTARTING not in (last := json.loads(events.read_text().splitlines()[-1]))["after"]:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    return {
        "command_s": seconds,
        "ready_s": answer["result"]["seconds"],
        "rss_mb": memory,
        "gateway_rss_mb": gateway_memory,
        "notice_s": last["at"] - killed,
    }


def measure(rounds: int, runs: int, *, engine: bool) -> dict[str, Any]:
    """Every figure, by name."""
    figures: dict[str, Any] = {
        "help_ms": latency(["--help"], runs),
        "status_ms": latency(["status"], runs),
    }
    if not engine:
        return figures
    dry = subprocess.run([*QWEN3EMB, "up", "--profile", "demo", "--dry-run", "--json"], capture_output=True, check=True)
    plan = json.loads(dry.stdout)["result"]
    stock, alone, ours = [], [], []
    for _ in range(rounds):
        stock.append(bare(plan, free_port(), stock=True))
        alone.append(bare(plan, free_port()))
        ours.append(supervised(free_port()))
    figures["stock_ready_s"] = statistics.median(stock)
    figures["bare_ready_s"] = statistics.median(alone)
    for name in ("ready_s", "command_s", "rss_mb", "gateway_rss_mb", "notice_s"):
        figures[name] = statistics.median(one[name] for one in ours)
    figures["added_s"] = figures["command_s"] - figures["bare_ready_s"]
    figures["added_to_stock_s"] = figures["command_s"] - figures["stock_ready_s"]
    figures["rounds"] = {"stock_s": stock, "bare_s": alone, "up_s": [one["command_s"] for one in ours]}
    return figures


def main() -> None:
    """Measure and print; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runs", type=int, default=15, help="of each short command")
    parser.add_argument("--no-engine", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QWEN3EMB_STATE_DIR"] = folder
        figures = measure(options.rounds, options.runs, engine=not options.no_engine)
    missed = [name for name, most in TARGETS.items() if name in figures and figures[name] > most]
    if options.json:
        print(json.dumps({"figures": figures, "targets": TARGETS, "missed": missed}))
    else:
        for name, value in figures.items():
            if isinstance(value, float):
                limit = f"  (target: {TARGETS[name]})" if name in TARGETS else ""
                print(f"{name:14} {value:10.3f}{limit}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
