"""What is known of the Qwen3-Embedding models, and the same facts read from any checkpoint's config.

Sources: the model cards' config.json and safetensors indexes; parameter counts are computed from the shapes and
confirmed by the published file sizes (two bytes a parameter plus about 40 kB of header).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen3emb_launch.errors import InvalidInputError, nearest

SCORES_SOURCE = "README.md of github.com/QwenLM/Qwen3-Embedding, not measured here"
MIN_DIMS = 32  # the smallest Matryoshka slice the models were trained for


@dataclass(frozen=True)
class ModelShape:
    """The numbers that decide memory and speed. Bytes are bytes, lengths are tokens."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    dtype: str = "bfloat16"

    @property
    def parameters(self) -> int:
        """Parameters of the body: embedding, layers and final norm; embedding checkpoints carry no lm_head."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 2 * self.head_dim
        mlp = 3 * self.hidden_size * self.mlp_size
        return (
            self.vocab_size * self.hidden_size
            + self.layers * (attention + mlp + 2 * self.hidden_size)
            + self.hidden_size
        )

    @property
    def linear_parameters(self) -> int:
        """Parameters of the layers' matrix products: what each token is multiplied by, and what fp8 halves."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden_size * self.mlp_size)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Key and value bytes one token takes in the pool, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations a token of a text of `length` tokens, causal attention counted exactly once."""
        return 2.0 * self.linear_parameters + 2.0 * self.layers * self.heads * self.head_dim * length


@dataclass(frozen=True)
class CatalogModel:
    """One official checkpoint. `file_bytes` is the published size of its safetensors.

    `scores` are the authors' own, benchmark -> (mean over tasks, mean over task types), from SCORES_SOURCE.
    """

    key: str
    hub_id: str
    shape: ModelShape
    card_context: int
    file_bytes: int
    files: int
    eos_token_id: int = 151643  # <|endoftext|>, appended by the tokenizer and pooled; not the config's eos (151645)
    licence: str = "Apache-2.0"
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def _shape(hidden: int, layers: int, heads: int, mlp: int, vocab: int, positions: int, tied: bool) -> ModelShape:
    return ModelShape(hidden, layers, heads, 8, 128, mlp, vocab, positions, tied)


def _scores(*pairs: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict(zip(("MTEB multilingual", "MTEB English v2", "C-MTEB"), pairs, strict=True))


CATALOG: dict[str, CatalogModel] = {
    m.key: m
    for m in (
        CatalogModel(
            key="0.6b",
            hub_id="Qwen/Qwen3-Embedding-0.6B",
            shape=_shape(1024, 28, 16, 3072, 151669, 32768, True),
            card_context=32768,
            file_bytes=1_191_586_416,
            files=1,
            scores=_scores((64.33, 56.00), (70.70, 64.88), (66.33, 67.45)),
        ),
        CatalogModel(
            key="4b",
            hub_id="Qwen/Qwen3-Embedding-4B",
            shape=_shape(2560, 36, 32, 9728, 151665, 40960, True),
            card_context=32768,
            file_bytes=8_043_592_088,
            files=2,
            scores=_scores((69.45, 60.86), (74.60, 68.10), (72.27, 73.51)),
        ),
        CatalogModel(
            key="8b",
            hub_id="Qwen/Qwen3-Embedding-8B",
            shape=_shape(4096, 36, 32, 12288, 151665, 40960, False),
            card_context=32768,
            file_bytes=15_134_634_568,
            files=4,
            scores=_scores((70.58, 61.69), (75.22, 68.71), (73.84, 75.00)),
        ),
    )
}


def find_model(name: str) -> CatalogModel | None:
    """The catalog entry for a short name or a hub id (any case), or None for a model of the user's own."""
    wanted = name.strip().lower()
    for model in CATALOG.values():
        if wanted in (model.key, model.hub_id.lower()):
            return model
    return None


def unknown_model(name: str) -> InvalidInputError:
    """The error for a name that is neither in the catalog, nor a hub id, nor a folder."""
    known = [*CATALOG, *(m.hub_id for m in CATALOG.values()), "demo"]
    guess = nearest(name, known)
    hint = f"did you mean {guess!r}? " if guess else ""
    return InvalidInputError(
        "unknown_model",
        f"no model {name!r}: not one of {', '.join([*CATALOG, 'demo'])}, not a hub id (owner/name), not a folder",
        f"{hint}`qwen3emb models list` shows the known ones",
    )


def shape_from_config(config: Mapping[str, Any]) -> ModelShape:
    """A checkpoint's shape from its config.json.

    Raises InvalidInputError (`not_qwen3`, `bad_config`) when it is another architecture or a number is missing.
    """
    kind = config.get("model_type")
    if kind != "qwen3":
        raise InvalidInputError(
            "not_qwen3",
            f"config.json says model_type {kind!r}; this serves Qwen3 embedding checkpoints (model_type 'qwen3')",
            "give a Qwen3-Embedding model or a fine-tune of one",
        )
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return ModelShape(
            hidden_size=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            mlp_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            max_positions=int(config["max_position_embeddings"]),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
        )
    except (KeyError, TypeError, ValueError) as exc:
        raise InvalidInputError(
            "bad_config", f"config.json lacks a usable {exc}", "is the checkpoint complete?"
        ) from exc
