"""What the operating system says about a disk, as errors with a next step."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from qwen3emb_launch.errors import LaunchError, UnfitError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write where `folder` is, or will be."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def disk_error(error: OSError, path: Path) -> LaunchError:
    """The error for a failed read or write of `path`: full, refused, too large for a limit, or as the system says."""
    where = error.filename or path
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return UnfitError(
            "disk_full",
            f"the disk is full: {where} ({reason})",
            f"free some space: df -h {path.parent}; then run again",
        )
    if error.errno in _REFUSED:
        return UnfitError(
            "folder_unwritable",
            f"cannot write {where} ({reason})",
            f"who owns it: ls -ld {path.parent}; or choose other folders (QWEN3EMB_DATA_DIR, _CONFIG_DIR, HF_HOME)",
        )
    if error.errno == errno.EFBIG:
        return UnfitError(
            "file_too_large", f"{where} would pass this session's file size limit ({reason})", "raise it: ulimit -f"
        )
    return UnfitError("disk_error", f"{where}: {reason}", f"is the disk in order? df -h {path.parent}")
