"""From what hardware, power and people cost to cost per call, per token and per month; and how many GPUs a load needs.

A day has 24 hours and the machine runs all of them, busy or not; a year has 365 days, a month a twelfth of a year.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from qwen3emb_launch.cost.money import money, plain_number
from qwen3emb_launch.errors import InvalidInputError

DAYS_A_YEAR = 365
DAYS_A_MONTH = DAYS_A_YEAR / 12
SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Costs:
    """What is paid. None is not given, and then left out by name.

    `hardware_price` and `gpu_hour` are a GPU's; `watts` is what one GPU draws when busy, `idle_watts` when not;
    `overhead` multiplies power (cooling, the rest of the machine). Per month: people, and anything else.
    """

    currency: str
    hardware_price: float | None = None
    years: float = 3.0
    residual: float = 0.0
    gpus: int = 1
    gpu_hour: float | None = None
    watts: float | None = None
    idle_watts: float | None = None
    overhead: float = 1.0
    electricity: float | None = None
    people_per_month: float | None = None
    other_per_month: float | None = None

    def check(self) -> None:
        """Raise InvalidInputError (`bad_cost`) for negative or impossible values, and when nothing is paid at all."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, (int, float)) and (value < 0 or not math.isfinite(value)):
                raise InvalidInputError("bad_cost", f"{item.name} {value}: 0 or more", "qwen3emb cost --help")
        if self.years <= 0 or self.gpus < 1 or self.overhead < 1:
            raise InvalidInputError(
                "bad_cost",
                f"years {self.years:g}, gpus {self.gpus}, overhead {self.overhead:g}: above 0, 1 or more, 1 or more",
                "qwen3emb cost --help",
            )
        if self.hardware_price is not None and self.residual > self.hardware_price:
            raise InvalidInputError(
                "bad_cost", f"residual {self.residual:g} is above the price {self.hardware_price:g}", "lower --residual"
            )
        paid = (self.hardware_price, self.gpu_hour, self.people_per_month, self.other_per_month)
        if all(p is None for p in paid) and (self.watts is None or self.electricity is None):
            raise InvalidInputError(
                "no_costs",
                "nothing to add up: no hardware price, no GPU hour, no power with its price",
                "for example --hardware-price 5800 --watts 350 --electricity 0.6",
            )


@dataclass(frozen=True)
class Load:
    """What is done with it. `calls_per_day` really served; `capacity` calls/s that all GPUs together can do.

    `utilisation` is the share of the day they are busy; from capacity and calls it follows.
    """

    calls_per_day: float | None = None
    capacity: float | None = None
    utilisation: float | None = None
    tokens_per_call: float | None = None
    texts_per_call: float = 1.0


@dataclass(frozen=True)
class Step:
    """One line of the calculation: what, how, and the value in its unit."""

    name: str
    how: str
    value: float
    unit: str


