"""A record as one HTML file that needs no network and no script: tables, and plots as SVG (pygal).

A plotting library that draws in the browser would put one to four megabytes of script into every report; plain SVG
prints, mails and opens anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from unicodedata import east_asian_width

from qwen3emb_launch.bench import report
from qwen3emb_launch.bench.histogram import LatencyHistogram
from qwen3emb_launch.bench.record import Record, Row, rows_of
from qwen3emb_launch.statistics import number

# Of up to twelve series, told apart by people who see few colours too (Okabe and Ito's eight first).
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#c2b300",
    "#7f3c8d", "#8c564b", "#888888", "#17a2a2",
)  # fmt: skip

HALF_A_PLOT = 38  # letters of a legend

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .25rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child, .facts td, .words td, .words th { text-align: left }
.facts td, .words td, td:first-child { white-space: normal }
td:first-child { overflow-wrap: break-word; min-width: 6rem } .facts td, .warn { overflow-wrap: anywhere }
.warn { border-left: 4px solid #d80; padding: .2rem .8rem; background: var(--soft); margin: .4rem 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .4rem }
figcaption { color: #333; font-size: .85rem; text-align: center } svg { width: 100%; height: auto }
footer { margin-top: 2rem; color: #888; font-size: .85rem }
"""


def page(record: Record) -> str:
    """The whole page."""
    title = f"Bench: {record.mode}" + (" (partial)" if record.partial else "")
    body = [f"<h1>{escape(title)}</h1>", _table(None, [list(p) for p in report.headline(record)], "facts")]
    body += [f'<p class="warn">{escape(w)}</p>' for w in (*record.warnings, *report.failure_lines(record))]
    rows = rows_of(record)
    body += ["<h2>Figures</h2>", _table(report.columns(record), [report.cells(record, r) for r in rows])]
    for heading, head, lines, name in (
        ("Comparison", report.COMPARISON_COLUMNS, report.comparison_rows(record.comparisons), ""),
        ("Drift", report.DRIFT_COLUMNS, report.drift_rows(record.drifts), ""),
        ("Claims", report.CLAIM_COLUMNS, report.claim_rows(record), "words"),
    ):
        if lines:
            body += [f"<h2>{heading}</h2>", _table(head, lines, name)]
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
    curves = [(_name(record, r), _curve(LatencyHistogram(r.figures.histogram))) for r in rows if r.figures.histogram]
    if curves:
        plots.append(
            _xy(
                "Latency (ms) that a share of requests did not pass",
                curves[:12],
                "share of requests",
                logarithmic=True,
                x_axis=PERCENTS,
                dots=False,
            )
        )
    if record.mode == "soak":
        plots += _soak_plots(record)
    else:
        plots += _time_plots(record, rows)
    return plots


def _curve(histogram: LatencyHistogram) -> list[tuple[float, float]]:
    """Percentiles in ms, up to the last one that so many requests can tell from the slowest."""
    told = 100 * (1 - 1 / max(histogram.count, 2))
    return [(percent, seconds * 1000) for percent, seconds in histogram.curve() if percent <= told]


