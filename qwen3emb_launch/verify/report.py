"""What a verification found: one frozen Report, rendered as JSON by the envelope and as Markdown here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Level = Literal["quick", "full"]


class Verdict(StrEnum):
    """FAIL only ever comes from a required check; an advisory one that does not hold is a WARN."""

    PASS = "pass"  # noqa: S105 - a verdict
    FAIL = "fail"
    WARN = "warn"
    SKIP = "skip"


@dataclass(frozen=True)
class Outcome:
    """What one probe found. `holds` None means it could not be asked, `cause` then says why."""

    holds: bool | None
    expected: str
    seen: str
    cause: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    advisory: bool = False  # this finding does not make the vectors wrong, whatever the probe's rank


def held(expected: str, seen: str, **figures: Any) -> Outcome:
    """The check holds."""
    return Outcome(True, expected, seen, figures=figures)


def broken(expected: str, seen: str, cause: str, *, advisory: bool = False, **figures: Any) -> Outcome:
    """The check does not hold; `cause` names the likely fault and, where known, the way out."""
    return Outcome(False, expected, seen, cause, figures, advisory)


def skipped(reason: str) -> Outcome:
    """The check could not be asked."""
    return Outcome(None, "", "", reason)


@dataclass(frozen=True)
class Check:
    """One line of the table. `cause` is the likely fault of a FAIL or WARN, the reason of a SKIP.

    `seconds` and `requests` are what asking took; a text's vector is asked once, by the first check that needs it.
    """

    id: str
    title: str
    required: bool
    verdict: Verdict
    expected: str
    seen: str
    cause: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    requests: int = 0


@dataclass(frozen=True)
class Report:
    """A verification, complete. `seconds` is its wall time, `requests` what it asked, `at` UTC in ISO 8601."""

    endpoint: str
    model: str
    level: Level
    checks: tuple[Check, ...]
    fingerprint: Mapping[str, Any]
    width: int | None
    precision: str
    seconds: float
    requests: int
    tool: str
    at: str
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema: int = 1

    @property
    def passed(self) -> bool:
        """Whether all required checks hold."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The required checks that do not hold."""
        return tuple(c for c in self.checks if c.verdict is Verdict.FAIL)

    def count(self, verdict: Verdict) -> int:
        """How many checks ended so."""
        return sum(c.verdict is verdict for c in self.checks)

    @property
    def summary(self) -> str:
        """One sentence: `17 passed, 1 warning, 2 skipped in 2.1 s`."""
        warnings = self.count(Verdict.WARN)
        parts = [
            f"{self.count(Verdict.PASS)} passed",
            *([f"{len(self.failures)} FAILED"] if self.failures else []),
            *([f"{warnings} warning{'s' * (warnings != 1)}"] if warnings else []),
            *([f"{self.count(Verdict.SKIP)} skipped"] if self.count(Verdict.SKIP) else []),
        ]
        return f"{', '.join(parts)} in {self.seconds:.1f} s ({self.requests} requests)"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, `passed` and `summary` beside the fields."""
        from dataclasses import fields

        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "passed": self.passed,
            "summary": self.summary,
        }


def markdown(report: Report) -> str:
    """The report as a Markdown page: a verdict, the table, causes, the fingerprint."""
    lines = [
        f"# Verification of {report.endpoint}",
        "",
        f"**{'Passed' if report.passed else 'FAILED'}**: {report.summary}.",
        "",
        f"Model `{report.model}`, level {report.level}, precision {report.precision}, "
        f"{report.width or 'unknown'} dims, {report.at}, {report.tool}.",
        "",
        "| check | verdict | expected | seen | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {_cell(c.title)}{'' if c.required else ' (advisory)'} | {c.verdict} | {_cell(c.expected)} "
            f"| {_cell(c.seen)} | {c.seconds:.2f} |"
            for c in report.checks
        ),
        "",
    ]
    noted = [c for c in report.checks if c.cause]
    if noted:
        lines += ["## Causes and reasons", "", *(f"- **{c.title}** ({c.verdict}): {c.cause}" for c in noted), ""]
    lines += ["## Fingerprint", "", f"`{report.fingerprint.get('id', 'unknown')}`", "", "| part | value |", "|---|---|"]
    parts: Mapping[str, Any] = report.fingerprint.get("parts", {})
    lines += [f"| {name} | {_cell('unknown' if value is None else str(value))} |" for name, value in parts.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
