"""Which weights a checkpoint holds: by a sample of every tensor in milliseconds, by every byte in seconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen3emb_launch.files import write_atomic

PIECES = 16  # of a tensor are read, evenly spaced, its first and last bytes among them
PIECE = 256  # bytes
LARGEST_HEADER = 100_000_000  # bytes; the format's own limit


def weights_sample(folder: Path) -> str | None:
    """A sha256 over name, dtype, shape and 4 kB of each tensor, in the order of their names.

    The same weights give the same value however they are split into files. Training moves nearly all numbers of a
    tensor, so another checkpoint is another value; a few edited rows of a large tensor may be missed, which
    `weights_sha256` does not. None when the folder has no safetensors or they cannot be read.
    """
    found = hashlib.sha256()
    try:
        tensors = sorted(t for file in folder.glob("*.safetensors") for t in _tensors(file))
        if not tensors:
            return None
        opened: dict[Path, int] = {}
        try:
            for name, dtype, shape, file, begin, end in tensors:
                if file not in opened:
                    opened[file] = os.open(file, os.O_RDONLY)
                found.update(json.dumps([name, dtype, shape]).encode())
                for at, size in _pieces(begin, end):
                    found.update(os.pread(opened[file], size, at))
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found.hexdigest()


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int], Path, int, int]]:
    """Name, dtype, shape, file, first byte and the byte behind the last of each tensor.

    A safetensors file is eight bytes of header length, a JSON header, and the tensors.
    """
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{file} has no safetensors header")
        header: dict[str, Any] = json.loads(data.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], file, 8 + length + begin, 8 + length + end


def _pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where to read and how many bytes: all of a small tensor, else PIECES evenly spaced."""
    if end - begin <= PIECES * PIECE:
        yield begin, end - begin
        return
    for i in range(PIECES):
        yield begin + (end - begin - PIECE) * i // (PIECES - 1), PIECE


def weights_sha256(folder: Path, memory: Path, *, read: bool = True) -> str | None:
    """One sha256 over every byte of a checkpoint's safetensors, by file name. About a second a gigabyte.

    A file of Hugging Face's cache is a link to a blob named by its sha256: nothing is read. Others are read once
    and remembered in `memory` (a JSON file) by path, size and modification time; not at all without `read`. None
    when the folder has none, or the value is not to be had.
    """
    known = _remembered(memory)
    hashes: dict[str, str] = {}
    fresh = False
    try:
        for file in sorted(folder.glob("*.safetensors")):
            target = file.resolve()
            if len(target.name) == 64 and target.parent.name == "blobs":
                hashes[file.name] = target.name
                continue
            stat = target.stat()
            key = f"{target}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in known:
                if not read:
                    return None
                with target.open("rb") as data:
                    known[key] = hashlib.file_digest(data, "sha256").hexdigest()
                fresh = True
            hashes[file.name] = known[key]
    except OSError:
        return None
    if not hashes:
        return None
    if fresh:
        _remember(memory, known)
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def _remembered(memory: Path) -> dict[str, str]:
    try:
        data = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(memory: Path, known: Mapping[str, str]) -> None:
    """Best effort: a memory that cannot be written costs time, nothing else."""
    with suppress(OSError):
        write_atomic(memory, json.dumps(known))
