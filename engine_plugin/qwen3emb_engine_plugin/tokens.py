"""Token ids of many texts in one call of the Rust tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

PROBES = [
    "a",
    "  two  spaces, punctuation!? ",
    "Instruct: task\nQuery:vector search",
    "中文、émoji 🙂 and \u200b marks",
    "<|endoftext|><|im_end|> as text",
    "0123456789" * 40,
]


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts to ids, equal to `tokenizer(texts)["input_ids"]`; through the Rust object where that is the same."""

    def through_transformers(texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(texts)["input_ids"]
        return found

    backend = getattr(tokenizer, "_tokenizer", None)
    encode = getattr(backend, "encode_batch_fast", None) or getattr(backend, "encode_batch", None)
    if encode is None:
        return through_transformers

    def direct(texts: list[str]) -> list[list[int]]:
        if backend.truncation is not None or backend.padding is not None:  # someone set it for a call of theirs
            return through_transformers(texts)
        return [found.ids for found in encode(texts, add_special_tokens=True)]

    return direct if direct(PROBES) == through_transformers(PROBES) else through_transformers
