"""Log lines to causes, log lines to stages, keys out of argv."""

from __future__ import annotations

import json

import pytest

from qwen3emb_launch.up.diagnosis import PATTERNS, diagnose, ending
from qwen3emb_launch.up.keys import take_keys
from qwen3emb_launch.up.stages import aside, stage, works

# The lines as SGLang 0.5.15.post1 on a CPU, torch, safetensors and uvicorn print them.
CAUSES = {
    "engine_unknown_flag": "sglang serve: error: unrecognized arguments: --enable-prompt-trust-remote-code",
    "engine_bad_flag": "sglang serve: error: argument --kv-cache-dtype: invalid choice: 'fp8' (choose from auto)",
    "engine_port_in_use": "[Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): in use",
    "engine_oom_gpu": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.24 GiB",
    "engine_oom_pool": "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.",
    "engine_crowded_gpu": "ValueError: Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static="
    "0.21. Raise --mem-fraction-static above 0.218 (minimum viable = 1 - available/pre = 0.2178). If using speculative",
    "engine_oom_host": "RuntimeError: [enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory",
    "engine_gpu_unsupported": "CUDA error: no kernel image is available for execution on the device",
    "engine_driver": "RuntimeError: Found no NVIDIA driver on your system.",
    "engine_no_compiler": "RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist",
    "engine_disk_full": "OSError: [Errno 28] No space left on device",
    "engine_bad_weights": "safetensors_rust.SafetensorError: Error while deserializing header: InvalidHeader",
    "engine_bad_model": "KeyError: 'qwen3'",
    "engine_broken": "ModuleNotFoundError: No module named 'torch'",
    "engine_bad_id": "IndexError: index out of range in self",
    "engine_watchdog": "Watchdog TIMEOUT (300 s)",
}
NOISE = [
    "[2026-01-01 00:00:00] Ignore import error when loading sglang.srt.models.minicpmo: No module named 'vllm'",
    "UserWarning: Triton is not supported on current platform, roll back to CPU.",
    "Failed to load generation config for /m: /m does not appear to have a file named generation_config.json.",
]


def test_every_pattern_has_an_example() -> None:
    """The table below covers the table of causes."""
    assert set(CAUSES) == {pattern.code for pattern in PATTERNS}


@pytest.mark.parametrize("code", CAUSES)
def test_cause_is_recognised_among_noise(code: str) -> None:
    """Each cause is found behind a traceback and before shutdown lines, with its own words and a next step."""
    lines = [*NOISE, "Traceback (most recent call last):", CAUSES[code], "kill_process_tree called", *NOISE]
    found = diagnose(lines, 1)
    assert found is not None
    assert found.code == code
    assert found.hint


def test_a_normal_start_has_no_cause() -> None:
    """Lines that every healthy start prints are not taken for a cause."""
    assert diagnose([*NOISE, "The server is fired up and ready to roll!"], 0) is None


def test_last_exception_stands_in_for_an_unknown_cause() -> None:
    """What no pattern knows is told by the last exception, with its text."""
    found = diagnose(["Traceback", "ValueError: first", "RuntimeError: second one", "bye"], 1)
    assert found is not None
    assert (found.code, found.message) == ("engine_died", "RuntimeError: second one")


def test_sigkill_from_outside_is_explained() -> None:
    """SIGKILL without a word is usually the kernel's."""
    found = diagnose([], -9)
    assert found is not None
    assert found.code == "engine_killed"


def test_our_own_kill_explains_nothing() -> None:
    """An engine that we killed is not diagnosed by its death or by any old exception."""
    assert diagnose(["ValueError: harmless"], None) is None


@pytest.mark.parametrize(
    ("status", "words"), [(0, "ended with status 0"), (-9, "was killed by SIGKILL"), (-99, "was killed by signal 99")]
)
def test_exit_status_in_words(status: int, words: str) -> None:
    """Exit codes and signals as people say them."""
    assert ending(status) == words


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("[2026-11-22 10:56:38] Load weight begin. avail mem=17.50 GB", "loading weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:01<00:01]", "loading weights, 50%"),
        ("Multi-thread loading shards: 100% Completed | 1/1 [00:00<00:00]", "loading weights, 100%"),
        ("[2026-11-22 10:56:39] KV Cache is allocated. dtype: torch.bfloat16", "memory reserved"),
        ("Capturing num tokens (num_tokens=64):  12%|#2", "capturing CUDA graphs, 12%"),
        ("The server is fired up and ready to roll!", "engine is up"),
        ("FutureWarning: `torch.jit.script` is deprecated. Please switch to `torch.compile`", None),
        ("hello", None),
    ],
)
def test_stage_of_a_start(line: str, text: str | None) -> None:
    """SGLang's lines as what a start is busy with."""
    assert stage(line) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "qwen3emb plugin: stands aside: SGLang 0.6.0 is unknown",
            "engine plugin: stands aside: SGLang 0.6.0 is unknown",
        ),
        ("[now] qwen3emb plugin: gated has nothing to do: fp8 weights", None),
        ("[now] qwen3emb plugin: batches are launched ahead", None),
    ],
)
def test_what_the_plugin_leaves_out(line: str, text: str | None) -> None:
    """Its warnings, not what it says of itself."""
    assert aside(line) == text


def test_work_lines() -> None:
    """Batches and answered embeddings are work; health probes and refused requests are not."""
    assert works("[now] Prefill batch, #new-seq: 1, #new-token: 30, #cached-token: 0")
    assert works('INFO:     127.0.0.1:60700 - "POST /v1/embeddings HTTP/1.1" 200 OK')
    assert not works('INFO:     127.0.0.1:60700 - "GET /health HTTP/1.1" 200 OK')
    assert not works('INFO:     127.0.0.1:60700 - "POST /v1/embeddings HTTP/1.1" 400 Bad Request')


def test_keys_leave_the_argv() -> None:
    """Keys that a profile put into the command travel in the file; an admin key is made where none was given."""
    argv, keys = take_keys(["python", "--api-key", "user-key", "--port", "1", "--admin-api-key=mine"])
    assert argv == ("python", "--port", "1")
    assert json.loads(keys.config()) == {"admin-api-key": "mine", "api-key": "user-key"}
    fresh = [take_keys(["python"])[1] for _ in range(2)]
    assert fresh[0].admin != fresh[1].admin
    assert fresh[0].secrets == (fresh[0].admin,)
