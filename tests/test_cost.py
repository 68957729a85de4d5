"""The arithmetic of cost: the seed's own inputs, every step, API prices and their data file, storage, capacity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3emb_launch.cli.app import run
from qwen3emb_launch.cost import Costs, Load, capacity, compare, cost, index_sizes, money, read_prices, shipped_prices
from qwen3emb_launch.cost.prices import chosen, exchange_rates
from qwen3emb_launch.errors import InvalidInputError

SEED = Costs(currency="CNY", hardware_price=5800, years=3, watts=350, electricity=0.6)
SEED_ARGS = [
    "cost", "--hardware-price", "5800", "--years", "3", "--watts", "350", "--electricity", "0.6",
    "--calls-per-day", "240000", "--currency", "CNY",
]  # fmt: skip

RECORDS = Path(__file__).parents[1] / "docs/benchmarks/h100-user-2026-11-22"
RECORD_ARGS = ["cost", "--bench", str(RECORDS / "bench.json"), "--gpu-hour", "2.5"]


def test_the_seeds_inputs_give_the_right_answer() -> None:
    """¥10.34 a day over 240,000 calls is ¥0.0431 per 1,000, not ¥0.00028."""
    found = cost(SEED, Load(calls_per_day=240_000))
    by_name = {s.name: s for s in found.steps}
    assert by_name["depreciation"].value == pytest.approx(5800 / 1095)
    assert by_name["energy"].value == pytest.approx(8.4)
    assert by_name["electricity"].value == pytest.approx(5.04)
    assert found.per_day == pytest.approx(10.3368, abs=1e-4)
    assert found.per_1k_calls == pytest.approx(0.04307, abs=1e-5)
    assert money(found.per_1k_calls, "CNY") == "¥0.0431"
    assert cost(SEED, Load(calls_per_day=50_000)).per_1k_calls == pytest.approx(0.207, abs=5e-4)


def test_the_command_prints_the_answer_and_each_step(capsys) -> None:
    """The table has every step with its numbers, the last line the answer."""
    assert run(SEED_ARGS) == 0
    out = capsys.readouterr().out
    assert "¥0.0431 per 1k calls" in out
    for part in ("¥5.297/day", "8.4 kWh x ¥0.600", "¥5.040/day", "¥10.34/day", "240,000 calls"):
        assert part in out
    assert "0.00028" not in out


def test_break_even_at_half_a_yuan_per_million_tokens() -> None:
    """20.7M tokens a day, 239 a second, is where the seed's card pays against ¥0.5 per 1M tokens."""
    own = cost(SEED, Load(calls_per_day=240_000))
    prices = read_prices([shipped_prices()])
    offer = compare(own, chosen(prices, ["dashscope-v4"]), {"CNY": 1.0}, None, capacity_tokens_per_s=300)[0]
    assert offer.break_even_tokens_per_day == pytest.approx(20.67e6, rel=1e-3)
    assert offer.break_even_tokens_per_s == pytest.approx(239, abs=1)
    assert offer.within_capacity is True
    assert offer.saving is None


@pytest.mark.parametrize(
    ("costs", "load", "per_day"),
    [
        (Costs("USD", gpu_hour=2.5), Load(calls_per_day=1000), 60.0),
        (Costs("USD", gpu_hour=2.5, gpus=2), Load(calls_per_day=1000), 120.0),
        (Costs("USD", hardware_price=1095, residual=95, years=1), Load(calls_per_day=1), 1000 / 365),
        (Costs("USD", watts=1000, electricity=0.5, overhead=1.5), Load(calls_per_day=1), 18.0),
        (Costs("USD", watts=500, idle_watts=100, electricity=1), Load(capacity=10, utilisation=0.25), 4.8),
        (Costs("USD", people_per_month=365), Load(calls_per_day=1), 12.0),
        (Costs("USD", other_per_month=365 / 12, gpu_hour=1), Load(calls_per_day=1), 25.0),
    ],
)
def test_every_cost_adds_up(costs, load, per_day) -> None:
    """Each kind of cost by itself, per day."""
    assert cost(costs, load).per_day == pytest.approx(per_day)


def test_throughput_and_utilisation_make_the_calls() -> None:
    """A measured rate at 30% of the day; texts and tokens follow from the call."""
    found = cost(Costs("USD", gpu_hour=1), Load(capacity=100, utilisation=0.3, tokens_per_call=500, texts_per_call=10))
    assert found.calls_per_day == pytest.approx(100 * 86400 * 0.3)
    assert found.per_1k_texts == pytest.approx(found.per_1k_calls / 10)
    assert found.per_1m_tokens == pytest.approx(24 / (100 * 86400 * 0.3 * 500) * 1e6)
    assert not found.warnings


