"""What the gateway is to reach, and what it reaches here: one table.

    python benchmarks/gateway_table.py [--smg "smg launch --model-path FOLDER"] [--only null] [--json]

Parts, each a command of its own that this one calls: `null` (benchmarks/gateway.py), `cache` (gateway_cache.py),
`engine` (gateway_engine.py, the real engine with one thin layer), `killed` (chaos.py: SIGKILL of the real engine behind
`up`'s gateway). Two cores, wrk, the cpu engine; without `--smg` the rows that compare with it only say ours. What a row
of a GPU is to reach is measured by gateway_gpu.py. Exit status 1 when a row is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Data = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line: what is measured, what is wanted, what came out, and whether that is enough."""

    name: str
    wanted: str
    seen: str
    reached: bool


def at_most(name: str, value: float, bound: float, unit: str) -> Target:
    """Less is better."""
    return Target(name, f"{bound:g} {unit} or less", f"{value:g} {unit}", value <= bound)


def at_least(name: str, value: float, bound: float, unit: str = "") -> Target:
    """More is better."""
    return Target(name, f"{bound:,g}{unit}", f"{value:,g}{unit}", value >= bound)


def null_rows(data: Data) -> list[Target]:
    """Before the null engine."""
    rows = data["rows"]
    ours, smg = rows["gateway/repeat_32"]["per_s"], rows.get("smg/repeat_32", {}).get("per_s")
    crowd = rows["gateway/crowd"]
    beside = f" (SMG adds {rows['smg/added']['p50_ms']:g} ms)" if smg else ""
    repeated = Target(
        "misses/s, 32 clients, each text asked four times",
        f"more than SMG's {smg:,.0f}" if smg else "more than SMG's",
        f"{ours:,.0f}",
        smg is None or ours > smg,
    )
    return [
        at_most(f"added p50, one client, miss, 2,560 dims base64{beside}", rows["gateway/added"]["p50_ms"], 0.35, "ms"),
        at_most("hit p50, one client, 256 dims", rows["gateway/hit_256_alone"]["p50_ms"], 0.3, "ms"),
        at_least("hits/s, 256 dims, 32 connections", round(rows["gateway/hit_256"]["per_s"]), 8000),
        at_least("hits/s, 2,560 dims base64", round(rows["gateway/hit_2560_base64"]["per_s"]), 5000),
        at_least("misses/s, 32 clients, all new", round(rows["gateway/miss_32"]["per_s"]), 4000),
        repeated,
        Target(
            "1,000 idle and 200 active connections", "no error, under 250 MB",
            f"{crowd['idle_errors']} errors, {crowd['megabytes']} MB",
            crowd["idle_errors"] == 0 and crowd["megabytes"] < 250,
        ),
    ]  # fmt: skip


def cache_rows(data: Data) -> list[Target]:
    """Of the cache alone."""
    zipf = {name: row["hit_rate"] for name, row in data["zipf"]["1.0"].items()}
    ours, lru = zipf["S3-FIFO (ours)"], zipf["LRU"]
    return [
        Target("Zipf 1.0, 10,000 of 100,000 texts cached", f"above LRU's {lru:.1%}", f"{ours:.1%}", ours > lru),
        at_most("memory of a cached vector, 2,560 dims", data["bytes_per_2560_dim_entry"] / 1000, 10.5, "kB"),
    ]


def engine_rows(data: Data) -> list[Target]:
    """Before the real engine, one thin layer."""
    return [
        at_least("texts/s, 64 clients: to the stock engine alone", data["gateway_to_stock"], 1.4, "x"),
        at_least("the same: to the plugin engine alone", data["gateway_to_plugin"], 1.0, "x"),
    ]


def killed_rows(data: Data) -> list[Target]:
    """The real engine killed under load."""
    sent, failed, wrong = (sum(row[what] for row in data["rows"]) for what in ("sent", "failed", "wrong"))
    return [
        Target(
            "engine killed by SIGKILL under load", "0 failed, 0 wrong", f"{failed} failed, {wrong} wrong of {sent}",
            sent > 0 and not failed and not wrong,
        )
    ]  # fmt: skip


PARTS: dict[str, tuple[Sequence[str], Callable[[Any], list[Target]]]] = {
    "null": (("gateway.py",), null_rows),
    "cache": (("gateway_cache.py",), cache_rows),
    "engine": (("gateway_engine.py",), engine_rows),
    "killed": (("chaos.py", "--part", "processes", "--gateway", "with", "--only", "SIGKILL http"), killed_rows),
}


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be repeated")
    options.add_argument("--smg", help="SMG's command, to be measured too")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    targets: list[Target] = []
    raw: Data = {}
    for part in args.only or PARTS:
        (script, *argv), judge = PARTS[part]
        more = ["--smg", args.smg] if part == "null" and args.smg else []
        raw[part] = ran([script, *argv, *more])
        targets += judge(raw[part])
    if args.json:
        print(json.dumps({"targets": [asdict(target) for target in targets], "parts": raw}))
    else:
        print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}\n\n| | to reach | measured |\n|---|---|---|")
        for target in targets:
            print(f"| {target.name} | {target.wanted} | {target.seen}{'' if target.reached else ': missed'} |")
        if "null" in raw:
            print(f"\nCores that other programs kept busy beside `null`: {raw['null']['rows']['others']['cores']}")
    raise SystemExit(0 if all(target.reached for target in targets) else 1)


def ran(argv: list[str]) -> Any:
    """What a benchmark prints as JSON. It is ended when this one is; a status of its own says nothing here."""
    with subprocess.Popen(
        [sys.executable, str(HERE / argv[0]), *argv[1:], "--json"], stdout=subprocess.PIPE, text=True, cwd=HERE.parent
    ) as child:
        try:
            out, _ = child.communicate()
        except BaseException:
            child.terminate()
            child.wait(60)
            raise
    try:
        return json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise SystemExit(f"{argv[0]} gave no result (status {child.returncode})") from None


if __name__ == "__main__":
    main()
