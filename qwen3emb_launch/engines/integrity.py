"""Is every file of an environment's packages there, as long as its RECORD says? Starts no python.

pip writes a package's RECORD last, and only then does it list the INSTALLER file: a package whose RECORD lacks it was
cut off half-way, though pip itself would take it for installed.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path

# Administrators append their company's authority to it, on every Python of a machine: longer is not damaged.
GROWING = "certifi/cacert.pem"


@dataclass(frozen=True)
class Damage:
    """One package that is not whole. `file` is the first missing or shortened one, relative to site-packages."""

    package: str
    file: str
    why: str
    dist_info: Path

    def __str__(self) -> str:
        return f"{self.package}: {self.file} {self.why}"


def damages(site_packages: Path) -> list[Damage]:
    """Every damaged package of the folder, in order of name."""
    infos = sorted(site_packages.glob("*.dist-info"))
    records = {info: _rows(info) for info in infos}
    claims: dict[str, set[int]] = {}  # some packages ship a file of the same name: whichever came last is right
    for rows in records.values():
        for file, size in rows or ():
            claims.setdefault(file, set()).add(size)
    found = (_damage(info, rows, claims) for info, rows in records.items())
    return [damage for damage in found if damage]


def forget_damaged(site_packages: Path) -> list[str]:
    """Make pip install damaged packages again by removing what says that they are there; their names."""
    names = []
    for damage in damages(site_packages):
        shutil.rmtree(damage.dist_info, ignore_errors=True)
        names.append(damage.package)
    return names


def _rows(dist_info: Path) -> list[tuple[str, int]] | None:
    """Files and sizes of a finished RECORD, without compiled ones (Python writes those again); None otherwise."""
    try:
        text = (dist_info / "RECORD").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    rows = list(csv.reader(text.splitlines()))
    if not any(row and row[0] == f"{dist_info.name}/INSTALLER" for row in rows):
        return None
    return [(r[0], int(r[2])) for r in rows if len(r) > 2 and r[2].isdigit() and not r[0].endswith(".pyc")]


def _damage(dist_info: Path, rows: list[tuple[str, int]] | None, claims: dict[str, set[int]]) -> Damage | None:
    package = dist_info.name.removesuffix(".dist-info").rpartition("-")[0] or dist_info.name
    if rows is None:
        return Damage(package, f"{dist_info.name}/RECORD", "is missing or was never finished", dist_info)
    for file, expected in rows:
        try:
            size = (dist_info.parent / file).stat().st_size
        except OSError:
            return Damage(package, file, "is missing", dist_info)
        if size not in claims[file] and not (file == GROWING and size > expected):
            return Damage(package, file, f"has {size} bytes, not {expected}", dist_info)
    return None
