"""What decides an endpoint's vectors, as parts and one short id. Two endpoints with one id may share an index.

A part that nobody told is None, and the id then says so with a trailing `?`: unknown is not equal to unknown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from qwen3emb_launch.instructions import TASKS, TEMPLATE
from qwen3emb_launch.verify.identity import Identity
from qwen3emb_launch.verify.tolerance import Precision

ID_LENGTH = 12
FULL_HASH = "weights_sha256"
MODEL = ("weights_sample", "model_revision", FULL_HASH)  # what says which checkpoint it is, best first


def fingerprint(
    identity: Identity, precision: Precision, width: int | None, sample: str | None = None, sha256: str | None = None
) -> dict[str, Any]:
    """`{"id": "3f2a91c07d55", "complete": True, "parts": {...}}`. `sample` and `sha256` are of the weights.

    Pooling and normalisation follow from the engine: SGLang's Qwen3 pools the last token and normalises; of another
    server nothing is claimed.
    """
    sglang = identity.engine == "sglang"
    parts: dict[str, Any] = {
        "model_revision": identity.revision,
        "weights_sample": sample,
        "weights_sha256": sha256,
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
    """The parts with their id. A checkpoint is known by its weights or by its revision; either is enough.

    The id does not hang on how the files were fetched, so the revision counts only where the weights are unknown. The
    full hash takes seconds a gigabyte and is often not known: it is told, and counts in `differences`, not in the id.
    """
    missing = [k for k, v in parts.items() if v is None and k not in MODEL]
    known = next((k for k in MODEL if k != FULL_HASH and parts.get(k)), None)
    complete = known is not None and not missing
    hashed = {k: v for k, v in parts.items() if k not in MODEL or k == known}
    text = json.dumps(hashed, sort_keys=True, ensure_ascii=False)
    short = hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]
    return {"id": short if complete else f"{short}?", "complete": complete, "parts": dict(parts)}


def instructions_hash() -> str:
    """A short hash of the template and the shipped tasks."""
    text = json.dumps([TEMPLATE, sorted((t.name, t.instruction) for t in TASKS.values())])
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The parts in which two fingerprints differ, or that one of them does not know.

    The full hash of the weights counts only where both know it: quick runs do not read whole checkpoints.
    """
    left, right = a.get("parts", {}), b.get("parts", {})
    return {
        key: (left.get(key), right.get(key))
        for key in dict.fromkeys((*left, *right))
        if left.get(key) != right.get(key) and not (key == FULL_HASH and None in (left.get(key), right.get(key)))
    }
