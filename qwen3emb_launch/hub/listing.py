"""What a hub says a repository holds, and which of it serving needs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3emb_launch.errors import InvalidInputError

_NEEDED = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "model.safetensors.index.json",
        # How sentence-transformers reads the checkpoint: small, and they say which pooling its author meant.
        "modules.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }
)
_SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub lists it. Large files carry their sha256, small ones git's sha1 of the blob."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def expected(self) -> str | None:
        """`sha256:…` or `git:…`, the strongest that the hub gave; None when it gave none."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        return f"git:{self.git_sha1}" if self.git_sha1 else None

    def hasher(self) -> Any:
        """A fresh hash object of the kind that `expected` names; git hashes a header with the size first."""
        if self.sha256 or not self.git_sha1:
            return hashlib.sha256()
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(b"blob %d\0" % self.size)
        return digest

    def found(self, digest: Any) -> str:
        """The form of `expected`, for a hash object fed with the whole content."""
        return f"{'git' if digest.name == 'sha1' else 'sha256'}:{digest.hexdigest()}"


@dataclass(frozen=True)
class Listing:
    """A repository at one revision. `commit` is what the revision stood for at that time; None if the hub hides it."""

    source: str
    repo: str
    revision: str
    commit: str | None
    files: tuple[RemoteFile, ...]

    @property
    def pin(self) -> str:
        """The name of exactly these files, as far as the hub can tell."""
        return self.commit or self.revision

    @property
    def total_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum(f.size for f in self.files)


def needed(files: tuple[RemoteFile, ...], repo: str) -> tuple[RemoteFile, ...]:
    """Only what serving reads: configuration, tokenizer, safetensors. Never pickles, ONNX, GGUF or cards.

    Raises InvalidInputError: `not_a_model` (no config.json), `pickle_only`, `no_weights`.
    """
    by_path = {f.path: f for f in files}
    if "config.json" not in by_path:
        raise InvalidInputError("not_a_model", f"{repo} has no config.json", "is it a model repository?")
    sharded = "model.safetensors.index.json" in by_path
    weights = [f for f in files if (_SHARD.fullmatch(f.path) if sharded else f.path == _SINGLE)]
    if not weights:
        raise no_weights(repo, [f.path for f in files])
    return tuple(sorted([f for f in files if f.path in _NEEDED] + weights, key=lambda f: f.path))


def no_weights(where: str, paths: list[str]) -> InvalidInputError:
    """The error for a checkpoint without safetensors, telling pickles from nothing at all."""
    pickles = [p for p in paths if p.endswith(PICKLES)]
    if pickles:
        return InvalidInputError(
            "pickle_only",
            f"{where} has its weights only as pickles ({', '.join(pickles[:3])}), which run code when loaded",
            "convert them to safetensors first, or use the model's official checkpoint",
        )
    return InvalidInputError(
        "no_weights", f"{where} has no model.safetensors and no shards of one", "is the checkpoint complete?"
    )


def hash_file(path: Path, file: RemoteFile) -> str:
    """The content's hash in the form of `file.expected`. Raises OSError."""
    digest = file.hasher()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return file.found(digest)
