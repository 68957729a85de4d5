"""The guard with real, misbehaving processes: whatever happens, nothing of an engine is left."""

from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import queue
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from supervised import gone, until

from qwen3emb_launch.engine_process import (
    Doomed,
    EngineCommand,
    EngineProcess,
    Exited,
    Gone,
    GuardLost,
    ProcessEvent,
    Spawned,
    SpawnFailed,
)
from qwen3emb_launch.engine_process import guard as guard_module
from qwen3emb_launch.engine_process import process as process_module
from qwen3emb_launch.engine_process.guard import Log, become_subreaper, descendants
from qwen3emb_launch.engine_process.process import sweep

# An engine with children of every kind: a plain one, one that ignores SIGTERM, and one that left the session.
FAMILY = """
import os, signal, subprocess, sys, time
pids = sys.argv[1]
def note(): print(os.getpid(), file=open(pids, "a"))
note()
for escape in (False, True):
    if os.fork() == 0:
        if escape:
            os.setsid()
            if os.fork(): os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note()
        while True: time.sleep(60)
print("up", flush=True)
while True: time.sleep(60)
"""


class Engine:
    """An engine under a guard, its events in a queue."""

    def __init__(self, folder: Path, *argv: str, **options: object) -> None:
        self.events: queue.Queue[ProcessEvent] = queue.Queue()
        self.log = folder / "engine.log"
        command = EngineCommand(argv=argv, env=dict(os.environ), log=self.log, **options)  # type: ignore[arg-type]
        self.process = EngineProcess(command, self.events.put)

    def next(self, timeout: float = 15) -> ProcessEvent:
        return self.events.get(timeout=timeout)

    def end(self) -> list[ProcessEvent]:
        """Every event up to the last one."""
        seen = [self.next()]
        while not isinstance(seen[-1], (Gone, GuardLost)):
            seen.append(self.next())
        return seen


def family(folder: Path) -> tuple[Engine, list[int]]:
    pids = folder / "pids"
    engine = Engine(folder, sys.executable, "-c", FAMILY, str(pids))
    return engine, until(lambda: p if len(p := read_pids(pids)) == 3 else None, "three processes")


def read_pids(path: Path) -> list[int]:
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def test_kill_removes_children_that_left_the_session(tmp_path: Path) -> None:
    """`kill` ends the engine, children that ignore SIGTERM, and grandchildren that were daemonised away."""
    engine, pids = family(tmp_path)
    engine.process.kill()
    assert engine.end() == [Spawned(pids[0]), Exited(-signal.SIGKILL), Gone()]
    assert all(map(gone, pids))


def test_remains_of_a_crash_are_removed(tmp_path: Path) -> None:
    """When the main process dies by itself, what it leaves behind is killed before `gone` is said."""
    engine, pids = family(tmp_path)
    os.kill(pids[0], signal.SIGKILL)
    assert engine.end()[1:] == [Exited(-signal.SIGKILL), Gone()]
    assert all(map(gone, pids))


def test_terminate_reaches_the_main_process_only(tmp_path: Path) -> None:
    """SIGTERM goes to the main process alone: its workers see nothing until it has ended."""
    script = """
import os, signal, sys, time
child = os.fork()
if child == 0:
    signal.signal(signal.SIGTERM, lambda *_: print("child was told", flush=True))
    while True: time.sleep(60)
def drain(*_):
    time.sleep(0.2)
    print("main drained", flush=True)
    os._exit(7)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
while True: time.sleep(60)
"""
    engine = Engine(tmp_path, sys.executable, "-c", script)
    until(lambda: engine.log.exists() and "up" in engine.log.read_text(), "the engine's first word")
    engine.process.terminate()
    assert engine.end()[1:] == [Exited(7), Gone()]
    assert engine.log.read_text() == "up\nmain drained\n"


def idle(process: EngineProcess) -> bool:
    """Whether the guard has read every order and waits for the next, its look's thread over."""
    pipe = process._guard.stdin
    assert pipe is not None
    unread = array.array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, unread)
    threads = list(Path(f"/proc/{process.guard_pid}/task").iterdir())
    return not unread[0] and [(t / "stat").read_text().rpartition(")")[2].split()[0] for t in threads] == ["S"]


