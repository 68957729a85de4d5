"""Write the generated pages of docs/ again: the CLI reference and the profile schema. `make docs` runs it.

tests/test_docs.py compares: a page that drifted from the code fails.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
WIDTH = "100"


def cli_reference() -> str:
    """`docs/cli.md`: the help of every command, as the terminal shows it."""
    os.environ.update({"COLUMNS": WIDTH, "TERMINAL_WIDTH": WIDTH, "NO_COLOR": "1", "TERM": "dumb"})
    import typer
    from typer.testing import CliRunner

    from qwen3emb_launch.cli.app import build, outline

    app = build()
    runner = CliRunner()
    parts = [
        "# Command reference",
        "",
        "Written by `make docs` from the commands themselves. Every command takes `--json`; exit statuses: 0 ok, 1 the",
        "check or operation failed, 2 invalid input, 3 surroundings not fit, 4 engine failed, 5 network or hub,",
        "130 interrupted.",
        "",
    ]
    for words in command_paths(typer.main.get_command(app)):
        shown = runner.invoke(
            app if words else outline(), [*words, "--help"], prog_name="qwen3emb", terminal_width=int(WIDTH)
        )
        assert shown.exit_code == 0, (words, shown.output)
        text = "\n".join(line.rstrip() for line in shown.stdout.strip("\n").splitlines())
        parts += [f"## {' '.join(['qwen3emb', *words])}", "", "```text", text, "```", ""]
    return "\n".join(parts)


def command_paths(command: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The root, every group and every command, in the order of `--help`."""
    found = [above]
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            found += command_paths(child, (*above, name))
    return found


def profile_schema() -> str:
    """`docs/profile.schema.json`: for editors, and for whoever writes profiles by program."""
    from qwen3emb_launch.profile import Profile

    return json.dumps(Profile.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


PAGES = {"cli.md": cli_reference, "profile.schema.json": profile_schema}


def main() -> None:
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
        print(DOCS / name)


if __name__ == "__main__":
    main()
