"""The engine plugin as a wheel, written with the standard library: no network, no build backend.

The sources are `engine_plugin/` of a checkout, or their copy inside the installed launcher.
"""

from __future__ import annotations

import base64
import hashlib
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen3emb_launch.errors import UnfitError

PACKAGE = "qwen3emb_engine_plugin"
# A fixed time in the archive: the same sources give the same bytes.
EPOCH = (2020, 1, 1, 0, 0, 0)


def build_plugin_wheel(out_dir: Path) -> Path:
    """Write `qwen3emb_engine_plugin-<version>-py3-none-any.whl` into `out_dir` and return its path.

    Raises UnfitError `plugin_missing` where the sources are not there, `folder_unwritable` where `out_dir` is not.
    """
    source = _source()
    project = _project(source)
    version = str(project["version"])
    info = f"{PACKAGE}-{version}.dist-info"
    files = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for path in sorted((source / PACKAGE).rglob("*.py"))
        if "__pycache__" not in path.parts
    }
    files[f"{info}/METADATA"] = _metadata(project)
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: qwen3emb\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = _entry_points(project)
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    wheel = out_dir / f"{PACKAGE}-{version}-py3-none-any.whl"
    try:
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, data)
    except OSError as error:
        raise UnfitError(
            "folder_unwritable", f"cannot write {wheel}: {error.strerror}", f"check the folder: ls -ld {out_dir}"
        ) from error
    return wheel


def version() -> str:
    """The plugin's version. Raises UnfitError `plugin_missing`."""
    return str(_project(_source())["version"])


def _project(source: Path) -> Mapping[str, Any]:
    project: Mapping[str, Any] = tomllib.loads((source / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def _source() -> Path:
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "_engine_plugin", package.parent / "engine_plugin"):
        if (candidate / "pyproject.toml").is_file() and (candidate / PACKAGE).is_dir():
            return candidate
    raise UnfitError(
        "plugin_missing",
        f"the engine plugin's sources are neither in {package / '_engine_plugin'} nor in {package.parent}",
        "install the launcher again: pip install --force-reinstall qwen3emb-launch",
    )


def _metadata(project: Mapping[str, Any]) -> bytes:
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {dependency}" for dependency in project["dependencies"]),
    ]
    return ("\n".join(lines) + "\n").encode()


def _entry_points(project: Mapping[str, Any]) -> bytes:
    lines: list[str] = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in points.items()), ""]
    return "\n".join(lines).encode()


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
