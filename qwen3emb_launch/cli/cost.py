"""`qwen3emb cost`: what an embedding costs on one's own hardware, step by step, and against APIs by the token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3emb_launch.cli.shell import JsonOption, shell
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError

if TYPE_CHECKING:
    from qwen3emb_launch.bench.record import Row
    from qwen3emb_launch.console import Console
    from qwen3emb_launch.cost import Capacity, Cost, IndexSize, Offer
    from qwen3emb_launch.statistics import Slo

EPILOG = (
    "Examples: qwen3emb cost --hardware-price 5800 --years 3 --watts 350 --electricity 0.6 --calls-per-day 240000 "
    "--currency CNY · qwen3emb cost --bench out.json --gpu-hour 2.5 --utilisation 0.3 --against openai-3-small"
)


@dataclass(frozen=True)
class Measured:
    """What one row of a bench record says: rates of one deployment, its power, and where it was read."""

    calls_per_s: float
    tokens_per_call: float | None
    texts_per_call: float
    watts: float | None
    what: str


@dataclass(frozen=True)
class CostReport:
    """The command's result."""

    cost: Cost
    measured: Measured | None
    offers: tuple[Offer, ...]
    capacity: Capacity | None
    storage: tuple[IndexSize, ...]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("cost", epilog=EPILOG)(cost)