# An engine with what Python removes only where it may end by itself: shared memory, a semaphore, temporary files.
LITTER = """
import multiprocessing, os, sys, tempfile, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
ring = SharedMemory(f"sgl_shm_mq_{os.getpid()}_{os.urandom(4).hex()}", create=True, size=4096)
lock = multiprocessing.get_context("spawn").Lock()
os.makedirs(os.path.join(tempfile.mkdtemp(), "below"))
os.symlink(sys.argv[1], os.path.join(tempfile.gettempdir(), "link"))
print(memory.name, lock._semlock.name, ring.name, flush=True)
while True: time.sleep(60)
"""


@pytest.mark.parametrize("ends", ["killed", "terminated", "dead", "dead early"])
def test_temporary_files_and_shared_memory_go_with_the_engine(
    tmp_path: Path, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scratch folder and its names in /dev/shm are removed, what a link there leads to is not. Only memory of one
    that is dead before anybody has looked stays."""
    kept, scratch = tmp_path / "kept", tmp_path / "scratch"
    kept.mkdir()
    (kept / "file").touch()
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    engine = Engine(tmp_path, sys.executable, "-c", LITTER, str(kept), scratch=scratch)
    said = until(lambda: engine.log.exists() and engine.log.read_text().split(), "the names")
    names = [Path("/dev/shm", name) for name in (said[0], f"sem.{said[1].strip('/')}", said[2])]
    try:
        assert all(name.exists() for name in names)
        assert len(list(scratch.iterdir())) == 2
        spawned = engine.next()
        assert isinstance(spawned, Spawned)
        if ends == "dead":
            engine.process.look()
            until(lambda: idle(engine.process), "the end of the look")
        if ends.startswith("dead"):
            os.kill(spawned.pid, signal.SIGKILL)
        elif ends == "killed":
            engine.process.kill()
        else:
            engine.process.terminate()
        assert engine.end()[-1] == Gone()
        assert not scratch.exists()
        assert (kept / "file").exists()
        assert ends == "dead early" or not any(name.exists() for name in names)
    finally:
        for name in names:
            name.unlink(missing_ok=True)


def test_names_of_others_with_the_same_inode_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inodes are a file system's own: those of another, as of a sandbox with its own /dev/shm, tell nothing."""
    file = tmp_path / "dev" / "shm" / "psm_ours"
    file.parent.mkdir(parents=True)
    file.write_bytes(bytes(4096))

    class Other:
        name, path = "psm_other", "/dev/shm/psm_other"

        def inode(self) -> int:
            return file.stat().st_ino

    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext([Other()]))
    with file.open("rb+") as opened, mmap.mmap(opened.fileno(), 0):
        assert guard_module.shared_memory([os.getpid()]) == []


def test_an_order_after_the_end_is_no_error(tmp_path: Path) -> None:
    """Whoever orders may not have heard of it yet: the report waits behind what is being decided."""
    engine = Engine(tmp_path, "/bin/true")
    engine.end()
    engine.process.terminate()
    engine.process.kill()


def test_a_look_that_hangs_keeps_nobody_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel holds in mmap lets nobody read its maps until it is killed; the killing does not wait for it."""
    script = tmp_path / "guard.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(guard_module.__file__).rpartition('/')[0]!r})\n"
        "import guard; guard.shared_memory = lambda pids: time.sleep(600); guard.Guard().run()\n"
    )
    monkeypatch.setattr(process_module, "GUARD", script)
    engine, pids = family(tmp_path)
    engine.process.terminate()  # which looks too
    engine.process.kill()
    assert isinstance(engine.end()[-1], Gone)
    assert all(map(gone, pids))


def test_a_folder_of_others_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name may have become free, and be another user's by the end; they could put a link in the place of a part."""
    ours, (open_to_all, theirs) = tmp_path / "ours", [tmp_path / name for name in ("open", "theirs")]
    for folder in (ours, open_to_all, theirs):
        folder.mkdir(mode=0o700)
        (folder / "file").touch()
    open_to_all.chmod(0o777)
    for folder in (ours, open_to_all):
        guard_module.remove_tree(str(folder))
    monkeypatch.setattr(os, "geteuid", lambda: theirs.stat().st_uid + 1)
    guard_module.remove_tree(str(theirs))
    assert [folder.exists() for folder in (ours, open_to_all, theirs)] == [False, True, True]
    guard_module.remove_tree(str(ours))


