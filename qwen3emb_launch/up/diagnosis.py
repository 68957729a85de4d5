"""Why an engine failed, read from its last log lines: a cause in words and the next thing to do.

A table of patterns, most telling first; the texts are SGLang's, torch's and the kernel's own.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Diagnosis:
    """`code` is stable; `message` carries what the pattern found; `hint` is the next command."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class _Pattern:
    code: str
    pattern: re.Pattern[str]
    message: str
    hint: str


def _pattern(code: str, pattern: str, message: str, hint: str) -> _Pattern:
    return _Pattern(code, re.compile(pattern, re.IGNORECASE), message, hint)


PATTERNS: tuple[_Pattern, ...] = (
    _pattern(
        "engine_unknown_flag",
        r"error: unrecognized arguments: (?P<x>.+)",
        "this engine does not know {x}",
        "qwen3emb engine check, then take the flag out of the profile",
    ),
    _pattern(
        "engine_bad_flag",
        r"error: argument (?P<x>.+)",
        "the engine refuses a flag's value: {x}",
        "qwen3emb profiles explain",
    ),
    _pattern(
        "engine_port_in_use",
        r"address already in use|error while attempting to bind on address (?P<x>.+)",
        "a port that the engine needs is in use (its own, or its own + 10000)",
        "qwen3emb up --port with another number",
    ),
    _pattern(
        "engine_oom_gpu",
        r"(?P<x>CUDA out of memory[^\n]*|torch\.OutOfMemoryError[^\n]*|CUDA error: out of memory)",
        "the GPU's memory ran out: {x}",
        "see who holds it with nvidia-smi, or: qwen3emb up --set context_length=8192, or a smaller model",
    ),
    _pattern(
        "engine_crowded_gpu",
        r"(?P<x>Loaded weights leave no GPU memory for the KV cache under --mem-fraction-static=[\d.]*\d)",
        "others on the GPU took memory while this engine loaded, and too little is left for its tokens: {x}",
        "the same command once more when they are up, or one engine after the other; nvidia-smi shows who holds what",
    ),
    _pattern(
        "engine_oom_pool",
        r"(?P<x>Not enough memory[^\n]*)",
        "no memory is left for the engine's token pool: {x}",
        "the same command once more, if others were loading there; else a shorter context_length, or a smaller model",
    ),
    _pattern(
        "engine_oom_host",
        r"(?P<x>can't allocate memory[^\n]*|Cannot allocate memory[^\n]*|\bMemoryError\b[^\n]*)",
        "the machine's memory ran out: {x}",
        "a smaller model, or a smaller max_total_tokens: qwen3emb profiles explain",
    ),
    _pattern(
        "engine_gpu_unsupported",
        r"(?P<x>no kernel image is available[^\n]*|is not compatible with the current PyTorch installation)",
        "the engine has no kernels for this GPU: {x}",
        "qwen3emb doctor, then qwen3emb engine install cuda with another --version",
    ),
    _pattern(
        "engine_driver",
        r"(?P<x>CUDA driver version is insufficient[^\n]*|NVIDIA driver on your system is too old[^\n]*"
        r"|Found no NVIDIA driver[^\n]*|No CUDA GPUs are available)",
        "the NVIDIA driver does not serve this engine: {x}",
        "qwen3emb doctor",
    ),
    _pattern(
        "engine_no_compiler",
        r"(?P<x>Could not find nvcc[^\n]*|CUDA_HOME environment variable is not set[^\n]*|nvcc: not found)",
        "kernels must be compiled and no CUDA compiler was found: {x}",
        "qwen3emb doctor",
    ),
    _pattern(
        "engine_disk_full", r"(?P<x>No space left on device[^\n]*)", "a disk is full: {x}", "free some space, then up"
    ),
    _pattern(
        "engine_bad_weights",
        r"(?P<x>SafetensorError[^\n]*|Error while deserializing header[^\n]*|MetadataIncompleteBuffer[^\n]*)",
        "a weights file is damaged: {x}",
        "qwen3emb models verify",
    ),
    _pattern(
        "engine_bad_model",
        r"(?P<x>KeyError: 'qwen3'|Unrecognized model in [^\n]*|does not appear to have a file named (?:config|model)\S*"
        r"|Cannot find any model weights[^\n]*|size mismatch for [^\n]*)",
        "the engine cannot read the model: {x}",
        "qwen3emb models verify",
    ),
    _pattern(
        "engine_broken",
        r"(?P<x>ModuleNotFoundError: [^\n]*|ImportError: [^\n]*|No module named [^\n]*)",
        "the engine environment is broken: {x}",
        "qwen3emb engine check, then qwen3emb engine install --force",
    ),
    _pattern(
        "engine_bad_id",
        r"(?P<x>index out of range in self|device-side assert triggered)",
        "a token id outside the vocabulary reached the engine: {x}",
        "let clients send texts, or put the gateway in front",
    ),
    _pattern(
        "engine_watchdog", r"(?P<x>Watchdog TIMEOUT[^\n]*|watchdog timeout)", "the engine hung: {x}", "qwen3emb logs"
    ),
)
# SGLang prints these at every start although nothing is wrong.
HARMLESS = re.compile(r"Ignore import error|Warning|generation_config|Proceeding without|warnings\.warn")
EXCEPTION = re.compile(r"^(?:\[[^]]*\]\s*)?(?P<x>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt): .+)")


def diagnose(lines: Sequence[str], status: int | None = None) -> Diagnosis | None:
    """The most telling cause in the last lines of a log; None when nothing is recognised.

    `status` is the exit code, or minus the signal, of an engine that ended by itself; None for one that was killed for
    being of no use, where only the table's own causes are believed.
    """
    telling = [line for line in lines if not HARMLESS.search(line)]
    for known in PATTERNS:
        for line in reversed(telling):
            match = known.pattern.search(line)
            if match:
                seen = (match.groupdict().get("x") or match.group(0)).strip()
                return Diagnosis(known.code, known.message.format(x=seen), known.hint)
    if status is None:
        return None
    for line in reversed(telling):
        match = EXCEPTION.match(line)
        if match:
            return Diagnosis("engine_died", match.group("x").strip(), "qwen3emb logs")
    if status == -signal.SIGKILL:
        return Diagnosis(
            "engine_killed",
            "somebody killed it with SIGKILL: often the kernel, out of memory (see dmesg)",
            "a smaller model, or a smaller max_total_tokens",
        )
    return None


def ending(status: int) -> str:
    """An exit status in words: `ended with status 2`, `was killed by SIGKILL`."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
