"""A record as rows, Markdown and CSV: one set of columns for every rendering."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from qwen3emb_launch.bench.compare import Compared
from qwen3emb_launch.bench.record import Comparison, Drift, Record, Row, TargetInfo, rows_of
from qwen3emb_launch.statistics import Ratio, number

LATENCIES = ("p50", "p90", "p95", "p99", "max")


def level_name(record: Record, level: float, shape: str = "") -> str:
    """`16 clients`, `1 client` or `120/s`; `shape` is the run's own, where it is known."""
    return (
        f"{level:.4g}/s" if (shape or record.load.get("shape")) == "open" else f"{level:g} client{'s' * (level != 1)}"
    )


def columns(record: Record) -> list[str]:
    """The table's columns; those that nothing filled are left out."""
    rows = rows_of(record)
    names = ["target"] if len(record.targets) > 1 else []
    names += ["phase"] if record.mode in ("burst", "seed") else []
    names += ["load", "requests/s"]
    names += ["texts/s"] if record.load.get("batch", 1) > 1 else []
    names += ["tokens/s"] if any(r.figures.tokens_per_s for r in rows) else []
    names += [f"{name} ms" for name in LATENCIES]
    names += ["errors"]
    names += ["goodput/s"] if record.slo else []
    names += ["queue ms"] if any(r.figures.queue_ms is not None for r in rows) else []
    if any(r.figures.gpu for r in rows):
        names += ["GPU busy", "GPU GiB", "W", "Wh/1M tokens"]
    names += ["client CPU"]
    return names


def cells(record: Record, row: Row) -> list[str]:
    """One row under `columns`."""
    figures, gpu = row.figures, row.figures.gpu
    known: dict[str, str] = {
        "target": row.target,
        "phase": row.phase,
        "load": level_name(record, row.level, row.shape),
        "requests/s": number(figures.requests_per_s),
        "texts/s": number(figures.texts_per_s),
        "tokens/s": number(figures.tokens_per_s),
        "errors": errors_of(row),
        "goodput/s": number(figures.goodput_per_s),
        "queue ms": number(figures.queue_ms),
        "GPU busy": "-" if not gpu or gpu.busy is None else f"{gpu.busy:.0%}",
        "GPU GiB": "-" if not gpu or gpu.memory_bytes is None else f"{gpu.memory_bytes / 2**30:.2f}",
        "W": number(gpu.watts if gpu else None),
        "Wh/1M tokens": number(gpu.watt_hours_per_million_tokens if gpu else None),
        "client CPU": f"{figures.client.cpu:.0%}" + (" (limit)" if figures.client.limited else ""),
    }
    known |= {f"{name} ms": number(getattr(figures.latency, name)) for name in LATENCIES}
    return [known[name] for name in columns(record)]


def errors_of(row: Row) -> str:
    """`0`, or the share and the kinds."""
    failed = row.figures.failed
    if not failed:
        return "0"
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(failed.items(), key=lambda i: -i[1]))
    return f"{row.figures.error_rate:.2%} ({kinds})"


# What a target is, line by line; values that name themselves stand without their key.
ABOUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("  served by", ("engine", "dtype", "quantization")),
    ("  on", ("gpu", "driver")),
    ("  known as", ("profile", "profile_hash", "launcher", "revision", "fingerprint")),
)
BARE = ("engine", "gpu")
TOLD = ("torch", "transformers", "sglang-kernel", "flashinfer-python")  # packages that a terminal's line has room for


def about(target: TargetInfo, whole: bool) -> list[tuple[str, str]]:
    """What was measured, a line each for where it is, what serves it, on what, and how it was launched."""
    known = {**target.facts, "fingerprint": target.fingerprint.get("id")}
    facts = {k: str(v) for k, v in known.items() if v is not None}
    packages = facts.pop("packages", "").split()
    if facts.get("model") == target.model:
        del facts["model"]
    pairs = [(target.name, f"{target.url} {target.model}")]
    for name, keys in ABOUT:
        told = [value if key in BARE else f"{key} {value}" for key in keys if (value := facts.pop(key, None))]
        pairs += [(name, ", ".join(told))] if told else []
    pairs += [("  also", ", ".join(f"{k} {v}" for k, v in facts.items()))] if facts else []
    if packages:
        shown = packages if whole else [p for p in packages if p.partition("=")[0] in TOLD]
        more = len(packages) - len(shown)
        words = [p.replace("=", " ", 1) for p in shown] + ([f"{more} more in the record"] if more else [])
        pairs.append(("  packages", ", ".join(words)))
    return pairs