def test_an_order_of_an_older_supervisor_is_understood(tmp_path: Path) -> None:
    """The package may be replaced under a running instance: its supervisor starts this guard, and knows no scratch."""

    class Older(EngineCommand):
        def order(self) -> dict[str, object]:
            return {key: value for key, value in super().order().items() if key != "scratch"}

    events: queue.Queue[ProcessEvent] = queue.Queue()
    EngineProcess(Older(("/bin/true",), dict(os.environ), tmp_path / "engine.log"), events.put)
    assert [type(events.get(timeout=15)) for _ in range(3)] == [Spawned, Exited, Gone]


def test_a_stopped_guard_obeys_all_the_same(tmp_path: Path) -> None:
    """SIGSTOP to the guard: the next order wakes it."""
    engine, pids = family(tmp_path)
    os.kill(engine.process.guard_pid, signal.SIGSTOP)
    engine.process.kill()
    assert engine.end()[-1] == Gone()
    assert all(map(gone, pids))


@pytest.mark.parametrize("stopped", [False, True])
def test_supervisor_killed_with_sigkill_leaves_nothing(tmp_path: Path, stopped: bool) -> None:
    """A supervisor that is killed cannot say anything; the closed pipe does, and everything ends. A guard that was
    stopped meanwhile is woken by the kernel."""
    pids = tmp_path / "pids"
    supervisor = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time, pathlib\n"
            "from qwen3emb_launch.engine_process import EngineCommand, EngineProcess\n"
            "c = EngineCommand((sys.executable, '-c', sys.argv[1], sys.argv[2]), dict(os.environ),"
            " pathlib.Path(sys.argv[3]))\n"
            "p = EngineProcess(c, lambda e: None)\n"
            "print(p.guard_pid, flush=True)\n"
            "time.sleep(600)",
            FAMILY,
            str(pids),
            str(tmp_path / "engine.log"),
        ],
        stdout=subprocess.PIPE,
    )
    assert supervisor.stdout is not None
    guard_pid = int(supervisor.stdout.readline())
    found = until(lambda: p if len(p := read_pids(pids)) == 3 else None, "three processes")
    if stopped:
        os.kill(guard_pid, signal.SIGSTOP)
    supervisor.kill()
    supervisor.wait()
    supervisor.stdout.close()
    until(lambda: all(map(gone, [*found, guard_pid])), "the end of all of them")


def test_guard_killed_takes_the_engine_along(tmp_path: Path) -> None:
    """SIGKILL to the guard kills the engine through the kernel; its escaped children fall to us and are swept."""
    others = set(descendants(os.getpid()))  # an engine that tests share, for one
    become_subreaper()
    engine, pids = family(tmp_path)
    os.kill(engine.process.guard_pid, signal.SIGKILL)
    assert isinstance(engine.end()[-1], GuardLost)
    until(lambda: not sweep(others), "a clean sweep")
    until(lambda: all(map(gone, pids)), "the end of all of them")


def test_signals_to_the_guard_change_nothing(tmp_path: Path) -> None:
    """A SIGTERM meant for everybody (a service manager's, a shell's) does not end the guard: the supervisor decides."""
    engine, pids = family(tmp_path)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(engine.process.guard_pid, number)
    engine.process.kill()
    assert engine.end()[-1] == Gone()
    assert all(map(gone, pids))


@pytest.mark.parametrize(
    ("writes", "told"),
    [
        (["[12:00] WE ARE ", "LOST now\n"], True),  # cut by two reads
        (["x" * 200_000, "\n[12:00] WE ARE LOST", "\nWE ARE LOST\n"], True),
        (["[12:00] a client said: " + "x" * 60 + " WE ARE LOST\n"], False),
        (["x" * 70_000 + "WE ARE LOST\n", "WE ARE\nLOST\n"], False),
    ],
)
def test_what_an_engine_says_when_it_is_lost(tmp_path: Path, writes: list[str], told: bool) -> None:
    """The sign at the beginning of a line is told at once, and once; in what clients sent it is none."""
    script = "import sys, time\nfor text in sys.argv[1:]: sys.stdout.write(text); sys.stdout.flush(); time.sleep(0.1)"
    files = [tmp_path / str(number) for number, _ in enumerate(writes)]  # an argument may not be that long
    for file, text in zip(files, writes, strict=True):
        file.write_text(text)
    script = script.replace("sys.stdout.write(text)", "sys.stdout.write(open(text).read())")
    engine = Engine(tmp_path, sys.executable, "-c", script, *map(str, files), sign="WE ARE LOST")
    seen = [type(event) for event in engine.end()]
    assert seen == [Spawned, *([Doomed] if told else []), Exited, Gone]


