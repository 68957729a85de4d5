"""A record as one HTML file that needs no network and no script: tables, and plots as SVG (pygal).

A plotting library that draws in the browser would put one to four megabytes of script into every report; plain SVG
prints, mails and opens anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from qwen3emb_launch.bench import report
from qwen3emb_launch.bench.histogram import LatencyHistogram
from qwen3emb_launch.bench.record import Record, Row, rows_of

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, .facts td { text-align: left } .facts td { white-space: normal }
.warn { border-left: 4px solid #d80; padding: .2rem .8rem; background: var(--soft); margin: .4rem 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .4rem }
figcaption { color: #333; font-size: .85rem; text-align: center } svg { width: 100%; height: auto }
footer { margin-top: 2rem; color: #888; font-size: .85rem }
"""


def page(record: Record) -> str:
    """The whole page."""
    title = f"Bench: {record.mode}" + (" (partial)" if record.partial else "")
    body = [f"<h1>{escape(title)}</h1>", _table(None, [list(p) for p in report.headline(record)], "facts")]
    body += [f'<p class="warn">{escape(w)}</p>' for w in record.warnings]
    rows = rows_of(record)
    body += ["<h2>Figures</h2>", _table(report.columns(record), [report.cells(record, r) for r in rows])]
    for heading, head, lines in (
        ("Comparison", report.COMPARISON_COLUMNS, report.comparison_rows(record.comparisons)),
        ("Drift", report.DRIFT_COLUMNS, report.drift_rows(record.drifts)),
        ("Claims", report.CLAIM_COLUMNS, report.claim_rows(record)),
    ):
        if lines:
            body += [f"<h2>{heading}</h2>", _table(head, lines)]
    body += [f"<p>{escape(line)}</p>" for line in (*report.knee_lines(record), *report.slo_lines(record))]
    plots = _plots(record, rows)
    if plots:
        body += ["<h2>Plots</h2>", '<div class="plots">', *plots, "</div>"]
    tool = record.tool
    body.append(
        f"<footer>qwen3emb {escape(str(tool.get('version')))} on {escape(str(tool.get('platform')))}, "
        f"Python {escape(str(tool.get('python')))}; latency in an open loop counts from the scheduled send.</footer>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _table(head: Sequence[str] | None, rows: Sequence[Sequence[str]], name: str = "") -> str:
    out = [f'<table class="{name}">']
    if head:
        out.append("<tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>")
    out += ["<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows]
    return "".join([*out, "</table>"])


def _plots(record: Record, rows: Sequence[Row]) -> list[str]:
    plots = []
    if len(record.levels) > 1 and record.mode == "sweep":
        plots += _sweep_plots(record, rows)
    curves = [(_name(record, r), LatencyHistogram(r.figures.histogram).curve()) for r in rows if r.figures.histogram]
    if curves:
        plots.append(
            _xy(
                "Latency by percentile (ms; right end is the slowest)",
                [(name, [(p, s * 1000) for p, s in points]) for name, points in curves[:12]],
                "percent of requests",
                logarithmic=True,
            )
        )
    if record.mode == "soak":
        plots += _soak_plots(record)
    else:
        plots += _time_plots(record, rows)
    return plots


def _sweep_plots(record: Record, rows: Sequence[Row]) -> list[str]:
    by_target = {t.name: sorted((r for r in rows if r.target == t.name), key=lambda r: r.level) for t in record.targets}
    unit = "requests/s offered" if record.load.get("shape") == "open" else "clients"
    throughput = [(n, [(r.level, r.figures.requests_per_s) for r in rs]) for n, rs in by_target.items()]
    latency = [
        (f"{n} {p}", [(r.figures.requests_per_s, v) for r in rs if (v := getattr(r.figures.latency, p)) is not None])
        for n, rs in by_target.items()
        for p in ("p50", "p95", "p99")
    ]
    return [
        _xy("Requests/s over load", throughput, unit),
        _xy("Latency (ms) over throughput", latency, "requests/s", logarithmic=True),
    ]


def _time_plots(record: Record, rows: Sequence[Row]) -> list[str]:
    """Throughput and p95 second by second; the phases of a burst follow each other."""
    rate: dict[str, list[tuple[float, float]]] = {}
    slow: dict[str, list[tuple[float, float]]] = {}
    offset: dict[str, float] = {}
    for row in rows[:12]:
        name = row.target if record.mode == "burst" else _name(record, row)
        start = offset.get(name, 0.0)
        for at, per_second, _, p95 in row.figures.timeline:
            rate.setdefault(name, []).append((start + at, per_second))
            if p95 is not None:
                slow.setdefault(name, []).append((start + at, p95))
        offset[name] = start + row.figures.seconds
    if not rate:
        return []
    return [
        _xy("Requests/s over time", list(rate.items()), "seconds"),
        _xy("p95 (ms) over time", list(slow.items()), "seconds", logarithmic=True),
    ]


def _soak_plots(record: Record) -> list[str]:
    from itertools import accumulate

    from qwen3emb_launch.bench.soak import MEASURES

    hours = list(accumulate(r.figures.seconds / 3600 for r in record.runs))
    plots = []
    for name, unit, value_of in MEASURES:
        points = [(at, v) for at, run in zip(hours, record.runs, strict=True) if (v := value_of(run)) is not None]
        if len(points) > 1:
            plots.append(_xy(f"{name} ({unit}) over hours", [(name, points)], "hours"))
    return plots


def _name(record: Record, row: Row) -> str:
    parts = [row.target] if len(record.targets) > 1 else []
    parts += [row.phase] if record.mode == "burst" else []
    return ", ".join([*parts, report.level_name(record, row.level)])


def _xy(
    title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_title: str, logarithmic: bool = False
) -> str:
    """One plot as inline SVG: no script, no outside reference."""
    import pygal
    from pygal.style import CleanStyle

    everything = [y for _, points in series for _, y in points]
    config: dict[str, Any] = {
        "style": CleanStyle(background="white", plot_background="white", font_family="sans-serif"),
        "js": (),
        "no_prefix": False,
        "disable_xml_declaration": True,
        "show_dots": sum(len(p) for _, p in series) < 150,
        "dots_size": 2,
        "stroke_style": {"width": 2},
        "x_title": x_title,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": 2,
        "height": 380,
        "width": 620,
        "explicit_size": False,
        "truncate_legend": -1,
        "value_formatter": report.number,
        "x_value_formatter": lambda x: f"{x:g}",
    }
    if logarithmic and everything and min(everything) > 0 and max(everything) / min(everything) > 5:
        config["logarithmic"] = True
    else:
        config["range"] = (0, max([*everything, 1e-9]) * 1.05)
    chart = pygal.XY(**config)
    for name, points in series:
        chart.add(name, list(points))
    svg = chart.render(is_unicode=True)
    svg = re.sub(r"<script.*?</script>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