def test_a_record_gives_rate_tokens_and_power(capsys) -> None:
    """The best row's, by hand: 1,329 calls/s of 33 tokens at 567 W, busy 30% of the day."""
    words = ["--utilisation", "0.3", "--hardware-price", "30000", "--electricity", "0.3", "--idle-watts", "70"]
    assert run(["cost", *RECORD_ARGS[1:3], *words, "--capacity-for", "5e8", "--peak-factor", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    calls, tokens, watts = 1329.1248527, 33, 567.0220458
    day = 30000 / 1095 + (70 + 0.3 * (watts - 70)) * 24 / 1000 * 0.3
    assert found["cost"]["per_1k_calls"] == pytest.approx(day / (calls * 86400 * 0.3) * 1000)
    assert found["cost"]["per_1m_tokens"] == pytest.approx(day / (calls * tokens * 86400 * 0.3) * 1e6)
    assert found["capacity"]["gpus"] == 14  # 17,361 a second at the peak
    assert run([*RECORD_ARGS, "--capacity-for", "5e8", "--peak-factor", "3"]) == 0
    assert "500,000,000 calls a day, peak 17,361/s, 1,329/s a GPU: 14 GPUs, 7% left" in capsys.readouterr().out


def test_a_record_without_a_load_within_the_objective_says_the_nearest(capsys) -> None:
    """The percentile that is missed, with what was seen."""
    assert run([*RECORD_ARGS, "--slo", "p95=70ms,p99=50ms", "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "slo_missed"
    assert error["message"].endswith("nearest: steady at 64, p99 71.94 ms > 50 ms")


def test_texts_a_call_are_those_of_the_row_that_counts(tmp_path: Path, capsys) -> None:
    """The seed's rows have batches of their own, whatever --batch was: the best is one text a call."""
    record = json.loads((RECORDS / "seed.json").read_text())
    record["load"]["batch"] = 8
    (tmp_path / "seed.json").write_text(json.dumps(record))
    assert run(["cost", "--bench", str(tmp_path / "seed.json"), "--gpu-hour", "2.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["measured"]["texts_per_call"] == 1


def test_a_load_beyond_what_was_measured_is_refused() -> None:
    """More calls than the hardware can do is no cheap call but an error with both numbers."""
    with pytest.raises(InvalidInputError, match=r"2\.00 times what was measured") as caught:
        cost(Costs("USD", gpu_hour=1), Load(calls_per_day=2 * 86400, capacity=1))
    assert caught.value.code == "bad_load"


def test_what_is_not_given_is_left_out_by_name_and_full_load_is_said() -> None:
    """No silent zero: the answer names what it lacks."""
    found = cost(Costs("USD", hardware_price=1000), Load(capacity=1))
    assert [x.split()[0] for x in found.left_out] == ["electricity", "people"]
    assert "utilisation 1" in found.warnings[0]
    idle = cost(Costs("USD", watts=500, electricity=1), Load(capacity=10, utilisation=0.25))
    assert idle.per_day == 12.0
    assert idle.warnings == ("500 W are counted all day, busy or not: give --idle-watts",)


@pytest.mark.parametrize(
    ("costs", "load"),
    [
        (Costs("USD"), Load(calls_per_day=1)),
        (Costs("USD", watts=300), Load(calls_per_day=1)),
        (Costs("USD", hardware_price=-1), Load(calls_per_day=1)),
        (Costs("USD", hardware_price=1, years=0), Load(calls_per_day=1)),
        (Costs("USD", hardware_price=1, residual=2), Load(calls_per_day=1)),
        (Costs("USD", gpu_hour=float("nan")), Load(calls_per_day=1)),
        (Costs("USD", gpu_hour=1), Load()),
        (Costs("USD", gpu_hour=1), Load(calls_per_day=0)),
        (Costs("USD", gpu_hour=1), Load(capacity=1, utilisation=1.5)),
    ],
)
def test_impossible_inputs_are_refused(costs, load) -> None:
    """Nothing to add up, negatives, NaN, no load: exit 2 with a hint."""
    with pytest.raises(InvalidInputError) as caught:
        cost(costs, load)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("calls", "rate", "peak", "gpus"), [(86400, 1, 1, 1), (86400, 1, 3, 3), (5e6, 20, 2, 6), (1, 100, 1, 1)]
)
def test_gpus_for_a_daily_load(calls, rate, peak, gpus) -> None:
    """Rate at the peak over a GPU's rate, rounded up; an exact fit needs no further one."""
    found = capacity(calls, rate, peak)
    assert found.gpus == gpus
    assert 0 <= found.headroom <= 1


def test_index_sizes_fall_with_the_dimensions() -> None:
    """128 instead of 2048 dimensions is 93.75% less, not 87%."""
    sizes = {s.dims: s for s in index_sizes(10_000_000, full=2048)}
    assert sizes[128].float32 == 10_000_000 * 512
    assert 1 - sizes[128].float32 / sizes[2048].float32 == pytest.approx(0.9375)
    assert sizes[128].int8 * 4 == sizes[128].float32 < sizes[128].hnsw
    assert 2560 not in sizes


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0.0431, "¥0.0431"),
        (0.0000431, "¥0.0000431"),
        (0, "¥0"),
        (1234567, "¥1,234,567"),
        (9.999, "¥10.00"),
        (-2, "-¥2.00"),
    ],
)
def test_money_has_no_exponent(amount, text) -> None:
    """Three significant digits at any size."""
    assert money(amount, "CNY") == text


def test_shipped_prices_are_dated_and_sourced() -> None:
    """Every entry says when and where it was seen."""
    prices = read_prices([shipped_prices()])
    assert len(prices) >= 10
    assert all(p.seen and p.source and p.per_million_tokens > 0 for p in prices)
    assert {p.currency for p in prices} == {"CNY", "USD"}


def test_the_users_prices_win_and_others_need_a_rate(own_folders: Path, capsys) -> None:
    """config/prices.yaml adds and replaces; a currency without a rate is shown, not converted."""
    folder = own_folders / "config"
    folder.mkdir()
    entry = "about: x\n    currency: {c}\n    seen: 2026-11\n    source: me\n    per_million_tokens: {p}"
    (folder / "prices.yaml").write_text(
        "schema: 1\nprices:\n"
        f"  - name: mine\n    {entry.format(c='EUR', p=1)}\n"
        f"  - name: dashscope-v4\n    {entry.format(c='CNY', p=2)}\n",
        encoding="utf-8",
    )
    args = [*SEED_ARGS, "--tokens-per-call", "100", "--against", "mine", "--against", "dashscope-v4", "--json"]
    assert run(args) == 0
    offers = {o["price"]["name"]: o for o in json.loads(capsys.readouterr().out)["result"]["offers"]}
    assert offers["mine"]["per_million_tokens"] is None
    assert offers["dashscope-v4"]["per_million_tokens"] == 2
    assert run([*args, "--exchange", "EUR=8"]) == 0
    offers = {o["price"]["name"]: o for o in json.loads(capsys.readouterr().out)["result"]["offers"]}
    assert offers["mine"]["per_1k_calls"] == pytest.approx(8 * 100 / 1000)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2",
        "schema: 2\nprices: []",
        "schema: 1\nprices: [3]",
        "schema: 1\nprices: [{name: a}]",
        "schema: 1\nprices: [{name: a, about: b, currency: USD, seen: x, source: y, per_million_tokens: -1}]",
        "schema: 1\nprices: [{name: a, about: b, currency: USD, seen: x, source: y, per_million_tokens: 1, z: 1}]",
    ],
)
def test_a_broken_price_list_is_named(tmp_path: Path, text) -> None:
    """File and entry are in the message."""
    path = tmp_path / "prices.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"prices\.yaml"):
        read_prices([path])


