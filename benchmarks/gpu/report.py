"""From the rounds of one interleaved run to medians, ratios and one Markdown table. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

FIGURES = ("texts_per_s", "tokens_per_s", "p50_ms", "p95_ms", "p99_ms")


def medians(rounds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """`{server: {load: {figure: median over rounds}}}`; `spread` is the largest over the smallest texts/s."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    keys = {(r["server"], r["load"]) for r in rounds}
    for server, load in sorted(keys):
        mine = [r for r in rounds if (r["server"], r["load"]) == (server, load)]
        cell = {f: round(median(r[f] for r in mine), 3) for f in FIGURES}
        speeds = [r["texts_per_s"] for r in mine]
        cell["spread"] = round(max(speeds) / max(min(speeds), 1e-9), 3)
        cell["errors"] = sum(r["errors"] for r in mine)
        cell["rounds"] = len(mine)
        table.setdefault(server, {})[load] = cell
    return table


def ratios(rounds: Sequence[Mapping[str, Any]], server: str, against: str, load: str, figure: str) -> list[float]:
    """`server / against` of one figure, round by round: drift of the machine cancels."""
    by_round: dict[int, dict[str, float]] = {}
    for r in rounds:
        if r["load"] == load and r["server"] in (server, against):
            by_round.setdefault(r["round"], {})[r["server"]] = r[figure]
    return [pair[server] / pair[against] for pair in by_round.values() if len(pair) == 2 and pair[against]]


def baseline(wanted: str | list[str], running: list[str]) -> str:
    """What the others are held against: the first of those wanted that runs."""
    names = [wanted] if isinstance(wanted, str) else wanted
    return next((name for name in names if name in running), names[0])


def markdown(record: Mapping[str, Any]) -> str:
    """The record as a page: hardware and versions, one table a load, ratios against the baseline."""
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    out = [
        f"# {record['title']}",
        "",
        f"{record['date']}; {record['gpu']}, driver {record['driver']}; {versions}.",
        f"Model: {record['model']} shape, {record['weights']}.",
        f"{record['rounds']} interleaved rounds of {record['seconds']} s, medians.",
        f"Command: `{record['command']}`",
        *record.get("notes", []),
        "",
        "| server | ready after | GPU memory |",
        "|---|---|---|",
    ]
    for server in record["servers"]:
        memory = f"{server['gpu_bytes'] / 1e9:.2f} GB" if server.get("gpu_bytes") else "-"
        ready = f"{server['ready_s']:.0f} s" if server.get("ready_s") else "-"
        out.append(f"| {server['name']} | {ready} | {memory} |")
    table = record["medians"]
    loads = sorted({load for cells in table.values() for load in cells})
    for load in loads:
        shape = record["loads"][load]
        about = ", ".join(f"{k} {v}" for k, v in shape.items())
        out += [
            "",
            f"## {load}: {about}",
            "",
            "| server | texts/s | tokens/s | p50 ms | p95 ms | p99 ms | spread | errors | against baseline |",
        ]
        out.append("|---|---|---|---|---|---|---|---|---|")
        for server, cells in table.items():
            if load not in cells:
                continue
            c = cells[load]
            pairs = ratios(record["raw"], server, record["baseline"], load, "texts_per_s")
            ratio = f"{median(pairs):.2f}x" if pairs else "-"
            speed = f"{c['texts_per_s']:.0f} | {c['tokens_per_s']:.0f}"
            latency = f"{c['p50_ms']:.1f} | {c['p95_ms']:.1f} | {c['p99_ms']:.1f}"
            out.append(f"| {server} | {speed} | {latency} | {c['spread']:.2f} | {c['errors']:.0f} | {ratio} |")
    return "\n".join(out) + "\n"


if __name__ == "__main__":  # python benchmarks/gpu/report.py RECORD.json > PAGE.md
    import json
    import sys
    from pathlib import Path

    sys.stdout.write(markdown(json.loads(Path(sys.argv[1]).read_text())))
