"""What bounds clients before the gateway and an engine, and what a rule for calls gives, by `serving_model.py`.

    python benchmarks/serving_table.py [--measured] [--json]
    python benchmarks/serving_table.py --weights fp8 --workers 0,2 --calls 3,4 --rules part,hold --spread 20
    python benchmarks/serving_table.py --engine cpu --clients 1,16,64 --workers 0,1 --set client=0.5

Workers 0 is the engine alone. `--measured` sets beside it what one H200 gave (4B shape, 33 tokens, 2,560 floats), with
the planner's graph sizes of then; other cases have those of now (`--graphs then`, `now`). The shares are of the time
that each was busy, of the gateway the busiest worker. Means of three runs that differ by chance.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving_model import FULL_GRAPH_SIZES, Costs, Model

SEEDS, SECONDS = 3, 3.0
FP8 = {"item": 0.27}
CPU = {"pass_": 20.0, "item": 10.0, "batch": 0.5, "single_in": 0.12, "single_out": 0.17, "wire": 0.05}
NULL = {
    **dict.fromkeys(("pass_", "item", "batch", "batch_item", "read", "answer", "look"), 0.01),
    "single_in": 0.01, "single_out": 0.02, "call_in": 0.01, "text_in": 0.002, "call_out": 0.01, "text_out": 0.002,
    "gateway_in": 0.03, "gateway_out": 0.03, "make": 0.05, "back": 0.05, "client": 0.05, "wire": 0.03,
}  # fmt: skip
RECORDS = Path(__file__).resolve().parents[1] / "docs/benchmarks"
# The planner's sizes when those runs were made.
GRAPHS_THEN = (
    4, 8, 16, 24, 36, 48, 68, 100, 132, 200, 264, 396, 528, 792, 1056, 1320, 1584, 1848, 2112, 2640, 3168, 3696, 4224,
)  # fmt: skip
# Of the run against vLLM: gateway workers (0: the engine alone), and whether the loop looked ahead.
SERVERS = {"ours": (0, False), "ours-next": (0, True), "stack": (2, False), "stack-next": (2, True)}
# Of the gateway's runs, before engines that looked ahead: workers, and calls of each.
GATEWAYS = {"engine": (0, 4), "one": (1, 4), "two": (2, 4), "two-2": (2, 2), "four-1": (4, 1), "four-2": (4, 2)}


def measured() -> list[tuple[str, int, int, int, bool, float]]:
    """What one H200 gave: weights, clients, workers, calls, `ahead`, texts/s. Means over all rounds on record."""
    found: dict[tuple[str, int, int, int, bool], list[float]] = {}
    for row in json.loads((RECORDS / "h200-4b-2026-11-30-2.json").read_text())["raw"]:
        kind, _, clients = row["load"].partition("-")
        server = row["server"].replace("-fp8", "")
        if kind == "short" and server in SERVERS:
            workers, ahead = SERVERS[server]
            weights = "fp8" if "fp8" in row["server"] else "bf16"
            found.setdefault((weights, int(clients), workers, 4, ahead), []).append(row["texts_per_s"])
    for path in sorted((RECORDS / "h200-2026-11-30-2").glob("gateway-*.json")):
        for name, rates in json.loads(path.read_text())["texts_per_s"].items():
            gateway, _, clients = name.partition("/")
            found.setdefault((path.stem.split("-")[1], int(clients), *GATEWAYS[gateway], True), []).extend(rates)
    return [(*case, statistics.mean(rates)) for case, rates in sorted(found.items())]


def averaged(*given: Any, **named: Any) -> dict[str, float]:
    """What a case gives, by the mean of its runs."""
    found = [figures(Model(*given, seed=seed, **named)) for seed in range(1, SEEDS + 1)]
    means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
    return {name: round(value) if value >= 100 else round(value, 2) for name, value in means.items()}


def figures(model: Model) -> dict[str, float]:
    """Of one run."""
    rate = model.run(SECONDS)
    latencies = sorted(model.latencies)
    busy = {
        "gpu": model.gpu_ms, "scheduler": model.scheduler_ms, "http": model.http.spent_ms,
        "worker": max((worker.spent_ms for worker in model.workers), default=0.0),
        "client": model.processes[0].spent_ms,
    }  # fmt: skip
    return {
        "texts_per_s": rate,
        "p50_ms": latencies[len(latencies) // 2],
        "p95_ms": latencies[len(latencies) * 95 // 100],
        "texts_a_call": statistics.mean([size for worker in model.workers for size in worker.sizes] or [1]),
        "texts_a_pass": statistics.mean(model.passes),
        **{name: spent / 1000 / SECONDS for name, spent in busy.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", action="store_true", help="the cases that an H200 has measured")
    parser.add_argument("--engine", choices=["gpu", "cpu", "null"], default="gpu")
    parser.add_argument("--weights", default="bf16,fp8")
    parser.add_argument("--clients", default="64")
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--calls", default="4")
    parser.add_argument("--rules", default="part")
    parser.add_argument("--stock", action="store_true", help="the scheduler's loop without `ahead`")
    parser.add_argument("--spread", type=int, default=0, help="texts are of 33 tokens, up to so many more or fewer")
    parser.add_argument("--graphs", help="sizes in tokens, `now`, `then`, or `none`: passes are not padded")
    parser.add_argument("--set", action="append", default=[], metavar="COST=MS", help="one of `Costs`")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    costs = replace(Costs(), **{"gpu": {}, "cpu": CPU, "null": NULL}[args.engine])
    given = {name: float(value) for name, _, value in (word.partition("=") for word in args.set)}
    word = args.graphs or ("none" if args.engine != "gpu" else "then" if args.measured else "now")
    named = {"none": (), "then": GRAPHS_THEN, "now": FULL_GRAPH_SIZES}
    graphs = named[word] if word in named else tuple(_numbers(word))
    if args.measured:
        cases = [(*case[:4], "part", *case[4:]) for case in measured()]
    else:
        cases = [
            (weights, clients, workers, calls, rule, not args.stock, 0.0)
            for weights in (args.weights.split(",") if args.engine == "gpu" else [""])
            for clients in _numbers(args.clients) for workers in _numbers(args.workers)
            for calls in (_numbers(args.calls) if workers else [4])
            for rule in (args.rules.split(",") if workers else ["part"])
        ]  # fmt: skip
    rows = []
    for weights, clients, workers, calls, rule, ahead, given_by_h200 in cases:
        case_costs = replace(costs, **{**(FP8 if weights == "fp8" else {}), **given})
        row = averaged(
            clients, case_costs, workers, calls=calls, rule=rule, graphs=graphs,
            ahead=ahead, overlap=args.engine == "gpu", spread=args.spread,
        )  # fmt: skip
        name = f"{weights} {clients} clients, " + (f"{workers} workers, {rule} {calls}" if workers else "engine alone")
        ratio = {}
        if given_by_h200:
            ratio = {"measured": round(given_by_h200), "to_measured": round(row["texts_per_s"] / given_by_h200, 2)}
        rows.append({"case": name.strip() + ("" if ahead else ", stock loop"), **ratio, **row})
    if args.json:
        print(json.dumps({"costs": vars(costs) | given, "rows": rows}))
        return
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
