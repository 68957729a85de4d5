"""Named API prices, dated, and how an own cost compares with them. Other currencies need a rate from the user."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch.cost.arithmetic import SECONDS_A_DAY, Cost
from qwen3emb_launch.cost.money import check_currency
from qwen3emb_launch.errors import InvalidInputError, nearest

SCHEMA = 1
_TEXTS = ("name", "about", "currency", "seen", "source")


@dataclass(frozen=True)
class Price:
    """What a hosted API asks for a million input tokens, when that was seen, and where."""

    name: str
    about: str
    per_million_tokens: float
    currency: str
    seen: str
    source: str


@dataclass(frozen=True)
class Offer:
    """One API against an own cost, in the own currency; None where a rate or the tokens per call are missing.

    `saving` is the share that one's own hardware saves (negative: it costs more). The break-even load is what the
    daily cost would buy there; `within_capacity` says whether the hardware can do it, where that was measured.
    """

    price: Price
    per_million_tokens: float | None
    per_1k_calls: float | None
    saving: float | None
    break_even_tokens_per_day: float | None
    break_even_tokens_per_s: float | None
    break_even_calls_per_day: float | None
    within_capacity: bool | None


def shipped_prices() -> Path:
    """The data file of this package."""
    return Path(__file__).with_name("prices.yaml")


def read_prices(files: Iterable[Path]) -> list[Price]:
    """The prices of all files that exist, a later file's entry in place of an earlier one of the same name.

    Raises InvalidInputError (`bad_prices`) that names the file and the entry.
    """
    import yaml

    found: dict[str, Price] = {}
    for path in files:
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
            raise InvalidInputError("bad_prices", f"{path} cannot be read: {exc}", "is it YAML?") from exc
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("prices"), list):
            raise InvalidInputError(
                "bad_prices", f"{path} is no price list of schema {SCHEMA}", f"take {shipped_prices()} as a model"
            )
        for number, entry in enumerate(data["prices"], 1):
            price = _price(path, number, entry)
            found[price.name] = price
    return list(found.values())


def _price(path: Path, number: int, entry: Any) -> Price:
    def bad(why: str) -> InvalidInputError:
        return InvalidInputError("bad_prices", f"{path}, entry {number}: {why}", f"take {shipped_prices()} as a model")

    if not isinstance(entry, dict):
        raise bad("not a mapping")
    unknown = set(entry) - {*_TEXTS, "per_million_tokens"}
    if unknown:
        raise bad(f"unknown key {', '.join(sorted(map(str, unknown)))}")
    missing = [key for key in (*_TEXTS, "per_million_tokens") if entry.get(key) in (None, "")]
    if missing:
        raise bad(f"{', '.join(missing)} missing: a price without date and source is worth nothing")
    amount = entry["per_million_tokens"]
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < math.inf:
        raise bad(f"per_million_tokens {amount!r} is no amount above 0")
    texts = {key: str(entry[key]) for key in _TEXTS}
    texts["currency"] = check_currency(texts["currency"])
    return Price(per_million_tokens=float(amount), **texts)


def chosen(prices: Sequence[Price], names: Sequence[str]) -> list[Price]:
    """The named ones in that order, or all. Raises InvalidInputError (`unknown_price`) with the nearest name."""
    if not names:
        return list(prices)
    known = {p.name: p for p in prices}
    for name in names:
        if name not in known:
            guess = nearest(name, list(known))
            raise InvalidInputError(
                "unknown_price",
                f"no price {name!r}: {', '.join(known)}",
                f"did you mean {guess!r}?" if guess else "add it to prices.yaml in the config folder",
            )
    return [known[name] for name in names]


def exchange_rates(given: Iterable[str], currency: str) -> dict[str, float]:
    """`USD=7.2` as one US dollar is 7.2 of `currency`. Raises InvalidInputError (`bad_rate`)."""
    rates = {currency: 1.0}
    for text in given:
        code, _, value = text.partition("=")
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            raise InvalidInputError(
                "bad_rate", f"no exchange rate {text!r}", f"--exchange USD=7.2: 1 USD is 7.2 {currency}"
            )
        rates[check_currency(code)] = rate
    return rates


def compare(
    own: Cost,
    prices: Iterable[Price],
    rates: Mapping[str, float],
    tokens_per_call: float | None,
    capacity_tokens_per_s: float | None = None,
) -> list[Offer]:
    """Each price against the own cost, cheapest first; prices in a currency without a rate last."""
    offers = [_offer(own, price, rates.get(price.currency), tokens_per_call, capacity_tokens_per_s) for price in prices]
    return sorted(
        offers, key=lambda o: (o.per_million_tokens is None, o.per_million_tokens or o.price.per_million_tokens)
    )


def _offer(own: Cost, price: Price, rate: float | None, tokens_per_call: float | None, capacity: float | None) -> Offer:
    if rate is None:
        return Offer(price, None, None, None, None, None, None, None)
    million = price.per_million_tokens * rate
    tokens = own.per_day / million * 1e6
    per_second = tokens / SECONDS_A_DAY
    return Offer(
        price=price,
        per_million_tokens=million,
        per_1k_calls=million * tokens_per_call / 1000 if tokens_per_call else None,
        saving=None if own.per_1m_tokens is None else 1 - own.per_1m_tokens / million,
        break_even_tokens_per_day=tokens,
        break_even_tokens_per_s=per_second,
        break_even_calls_per_day=tokens / tokens_per_call if tokens_per_call else None,
        within_capacity=None if capacity is None else per_second <= capacity,
    )
