"""Imports point down only, siblings of L3 do not know each other, heavy packages stay where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "qwen3emb_launch"
NAME = "qwen3emb_launch"

# Top-level module or subpackage -> layer. A new part is added here, by a decision.
LAYERS = {
    part: layer
    for layer, parts in {
        0: "__init__ addresses errors lifecycle catalog facts paths results instructions profile progress variables",
        1: "planning argv profile_text vectors statistics cost unit_text",
        2: "engines engine_process hub gpu probe notify listening state demo_model files disk profile_files "
        "recorded_flags weights",
        3: "up verify bench tune gateway client embed doctor systemd deploy explain",
        4: "cli console __main__",
    }.items()
    for part in parts.split()
}

# Package -> the top-level modules that may import it. Nothing at all may import the engine.
RESERVED = {
    "typer": {"cli"},
    "rich": {"console", "cli"},
    "huggingface_hub": {"hub"},
    "modelscope_hub": {"hub"},
    "pynvml": {"gpu"},
    "sglang": set(),
    "torch": set(),
    "transformers": set(),
}
# Scripts that are executed by the engine environment's python, never imported by the launcher.
EXECUTED = "engine_scripts"


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if EXECUTED not in p.parts and "_profiles" not in p.parts)


def top(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Every dotted name the file imports, TYPE_CHECKING ones included: a type is a dependency too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found += [f"{module}.{alias.name}" for alias in node.names] if module == NAME else [module]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    """A module imports its own part and lower layers; leaves and adapters may know their like, use cases never."""
    part = top(path)
    assert part in LAYERS, f"{part} has no layer: add it to LAYERS"
    for name in imports(path):
        head, _, rest = name.partition(".")
        if head in RESERVED:
            assert part in RESERVED[head], f"{path.name} imports {head}"
        if head != NAME or not rest:
            continue
        other = rest.split(".")[0]
        if other not in LAYERS:  # a name of __init__, such as __version__
            continue
        down = LAYERS[other] < LAYERS[part] or LAYERS[other] == LAYERS[part] != 3
        assert other == part or down, f"{path.name} (L{LAYERS[part]}) imports {other} (L{LAYERS[other]})"
