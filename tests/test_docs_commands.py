"""Every command in README and docs/ is one that the program takes; those that need no engine are run as they stand."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.exceptions import TyperException

from qwen3emb_launch import gpu
from qwen3emb_launch.cli.app import build, run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "cli.md")]
# What answers from this machine alone, in order: a later one may need what an earlier one made.
CHEAP = (
    "profiles", "cost --hardware-price", "models list", "engine list", "systemd show", "status",
    "doctor --command",
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A command line as a page has it, and the lines that the page shows below it as its output.

    `named`: it stands in prose, where it may be only a command's name.
    """

    page: str
    line: str
    output: tuple[str, ...] = ()
    named: bool = False

    @property
    def words(self) -> list[str]:
        """The words after `qwen3emb`; what a shell does itself (comments, variables, files, pipes) is left out."""
        words = shlex.split(self.line, comments=True)
        words = words[words.index("qwen3emb") + 1 :]
        end = next((i for i, word in enumerate(words) if word in ("<", ">", "|", "&&", ";")), len(words))
        return words[:end]


def examples() -> Iterator[Example]:
    """Fenced blocks line by line, continued lines joined; in prose, code that begins with the program's name."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fenced = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
        for block in fenced.finditer(text):
            if block[1] not in ("python", "json", "yaml", "text"):
                yield from _of_block(page.name, block[2].replace("\\\n", " "))
        for code in re.findall(r"`(qwen3emb [^`]*)`", fenced.sub("", text)):
            if not re.search(r"…|\.\.\.|\b[A-Z]{2,}\b|\[|\|", code):  # a pattern, not a command
                yield Example(page.name, " ".join(code.split()), named=True)


def _of_block(page: str, block: str) -> Iterator[Example]:
    lines = block.splitlines()
    for i, line in enumerate(lines):
        if re.match(r"(\$ )?(sudo )?(\w+=\S+ )*qwen3emb ", line):
            below = []
            if line.startswith("$ "):
                rest = lines[i + 1 :]
                below = rest[: next((n for n, other in enumerate(rest) if other.startswith("$ ")), len(rest))]
            yield Example(page, line, tuple(below))


EXAMPLES = list(dict.fromkeys(examples()))
CHEAP_ONES = [e for start in CHEAP for e in EXAMPLES if " ".join(e.words).startswith(start) and not e.named]


def label(example: Example) -> str:
    return f"{example.page}: {' '.join(example.words)}"


@pytest.fixture(scope="module")
def program():
    return typer.main.get_command(build())


def test_there_are_examples_to_check() -> None:
    """The pages are read as meant: each has commands, and some show their output."""
    assert len(EXAMPLES) > 80
    assert sum(1 for e in CHEAP_ONES if e.output) >= 1
    assert {e.page for e in EXAMPLES} >= {"README.md", "README.zh-CN.md", "up.md", "models.md", "systemd.md"}


@pytest.mark.parametrize("example", EXAMPLES, ids=label)
def test_command_in_the_docs_is_taken(
    example: Example, program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command, options and values are understood. Files named in it are there for once."""
    monkeypatch.chdir(tmp_path)
    words = example.words
    for word in words:
        if re.fullmatch(r"(\./)?[\w-]+\.(json|html|md|yaml|txt|parquet)|key", word):
            Path(word).write_text("{}")
    command, context, name = program, None, "qwen3emb"
    while True:
        try:
            context = command.make_context(name, list(words), parent=context)
        except typer.Exit:
            assert words[-1] == "--help"
            return
        except TyperException as refused:
            if example.named and re.search("Missing argument|requires an argument", refused.format_message()):
                return
            raise
        rest = [*context._protected_args, *context.args] if hasattr(command, "commands") else []
        if not rest:
            return
        name, command, words = command.resolve_command(context, rest)


@pytest.mark.parametrize("example", CHEAP_ONES, ids=label)
def test_cheap_command_in_the_docs_does_what_it_says(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs and exits 0 (a judged command of others may be found bad: 1); output that is shown is how it begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "inventory", lambda *_: [])
    if example.words[:2] == ["profiles", "validate"]:
        assert run(["profiles", "new", "office", "--from", "rtx4090"]) == 0
        capsys.readouterr()
    status = run(example.words)
    out, err = capsys.readouterr()
    assert status in ((0, 1) if example.words[0] == "doctor" else (0,)), err
    if example.output:
        assert cells(out.splitlines())[: len(cells(example.output))] == cells(example.output)


def cells(lines: Iterable[str]) -> list[list[str]]:
    """Rows by cell: a terminal aligns columns, a pipe has tabs. Empty rows at the end are not shown."""
    rows = [re.split(r"\t| {2,}", line.strip()) for line in lines]
    while rows and rows[-1] == [""]:
        rows.pop()
    return rows
