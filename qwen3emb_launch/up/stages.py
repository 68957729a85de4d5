"""What a starting engine is busy with, read from its log, so that a long start says what it waits for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

# SGLang's lines in the order they come; each is the sign that a stage began.
STAGES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), text)
    for pattern, text in (
        (r"server_args=ServerArgs\(", "starting workers"),
        (r"Init torch distributed begin", "preparing the device"),
        (r"Load weight begin", "loading weights"),
        (r"Load weight end", "weights loaded, reserving memory"),
        (r"KV Cache is allocated|Memory pool end", "memory reserved"),
        (r"[Cc]apture (?:piecewise |prefill |cuda |breakable )*(?:CUDA |cuda )?graph", "capturing CUDA graphs"),
        (r"[Cc]ompiling (?:a |the )?(?:\w+ )?(?:kernel|graph|op)|JIT (?:building|compil)", "compiling kernels"),
        (r"Uvicorn running on", "warming up"),
        (r"fired up and ready to roll", "engine is up"),
    )
)
SHARDS = re.compile(r"(?:loading|Loading) .*shards:\s*(\d+)%")
CAPTURE = re.compile(r"Capturing .*?(\d+)%")
# What it says when one of its processes died. It serves nobody from then on, and ends up to 65 s later: first it looks
# for traces of a crash on a GPU.
DOOMED = "SIGQUIT received. signum="
LOST = re.compile(r"Subprocess (\S+) \(pid=\d+\) crashed with exit code (-?\d+)")
# Its pool of tokens as it turned out: fewer than it was told where neighbours took memory meanwhile.
ROOM = re.compile(r"\bmax_total_num_tokens=(\d+)")
# A part of the engine plugin that does not fit what it finds: served all the same, but slower.
ASIDE = re.compile(r"qwen3emb plugin: (.*stands aside: .*|starts anew without a template: .*)")
# A line of these means that the engine computed something for somebody.
WORK = re.compile(r'Prefill batch|"POST /v1/embeddings HTTP/[\d.]+" 200')


def stage(line: str) -> str | None:
    """The stage that a log line announces, or None."""
    shards = SHARDS.search(line)
    if shards:
        return f"loading weights, {shards.group(1)}%"
    capture = CAPTURE.search(line)
    if capture:
        return f"capturing CUDA graphs, {capture.group(1)}%"
    for pattern, text in STAGES:
        if pattern.search(line):
            return text
    return None


def aside(line: str) -> str | None:
    """Which of the plugin's parts does not run in this engine, and why; None for any other line."""
    found = ASIDE.search(line)
    return f"engine plugin: {found[1].strip()}" if found else None


def lost(lines: Sequence[str]) -> str:
    """Which of its processes an engine lost, by the last lines of its log; empty where they do not tell."""
    found = [match for line in lines if (match := LOST.search(line))]
    return f"{found[-1][1]}, exit code {found[-1][2]}" if found else ""


def room(log: Path) -> int | None:
    """For how many tokens the engine has room, by its log; None where that does not say, or cannot be read."""
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            found = [int(match[1]) for line in lines if (match := ROOM.search(line))]
    except OSError:
        return None
    return found[-1] if found else None


def works(line: str) -> bool:
    """Whether a log line shows the engine at work on requests."""
    return WORK.search(line) is not None
