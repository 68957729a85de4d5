"""What Tab offers for a value: the names that are there. What cannot be looked at offers nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from qwen3emb_launch.errors import LaunchError


def instances(incomplete: str) -> list[str]:
    """Instances, running or not."""

    def names() -> Iterator[str]:
        from qwen3emb_launch import state

        yield from (instance.name for instance in state.instances())

    return _beginning(incomplete, names())


def profiles(incomplete: str) -> list[str]:
    """Profiles. Not their variants: to bash a colon ends a word."""

    def names() -> Iterator[str]:
        from qwen3emb_launch import profile_files

        yield from (file.name for file in profile_files.available())

    return _beginning(incomplete, names())


def models(incomplete: str) -> list[str]:
    """The catalog's names and what is on this machine."""

    def names() -> Iterator[str]:
        from qwen3emb_launch import hub

        yield from (row.model for row in hub.rows())

    return _beginning(incomplete, names())


def engines(incomplete: str) -> list[str]:
    """Engine environments."""

    def names() -> Iterator[str]:
        from qwen3emb_launch.engines import record

        yield from record.names()

    return _beginning(incomplete, names())


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    found: list[str] = []
    with suppress(LaunchError, OSError):
        found += (name for name in names if name.startswith(incomplete))
    return found