@dataclass(frozen=True)
class Cost:
    """The answer. Amounts are in `currency`; None where tokens per call are not known."""

    currency: str
    steps: tuple[Step, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    calls_per_day: float
    utilisation: float | None
    per_day: float
    per_month: float
    per_call: float
    per_1k_calls: float
    per_1k_texts: float
    per_1m_tokens: float | None


def cost(costs: Costs, load: Load) -> Cost:
    """Add it up, step by step. Raises InvalidInputError (`bad_cost`, `no_costs`, `bad_load`)."""
    costs.check()
    calls, utilisation, warnings = _calls(load)
    steps: list[Step] = []
    left_out: list[str] = []
    code = costs.currency
    per_day = 0.0

    def add(name: str, how: str, value: float) -> None:
        nonlocal per_day
        per_day += value
        steps.append(Step(name, how, value, f"{code}/day"))

    if costs.hardware_price is not None:
        price = costs.hardware_price - costs.residual
        what = money(costs.hardware_price, code) + (f" - {money(costs.residual, code)}" if costs.residual else "")
        what = f"({what})" if costs.residual else what
        add(
            "depreciation",
            f"{costs.gpus} x {what} / ({costs.years:g} years x {DAYS_A_YEAR} days)",
            costs.gpus * price / (costs.years * DAYS_A_YEAR),
        )
    if costs.gpu_hour is not None:
        add("rent", f"{costs.gpus} x {money(costs.gpu_hour, code)} x 24 h", costs.gpus * costs.gpu_hour * 24)
    if costs.hardware_price is None and costs.gpu_hour is None:
        left_out.append("hardware (--hardware-price or --gpu-hour)")
    if costs.watts is not None and costs.electricity is not None:
        energy = _energy(costs, costs.watts, utilisation)
        steps.append(energy)
        how = f"{energy.value:.4g} kWh x {money(costs.electricity, code)}"
        add("electricity", how, energy.value * costs.electricity)
        if costs.idle_watts is None and utilisation is not None and utilisation < 1:
            warnings.append(f"{costs.watts:.4g} W are counted all day, busy or not: give --idle-watts")
    elif costs.gpu_hour is None:  # rented hardware brings its power
        left_out.append("electricity (--watts and --electricity)")
    for name, monthly, flag in (
        ("people", costs.people_per_month, "--people-per-month"),
        ("other", costs.other_per_month, None),
    ):
        if monthly is not None:
            add(name, f"{money(monthly, code)}/month / {DAYS_A_MONTH:.4g} days", monthly / DAYS_A_MONTH)
        elif flag:
            left_out.append(f"{name} ({flag})")
    per_call = per_day / calls
    steps += [
        Step("a day", "the sum", per_day, f"{code}/day"),
        Step("a month", f"x {DAYS_A_MONTH:.4g} days", per_day * DAYS_A_MONTH, f"{code}/month"),
        Step("a call", f"{money(per_day, code, 4)} / {calls:,.0f} calls", per_call, code),
        Step("1,000 calls", "x 1,000", per_call * 1000, code),
    ]
    per_million = None
    if load.texts_per_call != 1:
        texts = load.texts_per_call
        steps.append(Step("1,000 texts", f"/ {texts:g} texts a call", per_call * 1000 / texts, code))
    if load.tokens_per_call:
        per_million = per_call / load.tokens_per_call * 1e6
        how = f"{money(per_call, code, 4)} / {plain_number(load.tokens_per_call)} tokens a call x 1,000,000"
        steps.append(Step("1M tokens", how, per_million, code))
    return Cost(
        currency=code,
        steps=tuple(steps),
        left_out=tuple(left_out),
        warnings=tuple(warnings),
        calls_per_day=calls,
        utilisation=utilisation,
        per_day=per_day,
        per_month=per_day * DAYS_A_MONTH,
        per_call=per_call,
        per_1k_calls=per_call * 1000,
        per_1k_texts=per_call * 1000 / load.texts_per_call,
        per_1m_tokens=per_million,
    )


def _calls(load: Load) -> tuple[float, float | None, list[str]]:
    """(calls a day, utilisation, warnings): two of calls, capacity and utilisation give the third."""
    for name in ("calls_per_day", "capacity", "tokens_per_call", "texts_per_call"):
        value = getattr(load, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidInputError("bad_load", f"{name} {value}: above 0", "qwen3emb cost --help")
    if load.utilisation is not None and not 0 < load.utilisation <= 1:
        raise InvalidInputError("bad_load", f"utilisation {load.utilisation}: above 0, at most 1", "for example 0.3")
    warnings: list[str] = []
    if load.calls_per_day is not None:
        if load.capacity is None:
            return load.calls_per_day, load.utilisation, warnings
        needed = load.calls_per_day / (load.capacity * SECONDS_A_DAY)
        if needed > 1:
            raise InvalidInputError(
                "bad_load",
                f"{load.calls_per_day:,.0f} calls a day are {needed:.2f} times what was measured "
                f"({load.capacity * SECONDS_A_DAY:,.0f} a day)",
                "more --gpus, or fewer --calls-per-day",
            )
        return load.calls_per_day, needed, warnings
    if load.capacity is None:
        raise InvalidInputError(
            "bad_load", "no load: how many calls a day?", "--calls-per-day N, or --bench FILE with --utilisation"
        )
    if load.utilisation is None:
        warnings.append("busy every second of the day (utilisation 1): real loads are not; give --utilisation")
    share = load.utilisation or 1.0
    return load.capacity * SECONDS_A_DAY * share, share, warnings


def _energy(costs: Costs, watts: float, utilisation: float | None) -> Step:
    """Energy of a day in kWh."""
    how = f"{watts:g} W"
    if costs.idle_watts is not None and utilisation is not None and utilisation < 1:
        how = f"({watts:g} W x {utilisation:.0%} + {costs.idle_watts:g} W idle x {1 - utilisation:.0%})"
        watts = costs.idle_watts + (watts - costs.idle_watts) * utilisation
    overhead = f" x {costs.overhead:g}" if costs.overhead != 1 else ""
    energy = costs.gpus * watts * costs.overhead * 24 / 1000
    return Step("energy", f"{costs.gpus} x {how}{overhead} x 24 h", energy, "kWh/day")


@dataclass(frozen=True)
class Capacity:
    """How many GPUs a daily load needs. Rates are calls/s; `per_gpu` is what one does within the objective."""

    calls_per_day: float
    peak_factor: float
    peak_rate: float
    per_gpu: float
    gpus: int
    headroom: float


def capacity(calls_per_day: float, per_gpu: float, peak_factor: float = 1.0) -> Capacity:
    """GPUs for `calls_per_day` when one does `per_gpu` calls/s within the objective.

    `peak_factor` is the busiest second's rate over the day's mean; 1 is a flat day. `headroom` is the share of the
    GPUs' rate left at the peak. Raises InvalidInputError (`bad_load`).
    """
    if not (0 < calls_per_day < math.inf and 0 < per_gpu < math.inf and 1 <= peak_factor < math.inf):
        raise InvalidInputError(
            "bad_load",
            f"{calls_per_day:g} calls a day, {per_gpu:g} calls/s a GPU, peak factor {peak_factor:g}: all above 0, the "
            "factor 1 or more",
            "qwen3emb cost --help",
        )
    rate = calls_per_day / SECONDS_A_DAY * peak_factor
    gpus = math.ceil(rate / per_gpu - 1e-9)
    gpus = max(1, gpus)
    return Capacity(calls_per_day, peak_factor, rate, per_gpu, gpus, 1 - rate / (gpus * per_gpu))
