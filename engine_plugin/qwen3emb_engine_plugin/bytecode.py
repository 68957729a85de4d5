"""Bytecode of the modules that are imported, kept where Python itself keeps none.

Packages that were installed without being compiled (by uv, in a container image) are compiled at every start where
their folder cannot be written or PYTHONDONTWRITEBYTECODE is set: some 6,000 modules, two thirds of the import. Here
such modules are compiled once, into a folder of this user; what lies beside its source is used from there as ever.
Python's own rule holds, a source whose time or size has changed is compiled anew, and other packages on the path mean
another folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any


def keep(package: str = "sglang") -> str | None:
    """From now on, keep what Python would compile in vain, if it would. Returns why that cannot be done, or None."""
    spec = importlib.util.find_spec(package)
    if sys.pycache_prefix is not None or spec is None or not spec.origin:
        return None  # somebody has chosen a folder
    if not sys.dont_write_bytecode and os.access(Path(spec.origin).parent, os.W_OK):
        return None  # Python keeps it
    try:
        folder = folder_of(os.environ)
    except RuntimeError as error:  # a user without a name or a home
        return str(error)
    problem = _prepared(folder)
    if problem:
        return problem
    stock = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        if Path(importlib.util.cache_from_source(self.get_filename(fullname))).exists():
            return stock(self, fullname)
        with _kept_in(folder):
            return stock(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return None


def folder_of(environ: Mapping[str, str], path: Iterable[str] | None = None) -> Path:
    """Where this environment's bytecode is kept: by interpreter, then by every package and version on its path."""
    own = environ.get("QWEN3EMB_CACHE_DIR")
    cache = Path(own) if own else Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3emb"
    words = [sys.version]
    for entry in map(Path, sys.path if path is None else path):
        try:
            found = [item.name for item in entry.iterdir() if item.suffix in (".dist-info", ".egg-info")]
        except OSError:
            continue
        words += [str(entry), *sorted(found)]
    return cache.absolute() / "bytecode" / _short(sys.executable) / _short("\n".join(words))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _prepared(folder: Path) -> str | None:
    """Make the folder, which this user alone may write to, and remove what other versions left beside it."""
    try:
        folder.parents[2].mkdir(parents=True, exist_ok=True)
        for place in (folder.parents[1], folder.parent, folder):
            place.mkdir(mode=0o700, exist_ok=True)
            status = place.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return f"others may write to {place}"
        if not os.access(folder, os.W_OK):
            return f"{folder} cannot be written"
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let Python look for bytecode in `folder`, and write it there, while this lasts."""
    before = sys.pycache_prefix, sys.dont_write_bytecode
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    try:
        yield
    finally:
        sys.pycache_prefix, sys.dont_write_bytecode = before
