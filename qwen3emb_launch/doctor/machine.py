"""Disk, memory, limits, shared memory, huge pages, clock, ports: what the operating system gives."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from qwen3emb_launch.disk import free_bytes
from qwen3emb_launch.doctor.report import Check, fail, ok, unknown, warn
from qwen3emb_launch.engine_process.ports import HIGHEST_ENGINE_PORT, check_free, free_port
from qwen3emb_launch.engines import releases
from qwen3emb_launch.errors import LaunchError
from qwen3emb_launch.hub import huggingface
from qwen3emb_launch.paths import paths
from qwen3emb_launch.state import Instance

GIB = 1 << 30
STATE_NEEDS = 200 << 20  # bytes: logs of a start, records
OPEN_FILES = 4096
THREADS = 4096
SHARED = Path("/dev/shm")  # noqa: S108 - the system's own
SHARED_MEMORY = 1 * GIB  # NCCL and torch workers pass tensors through it
LATEST_CLOCK = 4102444800  # 2100-01-01: certificates are judged by the clock
EARLIEST_CLOCK = 1767225600  # 2026-01-01: this launcher did not exist before
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def system(machine: str, name: str) -> Check:
    """Whether engine environments can be built here."""
    try:
        releases.check_platform(machine, name)
    except LaunchError as error:
        return warn("platform", error.message, error.hint)
    return ok("platform", f"{name} on {machine}, python {platform.python_version()}")


def disk(name: str, folder: Path, needs: int, why: str) -> Check:
    """Free space and the right to write, where `folder` is or will be."""
    name = f"disk {name}"
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        return fail(name, f"{existing} cannot be written by this user", f"ls -ld {existing}; or choose other folders")
    try:
        free = free_bytes(folder)
    except OSError as error:
        return unknown(name, f"{folder}: {error.strerror}", f"df -h {existing}")
    says = f"{free / 1e9:.1f} GB free at {folder}"
    if free < needs:
        return fail(name, f"{says}; {why} takes {needs / 1e9:.1f} GB", f"free some space: df -h {existing}")
    return ok(name, says)


def memory(available: int, total: int, limit: int | None) -> Check:
    """The host's memory, and a control group's limit where there is one."""
    bounded = min(total, limit) if limit else total
    says = f"{available / GIB:.1f} GiB available of {total / GIB:.1f}"
    if limit and limit < total:
        says += f"; this process's group may take {limit / GIB:.1f}"
    if min(available, bounded) < 4 * GIB:
        return warn("memory", f"{says}; an engine's processes alone take 3 to 4 GiB", "end other programs")
    return ok("memory", says)


def open_files(soft: int, hard: int) -> Check:
    """Sockets are files: a request each."""
    says = f"{_limit(soft)} open files ({_limit(hard)} at most)"
    if 0 <= hard < OPEN_FILES:
        return fail(
            "open files", f"{says}; {OPEN_FILES} are needed", "raise it: /etc/security/limits.conf, then log in"
        )
    if 0 <= soft < OPEN_FILES:
        return warn("open files", says, f"ulimit -n {hard if hard > 0 else 65536}")
    return ok("open files", says)


def processes(soft: int) -> Check:
    """Processes and threads of this user together."""
    if 0 <= soft < THREADS:
        return warn("processes", f"this user may have {soft} processes and threads", f"ulimit -u {4 * THREADS}")
    return ok("processes", f"this user may have {_limit(soft)} processes and threads")


def file_size(soft: int) -> Check:
    """A limit here cuts downloads."""
    if soft >= 0:
        return fail("file size", f"files may be {soft / 1e9:.2f} GB at most; weights are larger", "ulimit -f unlimited")
    return ok("file size", "unlimited")


def shared_memory(total: int | None) -> Check:
    """Containers keep it at 64 MB unless told otherwise."""
    if total is None:
        return unknown("shared memory", f"{SHARED} cannot be read", f"df -h {SHARED}")
    if total < SHARED_MEMORY:
        says = f"{SHARED} has {total / 1e6:.0f} MB; engines on several GPUs pass tensors through it"
        return warn("shared memory", says, "in a container: docker run --shm-size=8g, or --ipc=host")
    return ok("shared memory", f"{SHARED} has {total / GIB:.1f} GiB")


def huge_pages(transparent: str | None, reserved: int | None, total: int) -> Check:
    """Transparent ones are harmless; memory reserved for explicit ones is lost to engines, which use none."""
    if transparent is None or reserved is None:
        return unknown("huge pages", "/sys/kernel/mm/transparent_hugepage and /proc/meminfo do not tell")
    says = f"transparent: {transparent}; {reserved / GIB:.1f} GiB reserved"
    if reserved > total / 10:
        return warn("huge pages", f"{says}, which no engine uses", "sudo sysctl vm.nr_hugepages=0")
    return ok("huge pages", says)


def clock(now: float, state: int | None) -> Check:
    """Whether the clock can be right. `state` is adjtimex's; None where it may not be asked."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if not EARLIEST_CLOCK <= now < LATEST_CLOCK:
        return fail("clock", f"it says {shown}: certificates of hubs and registries will be refused", "timedatectl")
    if state is None:
        return unknown("clock", f"{shown}; whether it is synchronised is not told here", "timedatectl")
    if state == TIME_ERROR:
        return warn("clock", f"{shown}, not synchronised with any server", "sudo timedatectl set-ntp true")
    return ok("clock", f"{shown}, synchronised")


