"""Building a virtual environment with pip: from nothing, on from where the last try ended, or over damaged packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from qwen3emb_launch.disk import free_bytes
from qwen3emb_launch.engines import child, pip_output, releases
from qwen3emb_launch.engines.integrity import forget_damaged
from qwen3emb_launch.engines.record import translated
from qwen3emb_launch.errors import UnfitError
from qwen3emb_launch.facts import version_key
from qwen3emb_launch.progress import Progress

PIP, NEW_PIP = "pip>=25.1", (25, 1)  # resumes cut downloads within a run, reports progress in numbers
_DEADLINE = 4 * 3600.0  # seconds for one pip call: 4 GB over 3 Mbit/s
_VENV_DEADLINE = 300.0
_LEFT = 1_000_000_000  # bytes that a resumed install must still find free


def environment_python(env: Path) -> Path:
    """The environment's python; not resolved, since the link's place is what makes it this environment's."""
    return env / "bin" / "python"


def site_packages(env: Path) -> Path | None:
    """The environment's package folder, or None before there is one."""
    return next(iter(sorted((env / "lib").glob("python3.*/site-packages"))), None)


class Builder:
    """One build into `env`. `log` receives everything pip says; `hold` is the lock that pip holds with us."""

    def __init__(self, env: Path, log: Path, progress: Progress, hold: int) -> None:
        self.env = env
        self.log = log
        self.progress = progress
        self.hold = hold

    def build(self, wanted: releases.Build) -> None:
        """Make the environment hold `wanted`; what is there and whole is kept.

        Raises UnfitError (disk, Python, permissions), NetworkError (index) or CheckFailedError (another pip failure).
        """
        releases.check_platform(platform.machine(), platform.system())
        with translated(self.env.parent):
            self.env.parent.mkdir(parents=True, exist_ok=True)
            check_disk(self.env, releases.DISK[wanted.flavour])
            self.log.unlink(missing_ok=True)
            self.log.touch(0o600)
        packages = site_packages(self.env)
        if packages:
            forget_damaged(packages)
        self._virtual_environment()
        if (self._pip_version() or ()) < NEW_PIP:
            self.progress.step("updating pip")
            self.pip("install", "--progress-bar", "off", "--upgrade", PIP)
        self.pip("install", "--progress-bar", "raw", *wanted.locked, reader=self._reader(wanted))
        if wanted.bare:
            self.progress.step(f"installing {' '.join(wanted.bare)}")
            self.pip("install", "--progress-bar", "off", "--no-deps", *wanted.bare)

    def _reader(self, wanted: releases.Build) -> pip_output.PipReader:
        """How many packages pip will name is known for a lock, unknown where pip resolves."""
        return pip_output.PipReader(self.progress, len(wanted.locked) if wanted.bare else None)

    def clear(self) -> None:
        """Delete what is there: the next build starts from nothing."""
        with translated(self.env):
            if self.env.exists():
                shutil.rmtree(self.env)

    def install_wheel(self, wheel: Path) -> None:
        """Install one local wheel over whatever version is there; no index is asked."""
        self.pip("install", "--progress-bar", "off", "--no-index", "--no-deps", "--force-reinstall", str(wheel))

    def pip(self, *arguments: str, reader: pip_output.PipReader | None = None) -> None:
        """Run the environment's pip under the user's own settings; a failure carries pip's last lines."""
        said: list[str] = []
        scratch = self.env.parent / "tmp"
        before = len(self._packages())
        with translated(scratch):
            scratch.mkdir(exist_ok=True)
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"$ python -m pip {' '.join(arguments)}\n")

                def line(text: str) -> None:
                    if reader is None or reader.feed(text):
                        clean = pip_output.redact(text)
                        said.append(clean)
                        log.write(clean + "\n")
                        log.flush()

                def count() -> None:
                    if reader is not None and reader.installing:
                        reader.installed(len(self._packages()) - before)

                status = child.run(
                    [environment_python(self.env), "-m", "pip", *arguments],
                    _pip_environment(scratch),
                    line,
                    _DEADLINE,
                    hold=(self.hold,),
                    idle=count,
                )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if status:
            raise pip_output.failure(said, status, str(self.log))

    def _virtual_environment(self) -> None:
        """Create it, unless there is one that runs and has its pip: what was cut off earlier starts again."""
        python = environment_python(self.env)
        if os.access(python, os.X_OK) and self._pip_version():
            return
        with translated(self.env):
            shutil.rmtree(self.env, ignore_errors=True)
        self.progress.step("creating the virtual environment")
        said: list[str] = []
        status = child.run(
            [base_python(), "-m", "venv", self.env],
            child.clean_environment(),
            said.append,
            _VENV_DEADLINE,
            hold=(self.hold,),
        )
        if status or not os.access(python, os.X_OK):
            text = "\n".join(said)
            if "ensurepip" in text or "No module named venv" in text:
                raise UnfitError(
                    "venv_missing",
                    f"the Python at {base_python()} cannot make virtual environments: its venv or ensurepip is missing",
                    "on Debian and Ubuntu: apt install python3-venv",
                )
            if "No space left" in text:
                raise UnfitError("disk_full", f"no space left on the disk of {self.env}", "free some space")
            raise UnfitError("venv_failed", f"python -m venv failed: {text[-500:]}", "try it by hand")

    def _packages(self) -> list[Path]:
        packages = site_packages(self.env)
        return list(packages.glob("*.dist-info")) if packages else []

    def _pip_version(self) -> tuple[int, ...] | None:
        found = [p.name for p in self._packages() if p.name.startswith("pip-")]
        versions = [name.removeprefix("pip-").removesuffix(".dist-info") for name in found]
        return max((version_key(f"{version}.0.0") for version in versions), default=None)


