"""What is worth trying: settings that move an embedding server's speed, derived from a plan, each with its reason.

A row of `ROWS` says which setting, for which goals, how much is expected of it, and which values differ from what the
plan has. Whether a value goes together with the rest is the planner's to say; nothing here repeats its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.planning.ledger import setting_keys
from qwen3emb_launch.tune.objective import Goal

LARGEST_FILE = 64 * 1024  # characters
Counted = Literal["texts", "tokens"]
TEXTS_OF_A_BATCH = "prefill_max_requests"
PAST_LARGEST_GRAPH = (5280, 6336, 8448)  # tokens; 128 texts of 33, the planner's largest, are 4224


@dataclass(frozen=True)
class Factor:
    """One setting and the values to try instead of the plan's. `gain` orders: the most promising first.

    `limits` says of what a batch holds at most so many, and `present` how many by the baseline.
    """

    key: str
    values: tuple[str, ...]
    reason: str
    gain: int = 0
    changes_vectors: bool = False
    limits: Counted | None = None
    present: int | None = None

    def unreached(self, value: str, most: Mapping[str, float]) -> str:
        """Why a load with so many texts and tokens at a time cannot tell the value from the baseline's, if it cannot.

        A list of sizes limits by its largest.
        """
        if self.limits is None or self.present is None or self.limits not in most:
            return ""
        limit, seen = min(self.present, int(value.split()[-1])), most[self.limits]
        return f"no batch of this load passes {limit:,} {self.limits} ({seen:,.0f} at most)" if seen <= limit else ""


@dataclass(frozen=True)
class Space:
    """The factors in the order they are tried, and what was left out with its reason."""

    factors: tuple[Factor, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)


def in_order(factors: Sequence[Factor]) -> list[tuple[Factor, str]]:
    """Each value with its setting, the most promising first; a further value of a setting is expected to give less.

    A user's own space has no expected gains and stays as it was written.
    """
    pairs = [(f, v, f.gain - n if f.gain else 0) for f in factors for n, v in enumerate(f.values)]
    return [(f, v) for f, v, _ in sorted(pairs, key=lambda pair: -pair[2])]


@dataclass(frozen=True)
class View:
    """What a row looks at: the baseline's plan, and the load that will be put on it."""

    plan: LaunchPlan
    texts_per_request: int = 1
    clients: float = 1
    cores: int = 1

    @property
    def cuda(self) -> bool:
        """Whether the engine runs on a GPU."""
        return self.plan.engine.flavour == "cuda"

    def value(self, key: str) -> Any:
        """What the baseline has, None when it was left to the engine."""
        return self.plan.setting(key)

    def others(self, key: str, *values: object) -> tuple[str, ...]:
        """The values that the baseline does not have already, as `--set` takes them."""
        present = word(self.value(key))
        return tuple(w for w in map(word, values) if w != present)


