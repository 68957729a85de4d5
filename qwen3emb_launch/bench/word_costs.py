"""What words cost by a tokenizer's own file: asked only where the endpoint's counts leave it open (`calibrate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def word_costs(file: Path, words: Sequence[str]) -> Mapping[str, int] | None:
    """Tokens of each word behind a space, without what is added to a text; None for a file that cannot be read."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001 - it raises bare Exceptions, and the endpoint's counts do without it
        return None
    encoded = tokenizer.encode_batch([f" {word}" for word in words], add_special_tokens=False)
    return {word: len(found.ids) for word, found in zip(words, encoded, strict=True)}
