"""Amounts for people: significant digits without exponents, and the currency's own sign."""

from __future__ import annotations

import math
import re

from qwen3emb_launch.errors import InvalidInputError

SIGNS = {"CNY": "¥", "USD": "$", "EUR": "€", "GBP": "£", "INR": "₹", "KRW": "₩"}  # JPY shares ¥ and is spelled out


def money(amount: float, currency: str, digits: int = 3) -> str:
    """`¥0.0431`, `$1,234`, `JPY 0.52`. Large amounts keep their whole units."""
    sign = SIGNS.get(currency, f"{currency} ")
    return f"{'-' if amount < 0 else ''}{sign}{plain_number(abs(amount), digits)}"


def plain_number(value: float, digits: int = 3) -> str:
    """That many significant digits without an exponent, whole units never cut off."""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def check_currency(text: str) -> str:
    """A three-letter code in capitals. Raises InvalidInputError (`bad_currency`)."""
    code = text.strip().upper()
    if not re.fullmatch(r"[A-Z]{3}", code):
        raise InvalidInputError("bad_currency", f"no currency {text!r}", "a three-letter code: CNY, USD, EUR")
    return code
