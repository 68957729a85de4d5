"""Who is who among the processes of an instance, and who is left over. Reads /proc alone."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from qwen3emb_launch.engine_process.guard import descendants, parents
from qwen3emb_launch.state import ProcessId, identify

MARK = "CHAOS_RUN"  # every process of a run inherits it: one that escaped its parents is found all the same


def tree(root: int) -> dict[ProcessId, str]:
    """The process and its living descendants, each with its command line (or name)."""
    found = {}
    for pid in (root, *descendants(root)):
        who = identify(pid)
        if who:
            found[who] = words(pid)
    return found


def words(pid: int) -> str:
    """A process's command line, else its name; empty when it is gone."""
    for name in ("cmdline", "comm"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if text:
                return text
    return ""


def roles(supervisor: int) -> dict[str, int]:
    """Who is who below a supervisor: guard, http, scheduler, detokenizer, template, gateway, worker (the last of the
    gateway's, where it has several); pids, where they are.

    Engine and gateway are what a guard has started. Of an engine's workers the one that holds the most memory is the
    scheduler: titles like `sglang::scheduler` are not set in every way of starting them.
    """
    above = parents()
    found: dict[str, int] = {}
    for pid in descendants(supervisor):
        if "guard.py" not in words(above.get(pid, 0)) or identify(pid) is None:
            continue
        if "qwen3emb_launch gateway" in words(pid):
            found["gateway"] = pid
            mine = gateway_workers(pid, above)
            found |= {"worker": max(mine)} if mine else {}
        elif "http" not in found:
            found |= {"http": pid, "guard": above[pid]}
    workers = [p for p in descendants(found.get("http", 0)) if "resource_tracker" not in words(p) and identify(p)]
    leaves = sorted((p for p in workers if p not in above.values()), key=resident, reverse=True)
    found |= dict(zip(("scheduler", "detokenizer"), leaves, strict=False))
    template = next((p for p in workers if p in above.values()), None)
    return found | ({"template": template} if template else {})


def gateway_workers(gateway: int, above: dict[int, int] | None = None) -> list[int]:
    """The processes that a gateway of several shares its port with."""
    return [
        child
        for child, parent in (above or parents()).items()
        if parent == gateway and "spawn_main" in words(child) and lives(child)
    ]


def marked(value: str) -> dict[ProcessId, str]:
    """Every living process that inherited MARK with this value, wherever it hangs in the process tree."""
    needle = f"{MARK}={value}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            who = identify(int(entry.name))
            if who and needle in environ.split(b"\0"):
                found[who] = words(who.pid)
    return found


def send(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    return identify(pid) is not None


def resident(pid: int) -> int:
    """Resident memory in bytes; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def open_files(pid: int) -> int:
    """Descriptors that a process holds."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def zombies(root: int) -> int:
    """Dead children that nobody collected, below `root`."""
    count = 0
    for pid in descendants(root):
        with contextlib.suppress(OSError):
            count += Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"Z"
    return count
