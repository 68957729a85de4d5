"""From decided settings to the engine's command line, checked against the options this engine really has.

Options are compared with EngineFacts.flags: a name that is not there, a value outside the choices, a value given to a
switch, or an option given twice is an error that names the nearest real one. Nothing is dropped without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, nearest
from qwen3emb_launch.facts import EngineFacts, EngineFlag, version_key

Flags = Mapping[str, EngineFlag]

# What `python -m` runs. The plugin's module ends in SGLang's own, with the same arguments and its workers forked.
STOCK_MODULE = "sglang.launch_server"
PLUGIN_MODULE = "qwen3emb_engine_plugin.serve"
SERVES_SINCE = (0, 2, 0)  # the plugin's version

# Written by the plan itself, or by the supervisor into a file that others cannot read.
RESERVED: dict[str, str] = {
    "--model-path": "use --model",
    "--model": "use --model",
    "--served-model-name": "use server.served_name",
    "--host": "use --host: the engine itself stays on loopback",
    "--port": "use --port",
    "--is-embedding": "it is always passed",
    "--json-model-override-args": "the Matryoshka override is always passed",
    "--device": "use the profile's engine.flavour",
    "--config": "the supervisor passes its own, which holds the engine's keys",
    "--api-key": "a key in a command line can be read by every user of the machine; put a gateway in front",
    "--ssl-keyfile-password": "a password in a command line can be read by every user; put a gateway in front",
    "--admin-api-key": "the supervisor makes one for each start and passes it in a file",
}


@dataclass(frozen=True)
class Option:
    """One option with its values; none for a switch."""

    flag: str
    values: tuple[str, ...] = ()

    def words(self) -> tuple[str, ...]:
        """As they stand in the command line."""
        return (self.flag, *self.values)


@dataclass(frozen=True)
class Spelling:
    """The options that a setting stands for (the first is written, the rest are its other names), and how."""

    flags: tuple[str, ...]
    say: Callable[[Any], Option | None]


def _value(*flags: str, unless: object = None) -> Spelling:
    return Spelling(flags, lambda value: None if value == unless else Option(flags[0], (_text(value),)))


def _many(flag: str) -> Spelling:
    return Spelling((flag,), lambda values: Option(flag, tuple(str(v) for v in values)))


def _when(wanted: object, flag: str) -> Spelling:
    return Spelling((flag,), lambda value: Option(flag) if value == wanted else None)


def _one_of(**flags: str) -> Spelling:
    return Spelling(tuple(flags.values()), lambda value: Option(flags[value]) if value in flags else None)


def _graph_requests(value: object) -> Option | None:
    """No flag of its own: a key of the JSON that overrides the graph flags one by one."""
    if value is None:
        return None
    return Option("--cuda-graph-config", (json.dumps({"prefill": {"full_prefill_max_req": value}}),))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# How each setting of a profile is spelled. Names that changed between releases get a second spelling here.
SPELLINGS: dict[str, Spelling] = {
    "dtype": _value("--dtype"),
    "quantization": _value("--quantization", unless="none"),
    "tp": _value("--tp-size", "--tensor-parallel-size"),
    "context_length": _value("--context-length"),
    "attention_backend": _value("--attention-backend"),
    "kv_pool": _when("none", "--prefill-only-disable-kv-cache"),
    "kv_cache_dtype": _value("--kv-cache-dtype", unless="auto"),
    "mem_fraction_static": _value("--mem-fraction-static"),
    "max_total_tokens": _value("--max-total-tokens"),
    "max_running_requests": _value("--max-running-requests"),
    "max_queued_requests": _value("--max-queued-requests"),
    "max_prefill_tokens": _value("--max-prefill-tokens"),
    "prefill_max_requests": _value("--prefill-max-requests"),
    "chunked_prefill_size": _value("--chunked-prefill-size"),
    "page_size": _value("--page-size"),
    "radix_cache": _when(False, "--disable-radix-cache"),
    "overlap_schedule": _when(False, "--disable-overlap-schedule"),
    "prefill_graphs": _when(False, "--disable-prefill-cuda-graph"),
    "prefill_graph_backend": _value("--cuda-graph-backend-prefill"),
    "prefill_graph_sizes": _many("--cuda-graph-bs-prefill"),
    "prefill_graph_requests": Spelling(("--cuda-graph-config",), _graph_requests),
    "decode_graphs": _when(False, "--disable-decode-cuda-graph"),
    # They exclude each other, so they are one setting.
    "batch_tokenize": _one_of(lists="--enable-tokenizer-batch-encode", singles="--enable-dynamic-batch-tokenizer"),
    "tokenizer_workers": _value("--tokenizer-worker-num", unless=1),
    "sleep_on_idle": _when(True, "--sleep-on-idle"),
    "trust_remote_code": _when(True, "--trust-remote-code"),
    "log_level": _value("--log-level"),
    "log_level_http": _value("--log-level-http"),
}


def option(key: str, value: Any) -> Option | None:
    """How one setting is said to the engine; None when its value is what the engine does unasked."""
    spelling = SPELLINGS.get(key)
    return spelling.say(value) if spelling and value is not None else None


def check(wanted: Option, flags: Flags, origin: str) -> Option:
    """The option again, if this engine takes it.

    Raises InvalidInputError: `unknown_flag`, `bad_flag_value`. `origin` says who asked for it, for the message.
    """
    flag = flags.get(wanted.flag)
    if flag is None:
        raise unknown_flag(wanted.flag, flags, origin)
    if flag.takes_value and not wanted.values:
        raise InvalidInputError(
            "bad_flag_value", f"{wanted.flag} ({origin}) needs a value", f"write it as {wanted.flag}=VALUE"
        )
    if not flag.takes_value and wanted.values:
        raise InvalidInputError(
            "bad_flag_value",
            f"{wanted.flag} ({origin}) is a switch and takes no value, got {' '.join(wanted.values)!r}",
            f"write it as {wanted.flag}",
        )
    for value in wanted.values if flag.choices else ():
        if value not in flag.choices:
            guess = nearest(value, list(flag.choices), cutoff=0.3)
            raise InvalidInputError(
                "bad_flag_value",
                f"{wanted.flag} ({origin}) cannot be {value!r}; this engine takes {', '.join(flag.choices)}",
                f"did you mean {guess}?" if guess else f"one of: {', '.join(flag.choices)}",
            )
    return wanted


def unknown_flag(name: str, flags: Flags, origin: str) -> InvalidInputError:
    """The error for an option that this engine does not have."""
    guess = _nearest_flag(name, flags)
    return InvalidInputError(
        "unknown_flag",
        f"this engine has no option {name} ({origin})",
        f"did you mean {guess}?" if guess else "qwen3emb engine check --json lists the options it has",
        {"flag": name, "nearest": guess},
    )


def _nearest_flag(name: str, flags: Flags) -> str | None:
    """The real option that is meant: one whose words are all there, else the closest in spelling.

    `--enable-prompt-trust-remote-code` shares the most words with `--trust-remote-code`, yet other `--enable-…`
    options are closer letter by letter.
    """
    words = set(name.strip("-").split("-"))
    contained = [f for f in flags if len(set(f.strip("-").split("-"))) > 1 and set(f.strip("-").split("-")) < words]
    if contained:
        return max(contained, key=lambda f: (len(f), f))
    return nearest(name, list(flags))


def parse_extra(words: Sequence[str], flags: Flags, origin: str) -> tuple[Option, ...]:
    """`extra_args` as checked options. `--flag value`, `--flag=value` and `--flag a b c` are understood.

    Raises InvalidInputError: `unknown_flag`, `bad_flag_value`, `reserved_flag`, `duplicate_flag`, `not_a_flag`.
    """
    options: list[Option] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.append(Option(name, (value,) if equals else ()))
        elif options:
            last = options.pop()
            options.append(Option(last.flag, (*last.values, word)))
        else:
            raise InvalidInputError(
                "not_a_flag", f"{word!r} ({origin}) stands before any option", "write options as --name value"
            )
    managed = {flag: key for key, spelling in SPELLINGS.items() for flag in spelling.flags}
    seen: set[str] = set()
    for one in options:
        if one.flag in RESERVED:
            raise InvalidInputError("reserved_flag", f"{one.flag} ({origin}) is not to be set here", RESERVED[one.flag])
        if one.flag in managed:
            raise InvalidInputError(
                "duplicate_flag",
                f"{one.flag} ({origin}) is the setting {managed[one.flag]}",
                f"give it there, or with --set {managed[one.flag]}=VALUE",
            )
        if one.flag in seen:
            raise InvalidInputError("duplicate_flag", f"{one.flag} ({origin}) is given twice", "give it once")
        seen.add(one.flag)
        check(one, flags, origin)
    return tuple(options)


def build(
    engine: EngineFacts,
    *,
    model_path: str,
    served_name: str,
    host: str,
    port: int,
    options: Iterable[Option],
    plugin: bool = True,
) -> tuple[str, ...]:
    """The whole command. It holds no secret: keys go into the supervisor's `--config` file.

    `plugin` False starts SGLang's own module even where the plugin would start the same server sooner.
    """
    module = PLUGIN_MODULE if plugin and engine.plugin and version_key(engine.plugin) >= SERVES_SINCE else STOCK_MODULE
    words = [str(engine.python), "-m", module, "--model-path", model_path, "--is-embedding"]
    # Without the override every request with `dimensions` is a 400 (0.5.5 and later).
    words += ["--json-model-override-args", json.dumps({"is_matryoshka": True})]
    words += ["--served-model-name", served_name, "--host", host, "--port", str(port)]
    if engine.flavour == "cpu":
        words += ["--device", "cpu"]
    for one in options:
        words += one.words()
    return tuple(words)


def with_option(argv: Sequence[str], option: str, value: str) -> tuple[str, ...]:
    """The command with another value behind one of its options."""
    return tuple(value if before == option else word for before, word in pairwise(["", *argv]))
