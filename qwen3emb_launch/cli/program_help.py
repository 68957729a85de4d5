"""The program's own help, drawn like Typer draws a command's, without what Typer imports for it.

Typer's renderer loads a Markdown parser and a syntax highlighter (50 ms) before it draws two boxes; the first thing a
user types should answer at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.panel import Panel


class ProgramGroup(TyperGroup):
    """The root group: usage, options, and each command with the first sentence of its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        from rich.console import Console
        from rich.padding import Padding

        out = Console(highlight=False)
        out.print(Padding(f"Usage: [bold]{ctx.command_path}[/] OPTIONS COMMAND ...\n\n{self.help}", 1))
        records = [(p.get_help_record(ctx), p) for p in self.get_params(ctx)]
        out.print(_box("Options", [(record[0], record[1]) for record, _ in records if record]))
        commands = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        out.print(_box("Commands", [(name, first_sentence(c.help or "")) for name, c in commands if not c.hidden]))
        out.print(Padding(self.epilog or "", 1))


def first_sentence(text: str) -> str:
    """A help text's first sentence, on one line."""
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    head, stop, _ = paragraph.partition(". ")
    return head + stop.strip()


def _box(title: str, rows: Iterable[tuple[str, str]]) -> Panel:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for name, said in rows:
        table.add_row(Text(name, "bold cyan"), Text(said))
    return Panel(table, title=title, title_align="left", border_style="dim")
