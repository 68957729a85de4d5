"""Models that are already here. No network, no hub client, nothing written but the demo model."""

from __future__ import annotations

from pathlib import Path

from qwen3emb_launch.catalog import CATALOG
from qwen3emb_launch.demo_model import DEMO_NAME, make_demo_model
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.facts import ModelFacts
from qwen3emb_launch.hub import huggingface, records
from qwen3emb_launch.hub.checkpoint import read_checkpoint
from qwen3emb_launch.hub.names import DEMO, ModelName
from qwen3emb_launch.hub.records import Record
from qwen3emb_launch.paths import paths


def demo() -> ModelFacts:
    """The demo model, made now unless it is there. Raises UnfitError when the disk refuses."""
    return _facts(DEMO, demo_folder(make=True), DEMO, None, None)


def demo_folder(*, make: bool = False) -> Path:
    """Where the demo model is, or will be."""
    folder = paths().demo_models / DEMO_NAME
    return make_demo_model(folder) if make else folder


def from_folder(folder: Path) -> ModelFacts:
    """A folder of the user's own. Raises InvalidInputError naming what is wrong with it."""
    return _facts(str(folder), folder, "folder", None, None)


def from_record(record: Record, name: ModelName) -> ModelFacts:
    """The facts of a download. Raises InvalidInputError when its files are not what they were."""
    key = name.model.key if name.model else None
    try:
        return _facts(name.short, record.folder, record.source, record.commit, key)
    except InvalidInputError as error:
        error.hint = f"qwen3emb models verify {name.short} --repair"
        raise


def find(name: ModelName, revision: str | None, source: str = "auto") -> Record | None:
    """The download that serves `name`: the newest complete one, or what another tool put into the shared cache.

    `revision` may be a branch that was asked for, or a commit (its first 7 characters do).
    """
    known = [r for r in records.read_all(name.repo) if source in ("auto", r.source)]
    for record in known:
        if record.named(revision) and record.complete():
            return record
    if source == "modelscope":
        return None
    adopted = huggingface.adopt(name.repo, revision)
    if adopted is None or adopted.pin in [r.pin for r in known]:  # a record knows better that files are missing
        return None
    return adopted if _is_whole(adopted) else None


def downloads() -> list[Record]:
    """Every download on this machine: our records, and the catalog's models that other tools fetched."""
    found = records.read_all()
    seen = {(r.source, r.repo, r.commit) for r in found}
    for model in CATALOG.values():
        adopted = huggingface.adopt(model.hub_id, None)
        if adopted is not None and (adopted.source, adopted.repo, adopted.commit) not in seen:
            found.append(adopted)
    return found


def _is_whole(record: Record) -> bool:
    """Whether a snapshot that we did not make can be served."""
    try:
        read_checkpoint(record.folder)
    except InvalidInputError:
        return False
    return True


def _facts(name: str, folder: Path, source: str, revision: str | None, key: str | None) -> ModelFacts:
    found = read_checkpoint(folder)
    return ModelFacts(
        name=name,
        path=folder,
        source=source,
        revision=revision,
        shape=found.shape,
        weight_bytes=found.weight_bytes,
        eos_token_id=found.eos_token_id,
        catalog_key=key,
        warnings=found.warnings,
    )