def cost(
    bench: Annotated[Path | None, typer.Option(help="Throughput and power from a bench record.")] = None,
    hardware_price: Annotated[float | None, typer.Option(help="Price of one GPU (or machine).")] = None,
    years: Annotated[float, typer.Option(help="Years until it is written off.")] = 3.0,
    residual: Annotated[float, typer.Option(help="What it is still worth then.")] = 0.0,
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    gpu_hour: Annotated[float | None, typer.Option(help="Rent of one GPU for an hour, instead of a price.")] = None,
    watts: Annotated[float | None, typer.Option(help="Draw of one when busy; measured with --bench.")] = None,
    idle_watts: Annotated[float | None, typer.Option(help="Draw of one when idle.")] = None,
    overhead: Annotated[float, typer.Option(help="Power of the rest and cooling, as a factor.")] = 1.0,
    electricity: Annotated[float | None, typer.Option(help="Price of a kWh.")] = None,
    people_per_month: Annotated[float | None, typer.Option(help="What people cost a month.")] = None,
    other_per_month: Annotated[float | None, typer.Option(help="Rack, network, licences a month.")] = None,
    calls_per_day: Annotated[float | None, typer.Option(help="Calls really served a day.")] = None,
    utilisation: Annotated[float | None, typer.Option(help="Share of the day it is busy, with --bench.")] = None,
    tokens_per_call: Annotated[float | None, typer.Option(help="Mean tokens a call; measured with --bench.")] = None,
    currency: Annotated[str, typer.Option(help="Of every amount given here.")] = "USD",
    exchange: Annotated[list[str] | None, typer.Option(help="USD=7.2: one USD is 7.2 of --currency.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="API prices to compare with, by name; all.")] = None,
    prices: Annotated[Path | None, typer.Option(help="A price list of yours, beside the config's.")] = None,
    capacity_for: Annotated[float | None, typer.Option(help="How many GPUs for so many calls a day.")] = None,
    peak_factor: Annotated[float, typer.Option(help="Busiest second over the day's mean.")] = 1.0,
    slo: Annotated[str | None, typer.Option(help="Take the highest measured load that meets it.")] = None,
    vectors: Annotated[int | None, typer.Option(help="Size of an index of so many vectors, by dims.")] = None,
    dims: Annotated[int, typer.Option(help="Full width of those vectors.")] = 2560,
    json: JsonOption = False,
) -> None:
    """Cost per 1,000 calls, per 1M tokens and per month, each step shown; break-even against API prices."""
    with shell("cost", json) as console:
        from qwen3emb_launch import cost as own
        from qwen3emb_launch.cost.money import check_currency
        from qwen3emb_launch.cost.prices import chosen
        from qwen3emb_launch.paths import paths
        from qwen3emb_launch.statistics import parse_slo

        code = check_currency(currency)
        objective = parse_slo(slo) if slo else None
        if objective and not bench:
            raise InvalidInputError("usage", "--slo needs measurements", "--bench FILE of a sweep")
        if prices and not prices.is_file():
            raise InvalidInputError("bad_prices", f"no file {prices}", f"take {own.shipped_prices()} as a model")
        measured = _measured(bench, objective) if bench else None
        per_call = measured.tokens_per_call if measured and tokens_per_call is None else tokens_per_call
        answer = own.cost(
            own.Costs(
                currency=code,
                hardware_price=hardware_price,
                years=years,
                residual=residual,
                gpus=gpus,
                gpu_hour=gpu_hour,
                watts=watts if watts is not None else (measured.watts if measured else None),
                idle_watts=idle_watts,
                overhead=overhead,
                electricity=electricity,
                people_per_month=people_per_month,
                other_per_month=other_per_month,
            ),
            own.Load(
                calls_per_day=calls_per_day,
                capacity=measured.calls_per_s * gpus if measured else None,
                utilisation=utilisation,
                tokens_per_call=per_call,
                texts_per_call=measured.texts_per_call if measured else 1.0,
            ),
        )
        if measured and gpus > 1:
            note = f"{gpus} GPUs are taken as {gpus} times what one measured deployment did"
            answer = replace(answer, warnings=(*answer.warnings, note))
        listed = own.read_prices([own.shipped_prices(), paths().config / "prices.yaml", *([prices] if prices else [])])
        tokens_per_s = measured.calls_per_s * gpus * per_call if measured and per_call else None
        rates = own.exchange_rates(exchange or [], code)
        offers = own.compare(answer, chosen(listed, against or []), rates, per_call, tokens_per_s)
        needed = None
        if capacity_for is not None:
            if not measured:
                raise InvalidInputError("usage", "--capacity-for needs measurements", "--bench FILE")
            needed = own.capacity(capacity_for, measured.calls_per_s, peak_factor)
        sizes = tuple(own.index_sizes(vectors, dims)) if vectors is not None else ()
        report = CostReport(answer, measured, tuple(offers), needed, sizes)
        console.result(report, lambda c: _show(c, report))


def _measured(path: Path, objective: Slo | None) -> Measured:
    """The row of a record that stands for the deployment: the best rate, or the best within the objective."""
    from qwen3emb_launch.bench.record import load, rows_of

    record = load(path)
    rows = [r for r in rows_of(record) if r.figures.requests and r.target == record.targets[0].name]
    if record.mode == "burst":
        rows = [r for r in rows if r.phase == "before"]
    if not rows:
        raise InvalidInputError("bad_record", f"{path} has no right answer to count", "measure again: qwen3emb bench")
    if objective:
        rows = _meeting(path, rows, objective)
    best = max(rows, key=lambda r: r.figures.requests_per_s)
    figures = best.figures
    tokens = figures.tokens_per_s / figures.requests_per_s if figures.tokens_per_s and figures.requests_per_s else None
    return Measured(
        calls_per_s=figures.requests_per_s,
        tokens_per_call=tokens,
        texts_per_call=round(figures.texts_per_s / figures.requests_per_s),  # the seed's rows have batches of their own
        watts=figures.gpu.watts if figures.gpu else None,
        what=f"{path}: {best.phase} at {best.level:g}, {record.created}",
    )


def _meeting(path: Path, rows: list[Row], objective: Slo) -> list[Row]:
    """The rows within the objective. Raises CheckFailedError (`slo_missed`) that says the nearest."""
    from qwen3emb_launch.bench.histogram import LatencyHistogram
    from qwen3emb_launch.bench.modes import nearest_miss

    def misses(row: Row) -> list[str]:
        histogram = LatencyHistogram(row.figures.histogram or None)
        seen = {p: v for p in objective.limits if (v := histogram.at(p)) is not None}
        return objective.misses(seen, row.figures.error_rate)

    kept = [row for row in rows if not misses(row)]
    if not kept:
        near = nearest_miss(rows, objective)
        raise CheckFailedError(
            "slo_missed",
            f"no load of {path} meets {objective}; nearest: {near.phase} at {near.level:g}, {', '.join(misses(near))}",
            "qwen3emb bench --sweep auto with lower loads",
        )
    return kept


def _show(console: Console, report: CostReport) -> None:
    """The steps, then the answers."""
    from qwen3emb_launch.console import size
    from qwen3emb_launch.cost import money
    from qwen3emb_launch.cost.money import plain_number

    answer, code = report.cost, report.cost.currency
    if report.measured:
        console.text(f"measured: {report.measured.what}: {plain_number(report.measured.calls_per_s, 4)} calls/s")

    def value(amount: float, unit: str) -> str:
        head, slash, rest = unit.partition("/")
        return money(amount, code, 4) + slash + rest if head == code else f"{plain_number(amount, 4)} {unit}"

    console.table(("step", "how", "result"), [(s.name, s.how, value(s.value, s.unit)) for s in answer.steps])
    console.text("")
    console.text(f"{money(answer.per_1k_calls, code)} per 1k calls, {money(answer.per_month, code)} a month")
    if answer.left_out:
        console.say(f"left out: {', '.join(answer.left_out)}")
    for warning in answer.warnings:
        console.warn(warning)
    if report.offers:
        console.text("")
        console.table(
            ("API", "1M tokens", "1k calls", "own saves", "break-even tokens/day", "tokens/s", "within reach", "seen"),
            [_offer_cells(o, code) for o in report.offers],
        )
        if any(o.per_million_tokens is None for o in report.offers):
            console.say("prices in another currency: give --exchange, for example --exchange USD=7.2")
        if answer.per_1m_tokens is None:
            console.say("what it saves needs --tokens-per-call (or --bench)")
    if report.capacity:
        need = report.capacity
        console.text("")
        console.text(
            f"{need.calls_per_day:,.0f} calls a day, peak {plain_number(need.peak_rate, 4)}/s, "
            f"{plain_number(need.per_gpu, 4)}/s a GPU: "
            f"{need.gpus} GPU{'s' if need.gpus > 1 else ''}, {need.headroom:.0%} left at the peak"
        )
    if report.storage:
        console.text("")
        console.table(
            ("dims", "float32", "float16", "int8", "float32 with HNSW (M 16)", "of full"),
            [
                (s.dims, *(size(v) for v in (s.float32, s.float16, s.int8, s.hnsw)), f"{s.share:.2%}")
                for s in report.storage
            ],
        )


def _offer_cells(offer: Offer, code: str) -> tuple[str, ...]:
    from qwen3emb_launch.cost import money

    price = offer.price
    stated = money(price.per_million_tokens, price.currency)
    own = (
        stated
        if offer.per_million_tokens is None or price.currency == code
        else (f"{money(offer.per_million_tokens, code)} ({stated})")
    )
    tokens, rate = offer.break_even_tokens_per_day, offer.break_even_tokens_per_s
    return (
        price.name,
        own,
        "-" if offer.per_1k_calls is None else money(offer.per_1k_calls, code),
        "-" if offer.saving is None else f"{offer.saving:.0%}",
        "-" if tokens is None else f"{tokens:,.0f}",
        "-" if rate is None else f"{rate:,.0f}",
        "-" if offer.within_capacity is None else ("yes" if offer.within_capacity else "no"),
        price.seen,
    )
