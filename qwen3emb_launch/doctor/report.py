"""What a check says. A fact that could not be had is `unknown`, never `ok`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """`fail`: serving will not work, or gives wrong vectors. `warn`: it works, with a cost or a risk."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Check:
    """One line. `says` carries the values seen; `mend` is the next command, empty where nothing needs mending."""

    name: str
    status: Status
    says: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    """Every check in order, and how many of each."""

    checks: tuple[Check, ...]

    def count(self, status: Status) -> int:
        """How many checks ended like this."""
        return sum(check.status is status for check in self.checks)

    def to_dict(self) -> dict[str, object]:
        """Plain data for `--json`."""
        return {
            "summary": {status.value: self.count(status) for status in Status},
            "checks": [{"name": c.name, "status": c.status.value, "says": c.says, "mend": c.mend} for c in self.checks],
        }


def ok(name: str, says: str) -> Check:
    """Nothing to do."""
    return Check(name, Status.OK, says)


def warn(name: str, says: str, mend: str) -> Check:
    """It works, and could be better or safer."""
    return Check(name, Status.WARN, says, mend)


def fail(name: str, says: str, mend: str) -> Check:
    """It does not work like this."""
    return Check(name, Status.FAIL, says, mend)


def unknown(name: str, says: str, mend: str = "") -> Check:
    """Could not be found out; `mend` says how to, where there is a way."""
    return Check(name, Status.UNKNOWN, says, mend)