def _sweep_plots(record: Record, rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(r.target for r in rows)
    by_target = {name: sorted((r for r in rows if r.target == name), key=lambda r: r.level) for name in names}
    levels = sorted(record.levels)
    unit = "requests/s offered" if record.load.get("shape") == "open" else "clients"
    throughput = [(n, [(r.level, r.figures.requests_per_s) for r in rs]) for n, rs in by_target.items()]
    latency = [
        (f"{n} {p}", [(r.figures.requests_per_s, v) for r in rs if (v := getattr(r.figures.latency, p)) is not None])
        for n, rs in by_target.items()
        for p in ("p50", "p95", "p99")
    ]
    return [
        _xy("Requests/s over load", throughput, unit, x_axis=Axis(math.log2, levels, lambda v: f"{v:g}")),
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

    total = sum(r.figures.seconds for r in record.runs)
    word, length = next(((w, s) for w, s in (("hours", 3600), ("minutes", 60)) if total >= 2 * s), ("seconds", 1))
    times = list(accumulate(r.figures.seconds / length for r in record.runs))
    plots = []
    for name, unit, value_of in MEASURES:
        points = [(at, v) for at, run in zip(times, record.runs, strict=True) if (v := value_of(run)) is not None]
        if len(points) > 1 and any(v for _, v in points):
            plots.append(_xy(f"{name} ({unit}) over {word}", [(name, points)], word))
    return plots


def _name(record: Record, row: Row) -> str:
    parts = [row.target] if len(record.targets) > 1 else []
    parts += [row.phase] if record.mode in ("burst", "seed") else []
    return ", ".join([*parts, report.level_name(record, row.level, row.shape)])


@dataclass(frozen=True)
class Axis:
    """How values lie along an axis and which of them are named. pygal's own logarithm would take both axes at once."""

    place: Callable[[float], float]
    marks: Sequence[float]
    text: Callable[[float], str] = number

    def labels(self) -> list[dict[str, Any]]:
        """The marks as pygal takes them."""
        return [{"value": self.place(mark), "label": self.text(mark)} for mark in self.marks]


def _log(values: Sequence[float]) -> Axis | None:
    """A logarithmic axis with marks at 1, 2 and 5, for positive values of more than a factor of five."""
    if not values or min(values) <= 0 or max(values) / min(values) < 5:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low < 4 else (1,)
    marks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    inside = [m for m in marks if min(values) / 2.5 <= m <= max(values) * 2.5]
    return Axis(lambda v: math.log10(v), inside)


def _nines(percent: float) -> float:
    """0 at 0%, 1 at 90%, 2 at 99%: the slow end of a latency curve takes the room it deserves."""
    return -math.log10(max(1 - percent / 100, 1e-4))


PERCENTS = Axis(_nines, (0, 50, 90, 99, 99.9, 99.99), lambda v: f"{v:g}%")


def _width(name: str) -> int:
    """Of a legend's text in Latin letters; Chinese characters are twice as wide."""
    return sum(1 + (east_asian_width(c) in "WF") for c in name)


def _xy(
    title: str,
    series: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    x_title: str,
    logarithmic: bool = False,
    x_axis: Axis | None = None,
    dots: bool = True,
) -> str:
    """One plot as inline SVG: no script, no outside reference."""
    import pygal
    from pygal.style import CleanStyle

    values = [y for _, points in series for _, y in points]
    y_axis = _log(values) if logarithmic else None
    named = len(series) > 1
    columns = 2 if all(_width(name) <= HALF_A_PLOT for name, _ in series) else 1
    config: dict[str, Any] = {
        "style": CleanStyle(
            background="white", plot_background="white", font_family="sans-serif", legend_font_size=12, colors=COLOURS
        ),
        "js": (),
        "disable_xml_declaration": True,
        "show_dots": dots and sum(len(p) for _, p in series) < 150,
        "dots_size": 2,
        "stroke_style": {"width": 2},
        "x_title": x_title,
        "show_legend": named,
        "legend_at_bottom": True,
        "legend_at_bottom_columns": columns,
        "truncate_legend": -1,
        "height": 320 + (26 * math.ceil(len(series) / columns) if named else 0),
        "width": 620,
        "margin_bottom": 44 if named else 20,
        "value_formatter": number,
        "x_value_formatter": lambda x: f"{x:g}",
    }
    if y_axis:
        config["y_labels"] = y_axis.labels()
    else:
        config["range"] = (0, max([*values, 1e-9]) * 1.05)
    if x_axis:
        config["x_labels"] = x_axis.labels()
    chart = pygal.XY(**config)
    for name, points in series:
        chart.add(
            name,
            [(x_axis.place(x) if x_axis else x, y_axis.place(y) if y_axis else y) for x, y in points],
        )
    svg = chart.render(is_unicode=True)
    svg = re.sub(r"<script.*?</script>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