def test_descriptors_are_handed_down(tmp_path: Path) -> None:
    """A descriptor that the engine is to have is open there under its number, and the guard itself keeps none: what it
    stands for ends when its users do."""
    ours, theirs = os.pipe()
    pipe = Path(f"/proc/self/fd/{theirs}").readlink()
    script = f"import os, time; os.write({theirs}, b'x'); time.sleep(60)"
    engine = Engine(tmp_path, sys.executable, "-c", script, fds=(theirs,))
    os.close(theirs)
    assert os.read(ours, 1) == b"x"
    held = Path(f"/proc/{engine.process.guard_pid}/fd")
    assert pipe not in [fd.readlink() for fd in held.iterdir()]
    engine.process.kill()
    engine.end()
    assert os.read(ours, 1) == b""
    os.close(ours)


def test_missing_executable_is_reported(tmp_path: Path) -> None:
    """An engine that cannot even be executed says why, and the guard ends."""
    engine = Engine(tmp_path, "/no/such/python")
    first, *_, last = engine.end()
    assert isinstance(first, SpawnFailed)
    assert "No such file" in first.error
    assert last == Gone()


def test_output_is_complete_and_secrets_are_blanked(tmp_path: Path) -> None:
    """Every line arrives, the unfinished last one too, and secrets do not."""
    script = "import sys\nfor i in range(20000): print(i, 'key=hush-hush')\nsys.stdout.write('end')"
    engine = Engine(tmp_path, sys.executable, "-c", script, secrets=("hush-hush",))
    engine.end()
    lines = engine.log.read_text().splitlines()
    assert lines[:2] == ["0 key=[redacted]", "1 key=[redacted]"]
    assert len(lines) == 20001
    assert lines[-1] == "end"
    assert engine.log.stat().st_mode & 0o777 == 0o600


def test_flood_is_rotated_and_never_blocks(tmp_path: Path) -> None:
    """A flooding engine runs to its end; its log stays within size times pieces."""
    script = "for i in range(100000): print('x' * 99)"
    engine = Engine(tmp_path, sys.executable, "-c", script, rotate_bytes=1 << 20, rotate_keep=2)
    assert Exited(0) in engine.end()
    pieces = sorted(p.name for p in tmp_path.glob("engine.log*"))
    assert pieces == ["engine.log", "engine.log.1", "engine.log.2"]
    assert all(p.stat().st_size <= (1 << 20) + guard_module.LINE_LIMIT for p in tmp_path.glob("engine.log*"))


def test_full_disk_loses_lines_and_says_so(tmp_path: Path) -> None:
    """Where the log cannot be written the engine goes on; the log says what is missing once it can."""
    log = Log("/dev/full", 1 << 20, 0, [])
    log.feed(b"lost\n")
    log.path = str(tmp_path / "log")
    os.close(log.fd)
    log.fd = -1
    log.feed(b"kept\n")
    log.close()
    assert (tmp_path / "log").read_text() == "[5 bytes of output are lost: the log could not be written]\nkept\n"


@pytest.mark.parametrize("cut", range(1, 12))
def test_secrets_cut_by_reads_are_blanked(tmp_path: Path, cut: int) -> None:
    """A secret that arrives in two pieces is blanked all the same, also in a line without end."""
    log = Log(str(tmp_path / "log"), 1 << 30, 0, ["hush-hush"])
    line = b"a" * guard_module.LINE_LIMIT + b" hush-hush b"
    at = guard_module.LINE_LIMIT + cut
    log.feed(line[:at])
    log.feed(line[at:])
    log.close()
    tail = (tmp_path / "log").read_text()[-40:]
    assert "hush" not in tail
    assert tail.endswith(" [redacted] b\n")


def test_guard_is_small(tmp_path: Path) -> None:
    """The guard holds under 12 MB."""
    engine, _ = family(tmp_path)
    status = Path(f"/proc/{engine.process.guard_pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    engine.process.kill()
    engine.end()
    assert rss < 12 * 1024
