"""Vectors to compare an endpoint with, from elsewhere: transformers, a saved set, the shipped set of the demo model."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.vectors import from_base64, to_base64

SCHEMA = 1
SCRIPT = Path(__file__).resolve().parents[1] / "engine_scripts" / "reference.py"
DEMO_SET = Path(__file__).resolve().parent / "demo_reference.json"
SCRIPT_LIMIT = 1800.0  # seconds; float32 of an 8B on a CPU takes minutes
# What the script's environment keeps of ours: no tokens, no proxies, no site hooks of other tools.
PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "TMPDIR",
    "OMP_NUM_THREADS",
)  # fmt: skip


@dataclass(frozen=True)
class ReferenceSet:
    """Texts and their vectors, and what they come from. A vector per text; `dtype` is the arithmetic's."""

    origin: str
    dtype: str
    vectors: Mapping[str, tuple[float, ...]]
    model: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""

    @property
    def width(self) -> int:
        """Dims of its vectors."""
        return len(next(iter(self.vectors.values()), ()))


@dataclass(frozen=True)
class Transformers:
    """What the reference script answered: the sets by dtype, and the wrong ways' vectors by name and text."""

    sets: Mapping[str, ReferenceSet]
    alternatives: Mapping[str, Mapping[str, tuple[float, ...]]]
    skipped: Mapping[str, str]
    appends_eos: bool
    versions: Mapping[str, str]


def transformers_reference(
    python: Path,
    folder: Path,
    texts: Sequence[str],
    *,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    device: str = "cpu",
    alternatives: bool = False,
) -> Transformers:
    """Run the reference script in the engine environment: seconds for a small model, minutes for an 8B on a CPU.

    Raises UnfitError (`reference_failed`) with the script's last words when it cannot.
    """
    request = {
        "model": str(folder),
        "texts": list(texts),
        "dtypes": list(dtypes),
        "device": device,
        "alternatives": alternatives,
    }
    environment = {k: v for k, v in os.environ.items() if k in PASSED_ON}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    if "PYTHONPATH" in os.environ:  # a container's packages may come through it
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    try:
        done = subprocess.run(
            [str(python), str(SCRIPT)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=SCRIPT_LIMIT,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise _failed(f"{python}: {exc}") from exc
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        words = done.stderr.strip().splitlines()
        raise _failed(f"exit {done.returncode}: {words[-1] if words else 'no output'}")
    answer = json.loads(lines[-1])
    origin = f"transformers {answer['versions']['transformers']}, torch {answer['versions']['torch']}, {device}"
    return Transformers(
        sets={
            dtype: ReferenceSet(origin, dtype, _by_text(texts, coded), model=str(folder))
            for dtype, coded in answer["vectors"].items()
        },
        alternatives={name: _by_text(texts, coded) for name, coded in answer["alternatives"].items()},
        skipped=answer["skipped"],
        appends_eos=answer["appends_eos"],
        versions=answer["versions"],
    )


def _failed(words: str) -> UnfitError:
    return UnfitError(
        "reference_failed",
        f"the transformers reference did not run: {words}",
        "`qwen3emb engine check`; --no-transformers leaves this comparison out",
    )


def _by_text(texts: Sequence[str], coded: Sequence[str | None]) -> dict[str, tuple[float, ...]]:
    return {t: tuple(from_base64(c)) for t, c in zip(texts, coded, strict=True) if c is not None}


def save(reference: ReferenceSet, path: Path) -> None:
    """Write the set as JSON, whole or not at all. Raises UnfitError (`unwritable`)."""
    body = {
        "schema": SCHEMA,
        "kind": "qwen3emb reference set",
        "origin": reference.origin,
        "dtype": reference.dtype,
        "model": reference.model,
        "fingerprint": dict(reference.fingerprint),
        "at": reference.at,
        "vectors": [{"text": t, "vector": to_base64(v)} for t, v in reference.vectors.items()],
    }
    write_whole(path, json.dumps(body, ensure_ascii=False, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file the user asked for: temporary, synced, renamed. Raises UnfitError (`unwritable`)."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as exc:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        raise UnfitError("unwritable", f"cannot write {path}: {exc.strerror}", "choose another path") from exc


def load(path: Path) -> ReferenceSet:
    """Read a saved set. Raises InvalidInputError (`bad_reference`) for anything else."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise ValueError(f"schema {body['schema']}, this version reads {SCHEMA}")
        vectors = {item["text"]: tuple(from_base64(item["vector"])) for item in body["vectors"]}
        if not vectors or len({len(v) for v in vectors.values()}) != 1:
            raise ValueError("no vectors, or of several widths")
        kinds = {"origin": str, "dtype": str, "model": str, "fingerprint": dict, "at": str}
        wrong = [name for name, kind in kinds.items() if not isinstance(body[name], kind)]
        if wrong:
            raise ValueError(f"its {wrong[0]} is {type(body[wrong[0]]).__name__}")
        return ReferenceSet(
            origin=f"{path.name}: {body['origin']}",
            dtype=body["dtype"],
            vectors=vectors,
            model=body["model"],
            fingerprint=body["fingerprint"],
            at=body["at"],
        )
    except OSError as exc:
        raise InvalidInputError(
            "bad_reference", f"cannot read {path}: {exc.strerror}", "`qwen3emb verify --save-reference FILE` makes one"
        ) from exc
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise InvalidInputError(
            "bad_reference", f"{path} is no reference set: {exc}", "`qwen3emb verify --save-reference FILE` makes one"
        ) from exc


def config_hash(folder: Path) -> str | None:
    """What identifies a demo checkpoint: its config names seed and shape, and its weights follow from them."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def demo_set(folder: Path) -> ReferenceSet | None:
    """The shipped float32 vectors of the default demo checkpoint, if the folder holds exactly that."""
    reference = load(DEMO_SET)
    return reference if reference.fingerprint.get("config") == config_hash(folder) else None