def port(number: int, running: Iterable[Instance], host: str = "127.0.0.1", *, bare: bool = False) -> Check:
    """The port that users call. `bare`: the engine itself listens there, and SGLang wants a second one."""
    name = f"port {number}"
    for one in running:
        if one.running and one.record and f":{number}/" in one.record.base_url:
            return ok(name, f"serves instance {one.name}")
    if bare and number > HIGHEST_ENGINE_PORT:
        says = f"SGLang claims its port + 10000 too, so {HIGHEST_ENGINE_PORT} is the highest"
        return fail(name, says, f"qwen3emb up --port {_other(host, 30000)}")
    for wanted in (number, number + 10000) if bare else (number,):
        try:
            check_free(host, wanted)
        except LaunchError as error:
            second = "; SGLang claims its port + 10000 too" if wanted != number else ""
            return fail(name, f"{error.message}{second}", f"qwen3emb up --port {_other(host, number)}")
    return ok(name, "free")


def checks(
    number: int, running: list[Instance], *, engine_needed: int, model_needed: int, bare: bool = False
) -> list[Check]:
    """All of them. `engine_needed`, `model_needed`: bytes still to be installed and downloaded; `bare`: no gateway."""
    import psutil

    here = paths()
    seen = psutil.virtual_memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return [
        system(platform.machine(), platform.system()),
        disk("engines", here.engines, engine_needed or STATE_NEEDS, "an engine environment"),
        disk("models", huggingface.cache(), model_needed or STATE_NEEDS, "the model"),
        disk("state", here.state, STATE_NEEDS, "a start with its logs"),
        memory(seen.available, seen.total, _group_limit()),
        open_files(soft, hard),
        processes(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        file_size(resource.getrlimit(resource.RLIMIT_FSIZE)[0]),
        shared_memory(_total(SHARED)),
        huge_pages(*_huge_pages(), seen.total),
        clock(time.time(), _clock_state()),
        port(number, running, bare=bare),
    ]


def ram_bytes() -> int:
    """The machine's memory, all of it."""
    import psutil

    return int(psutil.virtual_memory().total)


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)


def _other(host: str, number: int) -> int | str:
    try:
        return free_port(host, number + 1)
    except LaunchError:
        return "…"


def _total(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _group_limit() -> int | None:
    """The memory limit of this process's control group, v2 or v1; None where there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < 1 << 60:
            return int(text)
    return None


def _huge_pages() -> tuple[str | None, int | None]:
    """The chosen kind of transparent huge pages, and bytes reserved for explicit ones."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii").split()
        transparent = next((w.strip("[]") for w in words if w.startswith("[")), None)
    except OSError:
        transparent = None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        numbers = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in lines)}
        return transparent, numbers["HugePages_Total"] * numbers["Hugepagesize"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return transparent, None


def _clock_state() -> int | None:
    """adjtimex(2) asked for nothing but the state; needs no rights."""
    buffer = ctypes.create_string_buffer(512)  # struct timex has 208 bytes; `modes`, its first field, is 0: read only
    try:
        found = int(ctypes.CDLL(None).adjtimex(buffer))
    except (OSError, AttributeError):
        return None
    return None if found < 0 else found
