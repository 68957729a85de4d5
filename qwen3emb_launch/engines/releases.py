"""Which SGLang releases are installed, with what, and which are refused. Pure, but for the shipped lock.

Sources: sglang's wheels and metadata on PyPI, its issue tracker, and runs on a CPU (docs/engine.md says which).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import Flavour, version_key

FLAVOURS: tuple[Flavour, ...] = ("cuda", "cpu")
CPU_VERSION = "0.5.15.post1"  # the last release that starts on a CPU without sgl_kernel
# The release on which the plugin's graphs and kernels were run and measured on a GPU (docs/benchmarks), not the newest:
# until they are proven on 0.5.23 too, one query takes half as long again there (`breakable` in the same record).
CUDA_VERSION = "0.5.16"
NEWEST_READ = "0.5.23"
OLDEST = "0.5.14"
BELOW = (0, 6, 0, 0)  # another minor release may rename any flag
PYTHONS = ((3, 11), (3, 12))  # sglang pins outlines_core 0.1.26, which has wheels for no later Python
ISSUES = "https://github.com/sgl-project/sglang/issues/"

# Installed size plus the wheels that pip keeps beside it while it installs, bytes.
DISK: dict[Flavour, int] = {"cpu": 9_500_000_000, "cuda": 16_000_000_000}

_RELEASE = re.compile(r"\d+\.\d+\.\d+(\.post\d+|rc\d+|\.dev\d+)?")


@dataclass(frozen=True)
class Build:
    """What one environment is made of. `locked` is installed with its dependencies, `bare` with --no-deps after it."""

    flavour: Flavour
    version: str
    locked: tuple[str, ...]
    bare: tuple[str, ...]

    @property
    def key(self) -> str:
        """Twelve hex digits that change with anything in the lists: an environment of another key is rebuilt."""
        text = "\n".join((self.flavour, *self.locked, "--no-deps", *self.bare))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Gate:
    """A range of releases (first and last bad one) that must not serve embeddings, and why."""

    first: str
    last: str
    reason: str
    link: str


# What sglang's own pins leave open. uvicorn is faster with httptools and uvloop. cuda-toolkit is pinned by torch; its
# nvcc extra ties the compiler to that version, else pip takes the newest one, whose headers then refuse torch's:
# "CUDA compiler and CUDA toolkit headers are incompatible" in every kernel compiled on first use.
_BESIDE = ("httptools", "uvloop", "cuda-toolkit[nvcc]")

# Only defects that no launch flag avoids. `--tokenizer-worker-num` and the like are the planner's business.
GATES = (
    Gate("0.5.11", "0.5.13.post1", "returns NaN for many short inputs under a prefill CUDA graph", ISSUES + "27343"),
    Gate("0.0.0", "0.5.10.post1", "can deadlock on a full embedding batch", ISSUES + "22518"),
)


def build(flavour: Flavour, version: str | None = None) -> Build:
    """The lists for one flavour and release (default: the tested one).

    Raises InvalidInputError (`bad_version`, `engine_version`) for a release that is malformed, out of range or gated.
    """
    if flavour == "cpu":
        if version not in (None, CPU_VERSION):
            raise InvalidInputError(
                "engine_version",
                f"the cpu environment is locked to sglang {CPU_VERSION}, not {version}: the releases around it do not "
                "start on a CPU without a kernel package that PyPI does not carry",
                "adopt an environment of your own: qwen3emb engine install cpu --python /path/to/env/bin/python",
            )
        return Build("cpu", CPU_VERSION, _lock("cpu"), (f"sglang=={CPU_VERSION}",))
    chosen = version or CUDA_VERSION
    check_version(chosen)
    return Build("cuda", chosen, (f"sglang=={chosen}", *_BESIDE), ())


def check_version(version: str) -> None:
    """Raise InvalidInputError unless this release may serve embeddings."""
    if not _RELEASE.fullmatch(version):
        raise InvalidInputError("bad_version", f"{version!r} is no sglang release", f"such as {CUDA_VERSION}")
    key = version_key(version)
    for gate in GATES:
        if version_key(gate.first) <= key <= version_key(gate.last):
            raise InvalidInputError(
                "engine_version",
                f"sglang {version} {gate.reason} ({gate.link})",
                f"take {OLDEST} or later; {CUDA_VERSION} is the default",
                {"link": gate.link},
            )
    if not version_key(OLDEST) <= key < BELOW:
        raise InvalidInputError(
            "engine_version",
            f"sglang {version} is outside the supported range: {OLDEST} up to, not including, {BELOW[0]}.{BELOW[1]}",
            f"{CUDA_VERSION} is the default",
        )


def untested(version: str) -> str | None:
    """A note for a release newer than the ones this launcher was tried with."""
    if version_key(version) <= version_key(NEWEST_READ):
        return None
    return f"sglang {version} is newer than {NEWEST_READ}, the newest one whose source was read for this launcher"


def check_platform(machine: str, system: str) -> None:
    """Raise UnfitError unless wheels exist: Linux on x86-64 (glibc 2.34 or later)."""
    if (system, machine) != ("Linux", "x86_64"):
        raise UnfitError(
            "platform",
            f"no engine wheels for {system} on {machine}: the environments are for Linux on x86_64",
            "adopt an environment built for this machine: qwen3emb engine install --python /path/to/env/bin/python",
        )


def _lock(flavour: Flavour) -> tuple[str, ...]:
    text = (Path(__file__).parent / "locks" / f"{flavour}.txt").read_text(encoding="utf-8")
    return tuple(line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))