@pytest.mark.parametrize("text", ["USD", "USD=0", "USD=x", "US=1"])
def test_a_bad_exchange_rate_is_refused(text) -> None:
    """A rate is a code and a positive number."""
    with pytest.raises(InvalidInputError):
        exchange_rates([text], "CNY")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["cost"], "no_costs"),
        (["cost", "--gpu-hour", "1", "--currency", "yuan", "--calls-per-day", "1"], "bad_currency"),
        ([*SEED_ARGS, "--against", "dashscop"], "unknown_price"),
        ([*SEED_ARGS, "--slo", "p95=1ms"], "usage"),
        ([*SEED_ARGS, "--capacity-for", "100"], "usage"),
        ([*SEED_ARGS, "--prices", "/nowhere.yaml"], "bad_prices"),
        ([*SEED_ARGS, "--bench", "/nowhere.json"], "no_record"),
        ([*RECORD_ARGS, "--capacity-for", "nan"], "bad_load"),
        ([*RECORD_ARGS, "--capacity-for", "inf"], "bad_load"),
        ([*RECORD_ARGS, "--capacity-for", "1", "--peak-factor", "nan"], "bad_load"),
        ([*RECORD_ARGS, "--tokens-per-call", "0"], "bad_load"),
    ],
)
def test_bad_input_exits_2_with_an_envelope(args, code, capsys) -> None:
    """A stable code and a hint, nothing computed."""
    assert run([*args, "--json"]) == 2
    envelope = json.loads(capsys.readouterr().out)
    assert envelope["error"]["code"] == code
    assert envelope["error"]["hint"]
