"""The table of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Sequence

from faults.strike import Row

HEAD = ("fault", "sent", "failed", "wrong", "longest gap", "noticed", "sure, of", "recovery", "start", "what was seen")


def markdown(rows: Sequence[Row]) -> str:
    """A row a fault; times in seconds, `start` is the same instance's own start."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    for row in rows:
        cells = [row.fault, *(str(n) if row.sent else "" for n in (row.sent, row.failed, row.wrong))]
        watchdog = f"{seconds(row.sure)} of {row.period:.0f}" if row.sure is not None and row.period else ""
        cells += [seconds(row.gap), seconds(row.noticed), watchdog, seconds(row.recovery), seconds(row.start)]
        cells.append(row.seen + "".join(f" **MISS: {miss}**" for miss in row.misses))
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def seconds(value: float | None) -> str:
    """Two digits where they matter; empty when there is nothing to say."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
