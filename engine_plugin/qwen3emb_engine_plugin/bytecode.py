"""Bytecode of the modules that are imported, kept where Python itself keeps none.

Packages that were installed without being compiled (by uv, in a container image) are compiled at every start where
their folder cannot be written or PYTHONDONTWRITEBYTECODE is set: some 6,000 modules, two thirds of the import. Here
such modules are compiled once, into a folder of this user; what lies beside its source is used from there as ever.
Python's own rule holds, a source whose time or size has changed is compiled anew, and other packages on the path mean
another folder. A folder whose interpreter is gone, or that no start has asked for in a week, is removed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

INTERPRETER = "interpreter"  # a link beside an interpreter's folders, to it
UNUSED_FOR = 7 * 86400.0  # seconds; no start lasts as long

_switching = threading.RLock()  # where bytecode is looked for is one setting for all threads


def keep(package: str = "sglang") -> str | None:
    """From now on, keep what Python would compile in vain, if it would. Returns why that cannot be done, or None."""
    spec = importlib.util.find_spec(package)
    if sys.pycache_prefix is not None or spec is None or not spec.origin:
        return None  # somebody has chosen a folder
    if not sys.dont_write_bytecode and os.access(Path(spec.origin).parent, os.W_OK):
        return None  # Python keeps it
    try:
        folder = folder_of(os.environ)
        problem = _prepared(folder)
    except RuntimeError as error:  # a user without a name or a home
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    if problem:
        return problem
    stock = SourceFileLoader.get_code
    settings = sys.pycache_prefix, sys.dont_write_bytecode

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        with _switching:
            beside = importlib.util.cache_from_source(self.get_filename(fullname))
            # Ours is not made again where it was removed: Python would give it the rights of any folder.
            if os.path.exists(beside) or not os.path.isdir(folder):  # noqa: PTH110, PTH112 - Path's raise if forbidden
                return stock(self, fullname)
            with _kept_in(folder):
                return stock(self, fullname)

    def forked() -> None:
        """Another thread of the parent may have been in the midst of it, and is not here to end it."""
        global _switching
        _switching = threading.RLock()
        sys.pycache_prefix, sys.dont_write_bytecode = settings

    os.register_at_fork(after_in_child=forked)
    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    return None


def folder_of(environ: Mapping[str, str], path: Iterable[str] | None = None) -> Path:
    """Where this environment's bytecode is kept: by interpreter, then by every package and version on its path.

    A place without packages, such as the folder that an engine is started in, is none of them.
    """
    words = [sys.version]
    for entry in map(Path, sys.path if path is None else path):
        try:
            found = [item.name for item in entry.iterdir() if item.suffix in (".dist-info", ".egg-info")]
        except OSError:
            continue
        words += [str(entry), *sorted(found)] if found else []
    return cache_folder(environ) / "bytecode" / _short(sys.executable) / _short("\n".join(words))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where the launcher keeps what can be made again. RuntimeError for a user without a home."""
    own = environ.get("QWEN3EMB_CACHE_DIR")
    cache = Path(own) if own else Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3emb"
    return cache.absolute()


def _prepared(folder: Path) -> str | None:
    """Make the folder, which this user alone may write to, and remove those that nobody uses. May raise OSError."""
    folder.parents[2].mkdir(parents=True, exist_ok=True)
    for place in (folder.parents[1], folder.parent, folder):
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return f"others may write to {place}"
    if not os.access(folder, os.W_OK):
        return f"{folder} cannot be written"
    os.utime(folder)
    with suppress(FileExistsError):
        (folder.parent / INTERPRETER).symlink_to(sys.executable)
    for other in (*folder.parents[1].iterdir(), *folder.parent.iterdir()):
        with suppress(FileNotFoundError):  # another start removes it as well
            if other not in (folder, folder.parent) and _abandoned(other):
                shutil.rmtree(other, ignore_errors=True)
    return None


def _abandoned(folder: Path) -> bool:
    """Whether a folder beside ours is nobody's any more: its interpreter is gone, or its packages were not asked for.

    A process that still runs with it compiles what it imports later, and keeps that nowhere.
    """
    link = folder / INTERPRETER
    if link.is_symlink():
        return not link.exists()
    return folder.is_dir() and not folder.is_symlink() and time.time() - folder.stat().st_mtime > UNUSED_FOR


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Let Python look for bytecode in `folder`, and write it there, while this lasts."""
    before = sys.pycache_prefix, sys.dont_write_bytecode
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
    try:
        yield
    finally:
        sys.pycache_prefix, sys.dont_write_bytecode = before