def word(value: object) -> str:
    """A value as `--set KEY=VALUE` takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return "null" if value is None else str(value)


@dataclass(frozen=True)
class Row:
    """One setting. `gains` by goal, 3 is much; a goal that is not there has nothing to expect of it.

    `limits` as in Factor; for memory such a setting matters whether it is reached or not.
    """

    key: str
    gains: Mapping[Goal, int]
    values: Callable[[View], tuple[str, ...]]
    reason: str
    changes_vectors: bool = False
    limits: Counted | None = None


def _sizes(view: View) -> tuple[str, ...]:
    sizes = view.value("prefill_graph_sizes")
    if not sizes:
        return ()
    wider = tuple(s for s in PAST_LARGEST_GRAPH if s > max(sizes) and s <= view.plan.context_length)
    return (word((*sizes, *wider)),) if wider else ()


def _graph_requests(view: View) -> tuple[str, ...]:
    present = view.value("prefill_graph_requests")
    return (str(2 * present - 1),) if isinstance(present, int) else ()


def _half(key: str) -> Callable[[View], tuple[str, ...]]:
    def values(view: View) -> tuple[str, ...]:
        present = view.value(key)
        return (str(present // 2),) if isinstance(present, int) and present > 1 else ()

    return values


def _half_and_double(key: str, *, least: int, most: int) -> Callable[[View], tuple[str, ...]]:
    def values(view: View) -> tuple[str, ...]:
        present = view.value(key)
        if not isinstance(present, int):
            return ()
        return tuple(str(v) for v in (present * 2, present // 2) if least <= v <= most)

    return values


def _workers(view: View) -> tuple[str, ...]:
    present = view.value("gateway.workers")
    wanted = 2 * present if isinstance(present, int) else 0
    return (str(wanted),) if view.cuda and view.clients >= 128 and 0 < wanted <= view.cores // 2 else ()


def _backends(view: View) -> tuple[str, ...]:
    if not view.cuda or view.value("kv_pool") == "none":
        return ()  # without a pool FlashAttention 3 is the only one there is
    known = view.plan.engine.flags.get("--attention-backend")
    wanted = [b for b in ("fa3", "flashinfer", "trtllm_mha", "triton") if not known or b in known.choices]
    return view.others("attention_backend", *wanted)


def _threads(view: View) -> tuple[str, ...]:
    return () if view.cuda or view.cores < 2 else view.others("env.OMP_NUM_THREADS", view.cores // 2)


def _fraction(view: View) -> tuple[str, ...]:
    given = next((s for s in view.plan.settings if s.key == "mem_fraction_static"), None)
    return ("null",) if given and given.origin in ("profile", "env") else ()


T, L, M, C = Goal.THROUGHPUT, Goal.LATENCY, Goal.MEMORY, Goal.COST

ROWS: tuple[Row, ...] = (
    Row(
        "prefill_graph_backend",
        {T: 3, L: 3, C: 3},
        lambda v: v.others("prefill_graph_backend", "full") if v.value("prefill_graphs") else (),
        "`full` replays one CUDA graph a batch, `breakable` launches attention from Python between its pieces",
    ),
    Row(
        "prefill_graph_backend",
        {T: 1, M: 1, C: 1},
        lambda v: ("breakable",) if v.value("prefill_graphs") and v.value("prefill_graph_backend") == "full" else (),
        "`breakable` takes batches of any number of requests and captures less",
    ),
    Row(
        "replicas",
        {T: 3, C: 3},
        lambda v: v.others("replicas", 2, 3) if v.cuda else (),
        "one engine leaves the GPU idle while its CPU side works on the next batch; another fills the gaps",
    ),
    Row(
        "batch_tokenize",
        {T: 2, L: 1, C: 2},
        lambda v: v.others("batch_tokenize", "singles", "lists") if v.texts_per_request == 1 else (),
        "`singles` tokenises many requests of one text by one call, `lists` the texts of one request",
    ),
    Row(
        TEXTS_OF_A_BATCH,
        {T: 2, C: 2},
        _half(TEXTS_OF_A_BATCH),
        "smaller batches are answered sooner, and the next is made ready meanwhile; larger ones fill the GPU better",
        limits="texts",
    ),
    Row(
        "prefill_graph_sizes",
        {T: 1, C: 1},
        _sizes,
        "batches past the largest captured size are launched kernel by kernel; more sizes cost start time and memory",
        limits="tokens",
    ),
    Row(
        "prefill_graph_requests",
        {T: 1, C: 1},
        _graph_requests,
        "room for more short texts in a batch, which runs with a graph if its tokens have one",
        limits="texts",
    ),
    Row(
        "max_prefill_tokens",
        {T: 2, M: 2, C: 2, L: 1},
        _half_and_double("max_prefill_tokens", least=1024, most=65536),
        "wider batches fill the GPU, narrower ones let a short text go sooner and hold less memory",
        limits="tokens",
    ),
    Row(
        "max_running_requests",
        {T: 1, M: 2, C: 1},
        _half_and_double("max_running_requests", least=32, most=4096),
        "texts of one batch at most; each reserves a row of positions",
        limits="texts",
    ),
    Row(
        "overlap_schedule",
        {T: 1, L: 2, C: 1},
        lambda v: v.others("overlap_schedule", False),
        "preparing the next batch while one runs pays under load and delays a single request",
    ),
    Row(
        "sleep_on_idle",
        {L: 2, T: 1, C: 1},
        lambda v: v.others("sleep_on_idle", False),
        "a scheduler that polls answers sooner after a pause, for a CPU core that is never idle",
    ),
    Row(
        "gateway.enabled",
        {L: 1, T: 1, C: 1},
        lambda v: v.others("gateway.enabled", False, True),
        "the gateway merges requests into fuller calls, and is one more hop",
    ),
    Row(
        "gateway.workers",
        {T: 1, C: 1},
        _workers,
        "one process of the gateway answers some thousand texts a second",
    ),
    Row(
        "kv_pool",
        {M: 3, T: 1, C: 1},
        lambda v: v.others("kv_pool", "none") if v.cuda else (),
        "an embedding needs no keys and values of earlier steps",
    ),
    Row(
        "mem_fraction_static",
        {M: 3},
        _fraction,
        "the planner asks for what weights and pool need, not for a share of the card",
    ),
    Row(
        "kv_cache_dtype",
        {M: 2, T: 1},
        lambda v: v.others("kv_cache_dtype", "fp8_e4m3") if v.cuda and v.value("kv_pool") == "full" else (),
        "half the pool; a text's own keys and values pass through it",
        changes_vectors=True,
    ),
    Row(
        "attention_backend",
        {T: 1, L: 1, C: 1},
        _backends,
        "kernels differ by GPU and length",
    ),
    Row(
        "prefill_graphs",
        {M: 1},
        lambda v: v.others("prefill_graphs", False) if v.value("prefill_graphs") else (),
        "captured graphs hold memory and take their time at start",
    ),
    Row(
        "tokenizer_workers",
        {T: 1, C: 1},
        lambda v: v.others("tokenizer_workers", 2) if v.cuda else (),
        "tokenising on several cores, where the release can",
    ),
    Row(
        "env.OMP_NUM_THREADS",
        {T: 1, L: 1, C: 1},
        _threads,
        "the model's threads leave no core to the HTTP and tokenizer process",
    ),
    Row(
        "quantization",
        {T: 3, L: 2, M: 3, C: 3},
        lambda v: v.others("quantization", "fp8") if v.cuda else (),
        "half the weights to read, twice the arithmetic from compute capability 8.9 on",
        changes_vectors=True,
    ),
    Row(
        "dtype",
        {T: 1, L: 1, C: 1},
        lambda v: () if v.cuda else v.others("dtype", "float32"),
        "a CPU without bfloat16 arithmetic computes float32 faster",
        changes_vectors=True,
    ),
)


def derive(view: View, goal: Goal, *, given: Sequence[str] = (), vectors_may_change: bool = False) -> Space:
    """The space for a goal. Settings that the user gave are fixed; what `up` does not have is not tried."""
    known = set(setting_keys())
    factors: list[Factor] = []
    left_out: dict[str, str] = {}
    for row in ROWS:
        gain = row.gains.get(goal)
        if gain is None or (row.key not in known and not row.key.startswith("env.")):
            continue
        values = row.values(view)
        if not values:
            continue
        if row.key in given:
            left_out[row.key] = "given with --set"
        elif row.changes_vectors and not vectors_may_change:
            left_out[row.key] = "changes the vectors: --allow-vector-changes tries it"
        else:
            limits = None if goal is Goal.MEMORY else row.limits
            present = _most(view.value(row.key)) if limits else None
            factors.append(Factor(row.key, values, row.reason, gain, row.changes_vectors, limits, present))
    return Space(tuple(sorted(factors, key=lambda f: -f.gain)), left_out)


def _most(value: Any) -> int | None:
    return max(value, default=None) if isinstance(value, (tuple, list)) else value


def read_space(path: Path, given: Sequence[str] = ()) -> Space:
    """A space of the user's own: YAML, `setting: [value, …]` in the order to try them.

    Raises InvalidInputError `bad_space`.
    """
    import yaml

    hint = "a YAML mapping such as `max_prefill_tokens: [8192, 32768]`"
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > LARGEST_FILE:
            raise InvalidInputError("bad_space", f"{path}: {len(text)} characters; at most {LARGEST_FILE}", hint)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidInputError("bad_space", f"{path} cannot be read: {exc}", hint) from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise InvalidInputError("bad_space", f"{path}: {' '.join(str(exc).split())}", hint) from exc
    if not isinstance(data, dict) or not data:
        raise InvalidInputError("bad_space", f"{path}: not a mapping of settings to values", hint)
    factors = []
    for key, values in data.items():
        listed = values if isinstance(values, list) else [values]
        words = tuple(dict.fromkeys(word(v) for v in listed))
        if not isinstance(key, str) or not words or any(isinstance(v, dict) for v in listed):
            raise InvalidInputError("bad_space", f"{path}: {key}: values as a list, got {values!r}", hint)
        if key in given:
            raise InvalidInputError("bad_space", f"{path}: {key} is fixed with --set", "leave one of the two out")
        factors.append(Factor(key, words, f"listed in {path.name}"))
    return Space(tuple(factors))
