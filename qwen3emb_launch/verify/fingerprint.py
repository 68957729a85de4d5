"""What decides an endpoint's vectors, as parts and one short id. Two endpoints with one id may share an index.

A part that nobody told is None, and the id then says so with a trailing `?`: unknown is not equal to unknown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3emb_launch.instructions import TASKS, TEMPLATE
from qwen3emb_launch.verify.identity import Identity
from qwen3emb_launch.verify.tolerance import Precision

ID_LENGTH = 12


def fingerprint(
    identity: Identity, precision: Precision, width: int | None, weights: str | None = None
) -> dict[str, Any]:
    """`{"id": "3f2a91c07d55", "complete": True, "parts": {...}}`.

    Pooling and normalisation follow from the engine: SGLang's Qwen3 pools the last token and normalises; of another
    server nothing is claimed.
    """
    sglang = identity.engine == "sglang"
    parts: dict[str, Any] = {
        "model_revision": identity.revision,
        "weights_sha256": weights,
        "engine": identity.engine,
        "engine_version": identity.engine_version,
        "dtype": precision.dtype if precision.origin != "assumed" else None,
        "quantization": identity.quantization or ("none" if sglang else None),
        "kv_cache_dtype": identity.kv_cache_dtype or ("auto" if sglang else None),
        "pooling": "last_token" if sglang else None,
        "normalisation": "l2" if sglang else None,
        "instructions": instructions_hash(),
        "dims": width,
    }
    return with_id(parts)


def with_id(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts with their id. A checkpoint is known by its weights or by its revision; either is enough."""
    known_model = parts.get("weights_sha256") or parts.get("model_revision")
    missing = [k for k, v in parts.items() if v is None and k not in ("weights_sha256", "model_revision")]
    complete = bool(known_model) and not missing
    # The weights' hash says all that the revision says, so the id does not hang on how the files were fetched.
    hashed = {k: v for k, v in parts.items() if not (k == "model_revision" and parts.get("weights_sha256"))}
    text = json.dumps(hashed, sort_keys=True, ensure_ascii=False)
    short = hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]
    return {"id": short if complete else f"{short}?", "complete": complete, "parts": dict(parts)}


def instructions_hash() -> str:
    """A short hash of the template and the shipped tasks."""
    text = json.dumps([TEMPLATE, sorted((t.name, t.instruction) for t in TASKS.values())])
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The parts in which two fingerprints differ, or that one of them does not know."""
    left, right = a.get("parts", {}), b.get("parts", {})
    return {
        key: (left.get(key), right.get(key))
        for key in dict.fromkeys((*left, *right))
        if left.get(key) != right.get(key)
    }


def weights_hash(folder: Path, memory: Path) -> str | None:
    """One sha256 over a checkpoint's safetensors, by name. None when the folder has none or cannot be read.

    A file of Hugging Face's cache is a link to a blob named by its sha256: nothing is read. Others are read once
    and remembered in `memory` (a JSON file) by path, size and modification time.
    """
    known = _remembered(memory)
    hashes: dict[str, str] = {}
    fresh = False
    try:
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            target = file.resolve()
            if len(target.name) == 64 and target.parent.name == "blobs":
                hashes[file.name] = target.name
                continue
            stat = target.stat()
            key = f"{target}|{stat.st_size}|{stat.st_mtime_ns}"
            if key not in known:
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
    """Best effort: a cache that cannot be written costs time, nothing else."""
    from contextlib import suppress

    from qwen3emb_launch.errors import UnfitError
    from qwen3emb_launch.verify.reference import write_whole

    with suppress(OSError, UnfitError):
        memory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(memory, json.dumps(known))
