"""The docs say what the code does: generated pages are current, every command has a page, both READMEs agree."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["cli.md", "profile.schema.json"])
def test_generated_pages_are_current(page: str) -> None:
    """A changed option or field without `make docs` fails here."""
    code = f"import runpy; m = runpy.run_path({str(DOCS / 'generate.py')!r}); print(m['PAGES'][{page!r}](), end='')"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (DOCS / page).read_text(encoding="utf-8") == fresh, "run `make docs`"


def commands() -> list[tuple[str, ...]]:
    import typer

    from qwen3emb_launch.cli.app import build

    return [words for words in generator().command_paths(typer.main.get_command(build())) if words]


def test_every_command_has_a_page_and_an_example() -> None:
    """Each command is used in a page of docs/ that a person wrote, and its help shows an example."""
    pages = "\n".join(p.read_text(encoding="utf-8") for p in DOCS.glob("*.md") if p.name != "cli.md")
    pages += (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [words for words in commands() if f"qwen3emb {' '.join(words)}" not in pages]
    assert not missing
    reference = (DOCS / "cli.md").read_text(encoding="utf-8")
    sections = dict(
        re.findall(r"^## (qwen3emb [^\n]*)\n\n```text\n(.*?)```", reference, flags=re.MULTILINE | re.DOTALL)
    )
    leaves = [w for w in commands() if not any(o[: len(w)] == w and o != w for o in commands())]
    without = [w for w in leaves if sections[f"qwen3emb {' '.join(w)}"].count("qwen3emb") < 2]
    assert not without, "help without an example"


def test_help_shows_every_word_of_it() -> None:
    """What stands in brackets is text, not markup; a paragraph's lines end where the terminal's do."""
    import typer

    from qwen3emb_launch.cli.app import build

    reference = (DOCS / "cli.md").read_text(encoding="utf-8")
    for words in commands():
        command = typer.main.get_command(build())
        for word in words:
            command = command.commands[word]
        shown = reference.split(f"## qwen3emb {' '.join(words)}\n", 1)[1].split("\n## ", 1)[0]
        helps = [p.help for p in command.params if getattr(p, "help", None) and not getattr(p, "hidden", False)]
        lost = {w for text in helps for w in text.replace("\\[", "[").split()} - set(shown.split())
        assert not lost, words
        prose = shown.split("```text\n")[1].split("╭")[0].splitlines()
        full = [len(line) + len(after.split()[0]) > 97 for line, after in pairwise(prose) if line and after]
        assert all(full), words


def test_links_lead_somewhere() -> None:
    """No relative link in README or docs/ is broken."""
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    links = [
        (page, t) for page in pages for t in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    ]
    local = [(page, t) for page, t in links if "://" not in t and not t.startswith("mailto:")]
    broken = [f"{page.relative_to(ROOT)} -> {t}" for page, t in local if not (page.parent / t).exists()]
    assert not broken


def test_chinese_readme_keeps_step() -> None:
    """The two READMEs have the same headings' shape, the same code blocks and the same figures in tables."""
    english, chinese = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))

    def shape(text: str) -> tuple[list[str], list[str], list[str]]:
        code = re.findall(r"```\w*\n.*?```", text, flags=re.DOTALL)
        prose = re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL)
        headings = re.findall(r"^#+", prose, flags=re.MULTILINE)
        rows = [re.sub(r"[^0-9.|]", "", line) for line in prose.splitlines() if line.startswith("|")]
        commands_only = [re.sub(r"#.*", "", block) for block in code]
        return headings, commands_only, rows

    assert shape(english) == shape(chinese)
