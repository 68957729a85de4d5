"""How fast the load generator itself is: against a server that computes nothing, both on the same cores.

    python benchmarks/bench_null.py [--seconds 5] [--json]

It prints requests/s, the generator's share of a core and its memory, and exits 1 when a target is missed: 5,000
requests/s with 256-dim answers, 1,200 with 2560-dim float answers, under 300 MB at 1,000 requests in flight.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3emb_launch.bench.figures import figures_of
from qwen3emb_launch.bench.load import run
from qwen3emb_launch.bench.spec import LoadSpec, Phase


@dataclass(frozen=True)
class Case:
    """A load and what it must reach; `delay_ms` keeps requests in flight."""

    name: str
    clients: int
    dims: int
    encoding: str
    least_rate: float = 0
    most_megabytes: float = 300
    delay_ms: float = 0


CASES = (
    Case("256 dims, base64", 32, 256, "base64", least_rate=5000),
    Case("256 dims, float", 32, 256, "float", least_rate=5000),
    Case("2560 dims, base64", 32, 2560, "base64"),
    Case("2560 dims, float", 32, 2560, "float", least_rate=1200),
    Case("2560 dims, float, 1,000 in flight", 1000, 2560, "float", delay_ms=250),
)


def measure(case: Case, seconds: float) -> dict[str, object]:
    """One case against a fresh server."""
    argv = [sys.executable, str(ROOT / "tests" / "null_server.py"), "--port", "0", "--delay-ms", str(case.delay_ms)]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        result = run(
            LoadSpec(
                url=url,
                model="null",
                dims=case.dims,
                encoding="float" if case.encoding == "float" else "base64",
                phases=(Phase("warmup", 1, case.clients, measured=False), Phase("steady", seconds, case.clients)),
            )
        )
    finally:
        server.kill()
        server.wait()
    figures = figures_of(result, result.phases[-1], None)
    megabytes = result.peak_rss / 1e6
    return {
        "case": case.name,
        "clients": case.clients,
        "requests_per_s": round(figures.requests_per_s),
        "p50_ms": figures.latency.p50,
        "client_cpu": round(figures.client.cpu, 2),
        "client_megabytes": round(megabytes, 1),
        "failed": dict(figures.failed),
        "least_rate": case.least_rate,
        "ok": figures.requests_per_s >= case.least_rate and megabytes < case.most_megabytes and not figures.failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [measure(case, given.seconds) for case in CASES]
    if given.json:
        print(json.dumps({"cpus": os.cpu_count(), "rows": rows}))
    else:
        print("| answers | clients | requests/s | to reach | p50 ms | client CPU | client MB |")
        print("|---|---|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['case']} | {row['clients']} | {row['requests_per_s']:,} | {row['least_rate'] or '-'} | "
                f"{row['p50_ms']:.2f} | {row['client_cpu']:.0%} | {row['client_megabytes']} |"
            )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