def headline(record: Record, whole: bool = True) -> list[tuple[str, str]]:
    """What was done, as name and value; a terminal has no room for the `whole` of it."""
    load = record.load
    texts = f"{load.get('batch', 1)} x {load.get('tokens')} tokens"
    if load.get("corpus"):
        texts = f"{load.get('batch', 1)} from {load['corpus']}"
    if not all(t.tokens_exact for t in record.targets) and not load.get("corpus"):
        texts = texts.replace("tokens", "words")
    pairs = [("mode", record.mode + (" (partial)" if record.partial else "")), ("texts a request", texts)]
    dims = {t.dims for t in record.targets}
    pairs.append(
        (
            "answer",
            f"{', '.join(str(d) for d in dims)} dims, {', '.join(sorted({t.wire or '?' for t in record.targets}))}",
        )
    )
    if load.get("repeat_rate"):
        pairs.append(("repeated texts", f"{load['repeat_rate']:.0%}"))
    for target in record.targets:
        pairs += about(target, whole)
    tool = record.tool
    pairs.append(("made by", f"qwen3emb {tool.get('version')}, seed {record.seed}, {record.created}"))
    return pairs


def ratio_text(ratio: Ratio) -> str:
    """`1.23 (1.18 to 1.29)`, or without an interval where there is none."""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.3f} (no interval from {ratio.pairs} round{'s' * (ratio.pairs != 1)})"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """One row a target: name, then its ratios over the baseline."""
    names = ("texts_per_s", "p50", "p95", "p99")
    return [
        [f"{c.target} / {c.baseline}", *(ratio_text(c.ratios[n]) if n in c.ratios else "-" for n in names)]
        for c in comparisons
    ]


COMPARISON_COLUMNS = ("ratio (95% interval)", "texts/s", "p50", "p95", "p99")
DRIFT_COLUMNS = ("measure", "first", "last", "per hour", "verdict")


def drift_rows(drifts: Sequence[Drift]) -> list[list[str]]:
    """One row a measure of a soak."""
    out = []
    for drift in drifts:
        trend = drift.trend
        verdict = "too few windows to say"
        if trend:
            verdict = "rises" if trend.rises else "falls" if trend.falls else "steady"
        slope = "-" if trend is None else f"{'+' * (trend.slope > 0)}{number(trend.slope)} {drift.unit}"
        out.append([drift.measure, f"{drift.first:.4g} {drift.unit}", f"{drift.last:.4g} {drift.unit}", slope, verdict])
    return out


def knee_lines(record: Record) -> list[str]:
    """What a sweep found, a sentence a target."""
    lines = []
    for name, found in (record.knee or {}).items():
        if not found:
            lines.append(f"{name}: no level had a right answer")
            continue
        lines.append(f"{name}: {_knee(record, found)}")
        if "slo_level" in found and found["slo_level"] is not None:
            top = level_name(record, found["slo_level"])
            lines.append(f"{name}: {record.slo} holds up to {top}, {number(found['slo_requests_per_s'])} requests/s")
        elif "nearest" in found:
            near = found["nearest"]
            lines.append(
                f"{name}: nothing meets {record.slo}; nearest is {level_name(record, near['level'])}: "
                f"{', '.join(near['misses'])}"
            )
    return lines


def _knee(record: Record, found: Mapping[str, Any]) -> str:
    """Where more brings no more; what to try where the sweep ended on one side of it."""
    at, shape = found["level"], record.load.get("shape")
    what = f"{level_name(record, at)}, {number(found['requests_per_s'])} requests/s"
    if not found.get("kept", True):
        return f"no rate tried was kept up with: at {what}; lower ones: --sweep rate:{_round(at / 4)},{_round(at / 2)}"
    if found.get("passed", at < max(record.levels)):
        return f"the knee is at {what}"
    if shape == "open":
        more = f"the highest rate tried was still served; higher ones: --sweep rate:{_round(at * 1.5)},{_round(at * 2)}"
    else:
        more = f"more clients: --sweep {at * 2:.0f},{at * 4:.0f}"
    return f"no knee up to {what}; {more}"


def _round(rate: float) -> str:
    return f"{float(f'{rate:.2g}'):g}"


def slo_lines(record: Record) -> list[str]:
    """Whether each row met the objective, a sentence a row; a sweep has its knee instead."""
    if not record.slo or record.knee is not None:
        return []
    lines = []
    for row in rows_of(record):
        what = f"{row.target}, {row.phase}, {level_name(record, row.level, row.shape)}"
        misses = ", ".join(row.figures.slo_misses)
        lines.append(f"{what}: {record.slo} " + (f"missed: {misses}" if misses else "met"))
    return lines


def failure_lines(record: Record) -> list[str]:
    """The first answer of each kind of failure."""
    found: dict[str, str] = {}
    for run in record.runs:
        found = {**run.figures.details, **found}
    return [f"first {kind}: {detail}" for kind, detail in found.items()]


CLAIM_COLUMNS = ("claim", "stated", "measured", "floor", "verdict")


def claim_rows(record: Record) -> list[list[str]]:
    """The seed's table beside what was measured."""
    return [[str(c.get(name) or "-") for name in CLAIM_COLUMNS] for c in record.claims]


