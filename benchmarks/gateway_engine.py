"""What batching before the engine gains: single-text clients on the stock engine, the plugin engine, and the gateway.

    python benchmarks/gateway_engine.py [--engine-python PYTHON] [--clients 64] [--json]

The real engine on a CPU with one thin layer of hidden size 2560 (as benchmarks/plugin_cpu.py, whose engines and load
these are), every text new. Rounds alternate; what is not measured is frozen. The gateway stands before the plugin
engine, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import plugin_cpu
from plugin_cpu import Engine, engine_environment, serving, thin_model_and_plugin, versions


class Fronted(Engine):
    """The gateway as something to be measured: its engine wakes and sleeps with it."""

    behind: Engine

    def signal(self, what: int) -> None:
        """To the gateway and the engine behind it."""
        self.behind.signal(what)
        super().signal(what)

    def cpu_seconds(self) -> tuple[float, float]:
        """CPU time of the gateway, and of all processes of the engine behind it."""
        return sum(super().cpu_seconds()), sum(self.behind.cpu_seconds())


@contextmanager
def fronting(engine: Engine, model: Path, more: list[str]) -> Iterator[Fronted]:
    """A gateway before an engine, once it answers."""
    port = plugin_cpu._free_port()
    argv = [
        sys.executable, "-m", "qwen3emb_launch", "gateway", "--upstream", f"http://127.0.0.1:{engine.port}/v1",
        "--port", str(port), "--model", "thin", "--model-path", str(model), "--context-length", "4096", *more,
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    front = Fronted("gateway", port, process)
    front.behind = engine
    try:
        while not plugin_cpu._answers(port):
            if process.poll() is not None:
                raise SystemExit("the gateway did not start")
            time.sleep(0.1)
        yield front
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the rounds' ratios."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # engines of a run that is ended end with it
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--flag", action="append", default=[], help="one more engine argument")
    parser.add_argument("--gateway-flag", action="append", default=[], help="one more gateway argument")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    python = options.engine_python or engine_environment()
    with tempfile.TemporaryDirectory(prefix="gateway-engine-") as scratch, ExitStack() as stack:
        folder = Path(scratch)
        model, site = thin_model_and_plugin(folder)
        found: dict[str, Engine] = {
            name: stack.enter_context(serving(name, python, model, site, options.flag, folder / f"{name}.log"))
            for name in ("stock", "plugin")
        }
        found["gateway"] = stack.enter_context(fronting(found["plugin"], model, options.gateway_flag))
        for engine in found.values():
            engine.signal(signal.SIGSTOP)
        for number in range(options.rounds):
            for name in list(found)[:: 1 if number % 2 == 0 else -1]:
                plugin_cpu.measure(found[name], options.clients, 1.5, options.seconds, number)
    rates = {name: engine.rates for name, engine in found.items()}
    result = {
        "clients": options.clients,
        **{f"gateway_to_{name}": ratio(rates["gateway"], rates[name]) for name in ("stock", "plugin")},
        **{name: plugin_cpu.summary(engine) for name, engine in found.items()},
        "versions": versions(python),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return
    print("| | texts/s | p50, ms | p95, ms |\n|---|---|---|---|")
    for name, engine in found.items():
        row = plugin_cpu.summary(engine)
        print(f"| {name} | {row['texts_per_second']} | {row['p50_ms']} | {row['p95_ms']} |")
    print(f"\ngateway to stock {result['gateway_to_stock']}, gateway to plugin {result['gateway_to_plugin']}")


if __name__ == "__main__":
    main()
