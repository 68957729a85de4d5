"""Every error says what to do next: the sources are read, so that one nobody provokes is held to it too."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3emb_launch import errors

PACKAGE = Path(errors.__file__).parent
KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.LaunchError)
}


def constructions() -> Iterator[tuple[str, str, ast.Call]]:
    """(place, kind, call) of every error that the package makes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                if name in KINDS:
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}", name, node


def hint_of(kind: str, call: ast.Call) -> ast.expr | str | None:
    """The hint as written; the default's text; None when there is none."""
    signature = inspect.signature(KINDS[kind])
    place = list(signature.parameters).index("hint")
    named = next((k.value for k in call.keywords if k.arg == "hint"), None)
    return named or (call.args[place] if len(call.args) > place else signature.parameters["hint"].default) or None


def never_empty(hint: ast.expr | str | None) -> bool:
    """Whether the expression cannot be the empty string, as far as its text tells."""
    if isinstance(hint, ast.Constant):
        return bool(hint.value)
    if isinstance(hint, ast.IfExp):
        return never_empty(hint.body) and never_empty(hint.orelse)
    return bool(hint)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"LaunchError"}))
def test_every_error_names_a_next_step(kind: str) -> None:
    """No construction of this kind of error leaves its hint out or empty."""
    made = [(place, call) for place, name, call in constructions() if name == kind]
    assert made
    assert [place for place, call in made if not never_empty(hint_of(kind, call))] == []


def test_codes_are_words_for_programs() -> None:
    """A code written down is lower case with underscores, so that it can be matched and never changes with values."""
    written = [
        (place, call.args[0].value)
        for place, kind, call in constructions()
        if kind != "InterruptedByUser" and call.args and isinstance(call.args[0], ast.Constant)
    ]
    assert len(written) > 100
    assert [w for w in written if not str(w[1]).replace("_", "").isalnum() or w[1] != str(w[1]).lower()] == []