def compared_rows(result: Compared) -> list[list[str]]:
    """One row a load and measure: each record's value, and its ratio to the first's."""
    out = []
    for line in result.lines:
        first = line.values[0]
        ratios = [f"{v / first:.3f}" if v is not None and first else "-" for v in line.values[1:]]
        out.append([line.load, line.measure, *(number(v) for v in line.values), " ".join(ratios)])
    return out


def markdown(record: Record) -> str:
    """The record as a Markdown page."""
    parts = [f"# Bench: {record.mode}" + (" (partial)" if record.partial else ""), ""]
    parts += [f"{'  ' * name.startswith(' ')}- {name.strip()}: {value}" for name, value in headline(record)]
    parts += ["", *_table(columns(record), [cells(record, r) for r in rows_of(record)])]
    if record.comparisons:
        parts += ["", *_table(COMPARISON_COLUMNS, comparison_rows(record.comparisons))]
    if record.drifts:
        parts += ["", *_table(DRIFT_COLUMNS, drift_rows(record.drifts))]
    if record.claims:
        parts += ["", *_table(CLAIM_COLUMNS, claim_rows(record))]
    lines = [*knee_lines(record), *slo_lines(record)]
    if lines:
        parts += ["", *(f"- {line}" for line in lines)]
    told = [*failure_lines(record), *(f"warning: {w}" for w in record.warnings)]
    if told:
        parts += ["", *(f"> - {' '.join(line.split())}" for line in told)]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(str(v).replace("|", "\\|").replace("\n", " ") for v in values) + " |"

    return [line(head), "|" + " --- |" * len(head), *(line(r) for r in rows)]


def csv_text(record: Record) -> str:
    """Every run as a line, raw numbers, for a spreadsheet."""
    out = io.StringIO()
    rows: list[dict[str, Any]] = []
    for run in record.runs:
        f = run.figures
        rows.append(
            {
                "target": run.target,
                "round": run.round,
                "phase": run.phase,
                "level": run.level,
                "seconds": f.seconds,
                "requests": f.requests,
                "requests_per_s": f.requests_per_s,
                "texts_per_s": f.texts_per_s,
                "tokens_per_s": f.tokens_per_s,
                **{f"{n}_ms": getattr(f.latency, n) for n in ("mean", *LATENCIES)},
                "error_rate": f.error_rate,
                "errors": " ".join(f"{k}={v}" for k, v in f.failed.items()),
                "goodput_per_s": f.goodput_per_s,
                "queue_ms": f.queue_ms,
                "gpu_busy": f.gpu.busy if f.gpu else None,
                "gpu_memory_bytes": f.gpu.memory_bytes if f.gpu else None,
                "watts": f.gpu.watts if f.gpu else None,
                "watt_hours_per_million_tokens": f.gpu.watt_hours_per_million_tokens if f.gpu else None,
                "engine_rss_bytes": run.rss,
                "client_cpu": f.client.cpu,
            }
        )
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else ["target"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
