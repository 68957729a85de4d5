"""Options as the engine takes them: spelled, checked against its list, refused with the nearest real one."""

from __future__ import annotations

import pytest

from qwen3emb_launch import argv, recorded_flags
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.profile import Settings

FLAGS = recorded_flags.flags("0.5.23")

SPELLED = [
    ("dtype", "bfloat16", "--dtype bfloat16"),
    ("quantization", "none", ""),
    ("quantization", "fp8", "--quantization fp8"),
    ("kv_pool", "none", "--prefill-only-disable-kv-cache"),
    ("kv_pool", "full", ""),
    ("kv_cache_dtype", "auto", ""),
    ("kv_cache_dtype", "fp8_e4m3", "--kv-cache-dtype fp8_e4m3"),
    ("mem_fraction_static", 0.85, "--mem-fraction-static 0.85"),
    ("chunked_prefill_size", -1, "--chunked-prefill-size -1"),
    ("radix_cache", False, "--disable-radix-cache"),
    ("radix_cache", True, ""),
    ("prefill_graphs", False, "--disable-prefill-cuda-graph"),
    ("prefill_graph_sizes", (64, 128), "--cuda-graph-bs-prefill 64 128"),
    ("decode_graphs", False, "--disable-decode-cuda-graph"),
    ("batch_tokenize", "lists", "--enable-tokenizer-batch-encode"),
    ("batch_tokenize", "singles", "--enable-dynamic-batch-tokenizer"),
    ("batch_tokenize", "off", ""),
    ("tokenizer_workers", 1, ""),
    ("tokenizer_workers", 2, "--tokenizer-worker-num 2"),
    ("trust_remote_code", False, ""),
    ("trust_remote_code", True, "--trust-remote-code"),
    ("overlap_schedule", False, "--disable-overlap-schedule"),
    ("page_size", None, ""),
    ("plugin", False, ""),
]


@pytest.mark.parametrize(("key", "value", "words"), SPELLED)
def test_a_setting_is_spelled(key: str, value: object, words: str) -> None:
    """Each setting becomes the engine's option, or nothing where the engine does so unasked."""
    said = argv.option(key, value)
    assert " ".join(said.words() if said else ()) == words
    if said:
        assert argv.check(said, FLAGS, "test") == said


def test_every_setting_is_spelled_or_is_no_option() -> None:
    """A new setting of the schema needs a spelling; the plugin is said by the environment, replicas by their number."""
    assert set(Settings.model_fields) - set(argv.SPELLINGS) == {"plugin", "replicas"}
    assert set(argv.SPELLINGS) <= set(Settings.model_fields)


@pytest.mark.parametrize("release", recorded_flags.versions())
def test_every_spelling_exists_in_every_recorded_release(release: str) -> None:
    """A release that renames an option shows here first."""
    known = recorded_flags.flags(release)
    assert [f for spelling in argv.SPELLINGS.values() for f in spelling.flags[:1] if f not in known] == []
    assert [f for f in argv.RESERVED if f not in known] == []


EXTRA = [
    ("--enable-metrics", [("--enable-metrics",)]),
    ("--load-format dummy --enable-metrics", [("--load-format", "dummy"), ("--enable-metrics",)]),
    ("--load-format=dummy", [("--load-format", "dummy")]),
    ("--uvicorn-access-log-exclude-prefixes /a /b", [("--uvicorn-access-log-exclude-prefixes", "/a", "/b")]),
    ("--random-seed -1", [("--random-seed", "-1")]),
    ("", []),
]


@pytest.mark.parametrize(("text", "options"), EXTRA)
def test_extra_args_are_read(text: str, options: list[tuple[str, ...]]) -> None:
    """`--flag`, `--flag value`, `--flag=value`, several values and negative numbers."""
    assert [one.words() for one in argv.parse_extra(text.split(), FLAGS, "test")] == options


WRONG = [
    ("--enable-prompt-trust-remote-code", "unknown_flag", "did you mean --trust-remote-code?"),
    ("--load-formatt dummy", "unknown_flag", "did you mean --load-format?"),
    ("--xyzzy", "unknown_flag", "engine check"),
    ("--load-format dumy", "bad_flag_value", "did you mean dummy?"),
    ("--load-format", "bad_flag_value", "--load-format=VALUE"),
    ("--enable-metrics yes", "bad_flag_value", "write it as --enable-metrics"),
    ("--enable-metrics --enable-metrics", "duplicate_flag", "once"),
    ("--mem-fraction-static 0.5", "duplicate_flag", "--set mem_fraction_static=VALUE"),
    ("--tensor-parallel-size 2", "duplicate_flag", "--set tp=VALUE"),
    ("--enable-dynamic-batch-tokenizer", "duplicate_flag", "--set batch_tokenize=VALUE"),
    ("--kv-cache-dtype fp8", "duplicate_flag", "--set kv_cache_dtype=VALUE"),
    ("--api-key secret", "reserved_flag", "gateway"),
    ("--admin-api-key=secret", "reserved_flag", "file"),
    ("--model-path /m", "reserved_flag", "--model"),
    ("stray --enable-metrics", "not_a_flag", "--name value"),
    ("-x", "not_a_flag", "--name value"),
]


@pytest.mark.parametrize(("text", "code", "hint"), WRONG)
def test_a_wrong_extra_arg_names_the_way_out(text: str, code: str, hint: str) -> None:
    """Unknown, misspelt, out of the choices, doubled, or not to be set there."""
    with pytest.raises(InvalidInputError) as caught:
        argv.parse_extra(text.split(), FLAGS, "extra_args")
    assert caught.value.code == code
    assert hint in caught.value.hint
    assert "secret" not in caught.value.message


def test_a_choice_is_checked() -> None:
    """`fp8` is no KV dtype of the engine: the nearest real ones are offered."""
    with pytest.raises(InvalidInputError) as caught:
        argv.check(argv.Option("--kv-cache-dtype", ("fp8",)), FLAGS, "test")
    assert "fp8_e4m3" in caught.value.message
    assert caught.value.code == "bad_flag_value"
