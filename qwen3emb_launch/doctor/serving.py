"""SGLang processes that run on this machine, whoever started them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qwen3emb_launch import recorded_flags
from qwen3emb_launch.catalog import ModelShape, shape_from_config
from qwen3emb_launch.doctor import command_line
from qwen3emb_launch.doctor.command_line import Launch
from qwen3emb_launch.doctor.report import Check, ok, unknown
from qwen3emb_launch.errors import InvalidInputError


def checks() -> list[Check]:
    """A line for each fault of each process, or one that says that it is in order."""
    import psutil

    found: list[Check] = []
    for process in psutil.process_iter(("pid", "cmdline")):
        words = process.info["cmdline"] or []
        launch = command_line.read(words)
        if launch and _is_python(words[0]) and launch.embeds:
            found += of_process(process.info["pid"], words, launch)
    return found


def of_process(pid: int, words: Sequence[str], launch: Launch) -> list[Check]:
    """What is wrong with one process that serves embeddings."""
    name = f"process {pid}"
    version = release_of(words[0])
    known = replace(launch, version=version, shape=_shape(launch.model), running=True)
    faults = command_line.judge(known, name)
    if version is None and not faults:
        return [unknown(name, f"serves {launch.model}; its SGLang release is not known")]
    return faults or [ok(name, f"serves {launch.model} with sglang {version}")]


def of_command(text: str, release: str | None = None) -> list[Check]:
    """What is wrong with a pasted command: for `release`, the one beside its python, or else the newest recorded."""
    words = command_line.split(text)
    launch = command_line.read(words)
    if launch is None:
        raise InvalidInputError(
            "bad_command",
            "no SGLang is started there: neither `-m sglang.launch_server` nor `sglang serve`",
            "qwen3emb doctor --command 'python -m sglang.launch_server --model-path …'",
        )
    version = release or release_of(words[0]) or recorded_flags.versions()[-1]
    flags = recorded_flags.flags(version) if version in recorded_flags.versions() else None
    known = replace(launch, version=version, flags=flags, shape=_shape(launch.model))
    return command_line.judge(known, "command") or [ok("command", f"nothing is known against it (sglang {version})")]


def release_of(program: str) -> str | None:
    """The SGLang release beside a python, from its packages' names on disk; None where there is none."""
    if not program.startswith("/"):
        return None
    try:
        found = list(Path(program).parents[1].glob("lib/python3*/site-packages/sglang-*.dist-info"))
    except (OSError, IndexError):
        return None
    return found[0].name.removeprefix("sglang-").removesuffix(".dist-info") if len(found) == 1 else None


def _is_python(program: str) -> bool:
    """Not a shell that merely mentions the command."""
    return Path(program).name.startswith(("python", "sglang"))


def _shape(model: str) -> ModelShape | None:
    try:
        return shape_from_config(json.loads((Path(model) / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, InvalidInputError):
        return None