def check_disk(env: Path, needed: int) -> None:
    """Raise UnfitError (`disk_full`) unless the rest of what an environment takes is free."""
    free = free_bytes(env)
    there = disk_usage(env)
    rest = max(_LEFT, needed - there)
    if free < rest:
        raise UnfitError(
            "disk_full",
            f"the engine environment takes {needed / 1e9:.1f} GB; {there / 1e9:.1f} GB of it is there and "
            f"{free / 1e9:.1f} GB are free at {env.parent}",
            "free some space, or move the folder: QWEN3EMB_DATA_DIR",
            {"needed_bytes": rest, "free_bytes": free},
        )


def disk_usage(folder: Path) -> int:
    """Bytes that the files of a folder take on disk; 0 where there is none."""
    total = 0
    for base, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(base) / file).lstat().st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def base_python() -> Path:
    """The interpreter environments are made from: the launcher's own if wheels exist for it, else one on PATH."""
    own = Path(getattr(sys, "_base_executable", None) or sys.executable)
    if sys.version_info[:2] in releases.PYTHONS:
        return own
    for major, minor in reversed(releases.PYTHONS):
        found = shutil.which(f"python{major}.{minor}")
        if found and _runs(found):
            return Path(found)
    known = " or ".join(f"{major}.{minor}" for major, minor in releases.PYTHONS)
    raise UnfitError(
        "python_version",
        f"the engine's packages have wheels for Python {known}; this is {platform.python_version()} and PATH has none",
        f"install Python {known} beside this one, or adopt an environment with --python",
    )


def _runs(python: str) -> bool:
    try:
        return (
            subprocess.run([python, "-c", "import venv"], capture_output=True, timeout=30, check=False).returncode == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def _pip_environment(scratch: Path) -> dict[str, str]:
    """The user's settings (PIP_*, pip.conf, proxies, certificates), made fit for a pip that nobody talks to."""
    env = child.clean_environment() | {
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_NO_COLOR": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }
    env.setdefault("TMPDIR", str(scratch))  # wheels of gigabytes: not into a /tmp in memory
    own_settings = Path(sys.prefix) / "pip.conf"
    if sys.prefix != sys.base_prefix and own_settings.is_file():
        env.setdefault("PIP_CONFIG_FILE", str(own_settings))  # the launcher's own environment may name the index
    return env


def users(folder: Path) -> list[int]:
    """The processes that run from this folder, have a library of it loaded or look for modules in it.

    An adopted environment's engine has nothing but the plugin of it, by PYTHONPATH. Linux; those of other users unseen.
    """
    wanted = os.fsencode(folder) + b"/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            used = wanted in (process / "cmdline").read_bytes() or wanted in (process / "maps").read_bytes()
            if used or any(wanted in place + b"/" for place in _module_path((process / "environ").read_bytes())):
                found.append(int(process.name))
        except OSError:
            continue
    return sorted(set(found) - {os.getpid()})


def _module_path(environ: bytes) -> list[bytes]:
    """The entries of PYTHONPATH in a process's environment, as the kernel keeps it."""
    name = b"PYTHONPATH="
    return next((line.removeprefix(name).split(b":") for line in environ.split(b"\0") if line.startswith(name)), [])


def remove_others(keep: Path) -> None:
    """Delete what `keep` replaced, its siblings of the same kind (`env-…`), unless a process still uses them."""
    kind = keep.name.split("-")[0]
    for old in keep.parent.glob(f"{kind}-*"):
        if old != keep and not users(old):
            shutil.rmtree(old, ignore_errors=True)
