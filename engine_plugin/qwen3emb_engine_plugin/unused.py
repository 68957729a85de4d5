"""Packages that transformers imports because they are there, and a server of Qwen3's vectors never calls.

Its losses for detecting objects want scipy, its quantizers torchao, its assisted generation sklearn (and that pandas,
where that is installed): a tenth of the import. While the import lasts, its own questions whether they are there
are answered no, and the modules that asked go on as where they are not installed. Who imports them by itself gets them,
and what is imported later is told the truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

QUESTIONS = ("is_scipy_available", "is_sklearn_available", "is_torchao_available")


def fits(config: Mapping[str, Any], arguments: Sequence[str]) -> bool:
    """Whether nothing asks for what would be left out: a Qwen3 as it was trained, served by SGLang's own classes."""
    words = " ".join(arguments)
    return (
        config.get("architectures") == ["Qwen3ForCausalLM"]
        and not config.get("quantization_config")
        and "torchao" not in words
        and "--model-impl" not in words
    )


@contextmanager
def said_to_be_missing() -> Iterator[None]:
    """Let transformers believe that they are not installed while this lasts."""
    import transformers.utils
    from transformers.utils import import_utils

    def missing(*_: Any, **__: Any) -> bool:
        return False

    asked = [(place, name) for place in (transformers.utils, import_utils) for name in QUESTIONS]
    stock = [(place, name, getattr(place, name)) for place, name in asked if hasattr(place, name)]
    for place, name, _ in stock:
        setattr(place, name, missing)
    try:
        yield
    finally:
        for place, name, function in stock:
            setattr(place, name, function)
