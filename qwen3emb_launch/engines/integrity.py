"""Is every file of an environment's packages there, as long as its RECORD says? Starts no python.

pip writes a package's RECORD last, and only then does it list the INSTALLER file: a package whose RECORD lacks it was
cut off half-way, though pip itself would take it for installed.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass
from pathlib import Path


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
    found = (_damage(dist) for dist in sorted(site_packages.glob("*.dist-info")))
    return [damage for damage in found if damage]


def forget_damaged(site_packages: Path) -> list[str]:
    """Make pip install damaged packages again by removing what says that they are there; their names."""
    names = []
    for damage in damages(site_packages):
        shutil.rmtree(damage.dist_info, ignore_errors=True)
        names.append(damage.package)
    return names


def _damage(dist_info: Path) -> Damage | None:
    package = dist_info.name.removesuffix(".dist-info").rpartition("-")[0] or dist_info.name

    def damaged(file: str, why: str) -> Damage:
        return Damage(package, file, why, dist_info)

    record = dist_info / "RECORD"
    try:
        rows = list(csv.reader(record.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError):
        return damaged(f"{dist_info.name}/RECORD", "is missing")
    if not any(row and row[0] == f"{dist_info.name}/INSTALLER" for row in rows):
        return damaged(f"{dist_info.name}/RECORD", "was never finished: its installation was cut off")
    for row in rows:
        # Compiled files have no size; Python writes them again.
        if len(row) < 3 or not row[2].isdigit() or row[0].endswith(".pyc"):
            continue
        try:
            size = (dist_info.parent / row[0]).stat().st_size
        except OSError:
            return damaged(row[0], "is missing")
        if size != int(row[2]):
            return damaged(row[0], f"has {size} bytes, not {row[2]}")
    return None
