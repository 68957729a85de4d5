"""The load engine's figures beside AIPerf's: the same endpoint, the same texts, the same shape, in turns.

    python benchmarks/bench_vs_established.py [--base-url URL] [--clients 8] [--requests 1500] [--rounds 3] [--json]

Without --base-url a server that answers after 250 ms is started, so that neither tool is short of a core and what
differs is the measuring. Rounds are long, since AIPerf stalls for up to a second after its warm-up. It comes from
--aiperf, else from an environment that pip makes once in the cache folder (1.2 GB). Exit 1 when the medians differ by
more than 3% in throughput or 5% in p50 or p95.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qwen3emb_launch.bench.figures import figures_of
from qwen3emb_launch.bench.load import run
from qwen3emb_launch.bench.spec import Phase
from qwen3emb_launch.bench.target import Ready, Target, Work, prepare
from qwen3emb_launch.bench.texts import source_of
from qwen3emb_launch.demo_model import make_demo_model
from qwen3emb_launch.paths import paths

VERSION = "0.13.0"
LIMITS = {"requests_per_s": 0.03, "p50_ms": 0.05, "p95_ms": 0.05}


def aiperf_command(given: str | None) -> str:
    """The given one, or one that is installed here once."""
    if given:
        return given
    home = paths().cache / f"aiperf-{VERSION}"
    command = home / "bin" / "aiperf"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "install", "-q", f"aiperf=={VERSION}"], check=True)
    return str(command)


@contextmanager
def endpoint(given: str | None, delay_ms: float) -> Iterator[str]:
    """The given endpoint, or a server that answers after a while."""
    if given:
        yield given
        return
    argv = [sys.executable, str(ROOT / "tests" / "null_server.py"), "--port", "0", "--delay-ms", str(delay_ms)]
    server = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


def ours(ready: Ready, clients: int, requests: int, number: int) -> dict[str, float]:
    """One round of this project's load engine."""
    phases = (Phase("warmup", 1, clients, measured=False), Phase("steady", 600, clients))
    result = run(replace(ready.spec, phases=phases, requests=requests, text_start=number << 24))
    figures = figures_of(result, result.phases[-1], None)
    assert not figures.failed, figures.failed
    return {
        "requests_per_s": figures.requests_per_s,
        "p50_ms": figures.latency.p50 or 0.0,
        "p95_ms": figures.latency.p95 or 0.0,
    }


def theirs(command: str, ready: Ready, clients: int, requests: int, number: int, folder: Path) -> dict[str, float]:
    """One round of AIPerf with texts of the same kind."""
    source = source_of(replace(ready.spec, text_start=(number << 24) + (1 << 23)))
    texts = folder / "texts.jsonl"
    texts.write_text("".join(f'{{"text": {source.next().decode()}}}\n' for _ in range(requests + 8 * clients)))
    argv = [
        command, "profile", "--model", ready.spec.model, "--url", ready.spec.url.removesuffix("/v1"),
        "--endpoint-type", "embeddings", "--input-file", str(texts), "--custom-dataset-type", "single_turn",
        "--concurrency", str(clients), "--request-count", str(requests), "--warmup-request-count", str(4 * clients),
        "--tokenizer", str(make_demo_model(folder / "demo")), "--artifact-dir", str(folder / f"round{number}"),
        "--workers-max", "1", "--record-processor-service-count", "1", "--ui", "none",
        "--no-gpu-telemetry", "--no-server-metrics", "--use-server-token-count", "--export-level", "summary",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    found = sorted((folder / f"round{number}").rglob("profile_export_aiperf.json"))
    if not found:
        raise SystemExit(f"AIPerf gave no figures:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    data = json.loads(found[0].read_text())
    return {
        "requests_per_s": data["request_throughput"]["avg"],
        "p50_ms": data["request_latency"]["p50"],
        "p95_ms": data["request_latency"]["p95"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url")
    parser.add_argument("--aiperf", help="path of the aiperf command")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", default="33")
    parser.add_argument("--delay-ms", type=float, default=250)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    command = aiperf_command(given.aiperf)
    rounds: dict[str, list[dict[str, float]]] = {"ours": [], "aiperf": []}
    with endpoint(given.base_url, given.delay_ms) as url, tempfile.TemporaryDirectory() as folder:
        ready = prepare(Target("endpoint", url), Work(tokens=given.tokens, encoding="float"))
        for number in range(given.rounds):
            rounds["ours"].append(ours(ready, given.clients, given.requests, number))
            rounds["aiperf"].append(theirs(command, ready, given.clients, given.requests, number, Path(folder)))
    rows = []
    for measure, limit in LIMITS.items():
        a, b = (median(r[measure] for r in rounds[who]) for who in ("ours", "aiperf"))
        rows.append(
            {"measure": measure, "ours": a, "aiperf": b, "ratio": a / b, "limit": limit, "ok": abs(a / b - 1) <= limit}
        )
    if given.json:
        print(json.dumps({"rows": rows, "rounds": rounds, "aiperf": VERSION}))
    else:
        print("| measure | this project | AIPerf | ratio | agrees within |")
        print("|---|---|---|---|---|")
        for row in rows:
            print(
                f"| {row['measure']} | {row['ours']:.4g} | {row['aiperf']:.4g} | {row['ratio']:.3f} | "
                f"{row['limit']:.0%}: {'yes' if row['ok'] else 'NO'} |"
            )
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
