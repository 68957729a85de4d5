"""Whose vectors these are, by their angles to each other: signs, order and rotation of the components change none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt

from qwen3emb_launch.demo_model import DemoShape
from qwen3emb_launch.vectors import distance
from qwen3emb_launch.verify.reference import DEMO_SET, load
from qwen3emb_launch.verify.session import Session, Vector
from qwen3emb_launch.verify.texts import BASE
from qwen3emb_launch.verify.tolerance import Precision


def serves_demo(session: Session) -> bool:
    """Whether it serves the demo checkpoint: as it says, or as all angles between BASE tell where it says nothing.

    No model that was trained for anything has these angles. One that names its checkpoint is believed.
    """
    identity = session.identity
    if identity.demo or identity.folder is not None or identity.catalog is not None:
        return identity.demo
    reference = load(DEMO_SET)
    if session.width != reference.width or any(len(v) != reference.width for v in session.base):
        return False
    seen = dict(zip(BASE, session.base, strict=True))
    return same_angles(seen, reference.vectors, demo_precision(session).distance, reference.width)


def demo_precision(session: Session) -> Precision:
    """The endpoint's number format over the demo's few layers."""
    return replace(session.precision, layers=DemoShape.layers)


def same_angles(seen: Mapping[str, Vector], right: Mapping[str, Vector], allowed: float, width: int) -> bool:
    """Whether the texts lie to each other as they should, whatever the basis; three pairs at least."""
    texts = list(seen)
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    # Errors of size e in random directions change a cosine by about e / sqrt(dims).
    slack = 4 * sqrt(2 * allowed / width)
    return len(pairs) >= 3 and all(
        abs(distance(seen[a], seen[b]) - distance(right[a], right[b])) <= slack for a, b in pairs
    )
