"""The guard: a tiny process between the supervisor and an engine, so that no engine process outlives its supervisor.

Run as `python -I -S guard.py`, standard library only (under 12 MB). It starts the engine in a session of its own,
adopts every descendant that loses its parent (PR_SET_CHILD_SUBREAPER), copies the engine's output into a rotated log
file with secrets blanked, and obeys its standard input:

    first line         the order, JSON: argv, env, cwd, log, rotate_bytes, rotate_keep, secrets, sign (what the engine
                       says when it is lost), fds (open here, the engine gets them), scratch (its folder for temporary
                       files, or "")
    {"do": "look"}     see what shared memory the engine has: it serves now, and when it has died nothing shows that
    {"do": "term"}     SIGTERM to the engine's main process only: to the group it would kill SGLang's workers undrained
    {"do": "kill"}     SIGKILL to the engine and everything descended from it
    end of file        the supervisor is gone, in whatever way: kill everything

Stopped by SIGSTOP it can obey nobody: the kernel wakes it when its supervisor ends (PR_SET_PDEATHSIG, SIGCONT), and the
supervisor wakes it with every order.

It answers on standard output, a JSON line an event: spawned (pid), spawn_failed (error), doomed (the sign was in the
output), exited (status: exit code, or minus the signal), stuck (pids that SIGKILL did not remove), gone (nothing is
left; the guard ends). When the engine's main process ends, for whatever reason, everything it left behind is killed
before `gone`, its temporary files with it, and what was seen of its shared memory, since it serves and when the killing
begins: killed processes remove nothing, and each start would leave a dozen files in /tmp and /dev/shm.

When the guard itself is killed, the kernel kills the engine (PR_SET_PDEATHSIG), SGLang's workers follow their parent,
and whatever else was descended from it falls to the supervisor, a subreaper too.
"""

from __future__ import annotations

import _thread  # for a thread that nobody waits for at the end
import ctypes
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # typing's own costs every guard most of a megabyte
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Order: TypeAlias = dict[str, Any]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PIPE_BYTES = 1 << 20  # the most an unprivileged pipe may hold: the engine writes on while the disk is slow
LINE_LIMIT = 1 << 16  # a longer line is written in pieces
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ)
SIGN_WITHIN = 64  # bytes of a line, its time stamp included
KILL_EVERY = 0.05  # seconds between two rounds of killing what is left
LOOK_FOR = 1.0  # seconds for what the processes have mapped, which takes milliseconds
STUCK_AFTER = 4.0  # seconds of killing after which the remaining pids are reported
SHARED = "/dev/shm/"  # noqa: S108 - looked into, not written to
# How Python and SGLang begin names that are drawn, and so nobody else's; `sgl_shm_`: with several workers.
DRAWN = ("sem.mp-", "psm_", "sglang_", "sgl_shm_")


def parents() -> dict[int, int]:
    """Every process's parent, from /proc. Processes that end meanwhile are left out."""
    found = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208 - pathlib would double this process's memory
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            found[int(entry)] = int(fields[1])
    return found


def descendants(root: int) -> list[int]:
    """All living descendants of `root`, zombies included, nearest first."""
    below: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        below.setdefault(parent, []).append(pid)
    found, queue = [], [root]
    while queue:
        for child in below.get(queue.pop(0), []):
            found.append(child)
            queue.append(child)
    return found


def shared_memory(pids: list[int]) -> list[str]:
    """The files in /dev/shm with drawn names that these processes have mapped.

    Told by their inodes: a semaphore is mapped under another name, before it gets its own. Inodes count from one in
    each file system, and a sandboxed process may have another /dev/shm: those of this one's device alone are meant.
    """
    mapped = set()
    for pid in pids:
        try:
            with open(f"/proc/{pid}/maps", "rb") as file:  # noqa: PTH123
                fields = [line.split(None, 5) for line in file if SHARED.encode() in line]
        except OSError:
            continue
        mapped |= {(device, int(inode)) for _, _, _, device, inode, _ in fields}
    if not mapped:
        return []
    try:
        device = os.stat(SHARED).st_dev  # noqa: PTH116
        here = b"%02x:%02x" % (os.major(device), os.minor(device))
        with os.scandir(SHARED) as entries:
            return [one.path for one in entries if one.name.startswith(DRAWN) and (here, one.inode()) in mapped]
    except OSError:
        return []


def remove_tree(folder: str) -> None:
    """Remove a folder and all in it, links as links. What cannot be removed stays.

    So does a folder that is not this user's alone: what clears /tmp by age may have removed it, and another user made
    one of the same name, who could exchange a part of it for a link while it is being removed.
    """
    try:
        about = os.lstat(folder)
    except OSError:
        return
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        return
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files + folders:
            path = os.path.join(parent, name)  # noqa: PTH118
            _try(os.rmdir if name in folders and not os.path.islink(path) else os.unlink, path)  # noqa: PTH114
    _try(os.rmdir, folder)


def _try(remove: Callable[[str], None], path: str) -> None:
    try:
        remove(path)
    except OSError:
        return


def become_subreaper() -> None:
    """From now on, orphaned descendants become children of this process. Raises OSError."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(number: int = signal.SIGKILL, parent: int | None = None) -> bool:
    """The kernel sends this process the signal when its parent ends, also after exec. Raises OSError.

    False where `parent`, the pid it had when this process was made, has ended already: no signal will come.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    return parent is None or os.getppid() == parent


def following(number: int) -> Callable[[], None]:
    """For `preexec_fn`: the child gets the signal when this process ends, and none begins after it has."""
    parent = os.getpid()

    def follow() -> None:
        if not die_with_parent(number, parent):
            os._exit(1)

    return follow


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Log:
    """The engine's output on disk: rotated by size, secrets blanked. A full disk loses lines, never the engine."""

    def __init__(self, path: str, rotate_bytes: int, keep: int, secrets: list[str]) -> None:
        self.path, self.rotate_bytes, self.keep = path, rotate_bytes, keep
        self.secrets = [s.encode() for s in secrets if s]
        self.overlap = max((len(s) for s in self.secrets), default=1) - 1
        self.rest = b""
        self.lost = 0
        self.size = 0
        self.fd = -1

    def feed(self, data: bytes) -> None:
        """Take output as it comes; whole lines go to the file at once."""
        self.rest += data
        for secret in self.secrets:  # before any cut: afterwards only the last bytes can begin another one
            self.rest = self.rest.replace(secret, b"[redacted]")
        cut = self.rest.rfind(b"\n") + 1
        if not cut and len(self.rest) > LINE_LIMIT:
            cut = len(self.rest) - self.overlap
        if cut:
            self._write(self.rest[:cut])
            self.rest = self.rest[cut:]

    def close(self) -> None:
        """Write the unfinished last line."""
        if self.rest:
            self._write(self.rest + b"\n")
            self.rest = b""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _write(self, text: bytes) -> None:
        if self.lost:
            text = b"[%d bytes of output are lost: the log could not be written]\n" % self.lost + text
        try:
            if self.fd < 0 or self.size > self.rotate_bytes:
                self._open()
            view = memoryview(text)
            while view:
                written = os.write(self.fd, view)
                self.size += written
                view = view[written:]
            self.lost = 0
        except OSError:
            self.lost += len(text)

    def _open(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            for number in range(self.keep - 1, 0, -1):
                older = f"{self.path}.{number}"
                if os.path.exists(older):  # noqa: PTH110
                    os.replace(older, f"{self.path}.{number + 1}")  # noqa: PTH105
            if self.keep:
                os.replace(self.path, f"{self.path}.1")  # noqa: PTH105
            else:
                os.truncate(self.path, 0)
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self.fd).st_size


class Guard:
    """One engine's guard: a poll loop over the order pipe, the engine's output and the deaths of children."""

    def __init__(self) -> None:
        self.engine = 0  # pid, 0 when none runs
        self.killing_since: float | None = None
        self.stuck_reported = False
        self.control = b""
        self.sign = self.line = b""
        self.output = -1
        self.log: Log | None = None
        self.scratch = ""
        self.shared: set[str] = set()  # names in /dev/shm that are the engine's
        self.looked = False  # for them, since its end began

    def run(self) -> None:
        """Take the order, start the engine, serve until nothing is left."""
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)  # only the order pipe decides
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write, 0):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        become_subreaper()
        _prctl(PR_SET_PDEATHSIG, signal.SIGCONT)

        poll = select.poll()
        poll.register(0, select.POLLIN)
        poll.register(wake_read, select.POLLIN)
        ordered = False
        while True:
            ready = dict(poll.poll(1000 * KILL_EVERY if self.killing_since is not None else None))
            if wake_read in ready:
                _read(wake_read)
            if self.output in ready and not self._copy_output():
                poll.unregister(self.output)
                os.close(self.output)
                self.output = -1
            if 0 in ready:
                data = _read(0)
                if data == b"":
                    poll.unregister(0)
                    self._kill()
                for line in self._lines(data or b""):
                    if ordered:
                        self._obey(json.loads(line)["do"])
                    else:
                        ordered = True
                        self._start(json.loads(line))
                        if self.output >= 0:
                            poll.register(self.output, select.POLLIN)
            self._reap()
            if self.killing_since is not None and self._finish_killing():
                return

    def _lines(self, data: bytes) -> list[bytes]:
        *whole, self.control = (self.control + data).split(b"\n")
        return whole

    def _obey(self, what: str) -> None:
        if what == "kill":
            self._kill()
        elif what == "look":
            self._look_at_memory()
        elif what == "term" and self.engine:
            self._look_once_more()
            os.kill(self.engine, signal.SIGTERM)

    def _start(self, order: Order) -> None:
        self.sign = order["sign"].encode()
        self.scratch = order.get("scratch", "")  # a supervisor older than this file, replaced under it, sends none
        self.log = Log(order["log"], order["rotate_bytes"], order["rotate_keep"], order["secrets"])
        output, engine_end = os.pipe()
        failed, failing = os.pipe()
        _grow(output)
        me = os.getpid()
        self.engine = os.fork()
        if self.engine == 0:
            _become_engine(order, me, engine_end, failing)
        for fd in (engine_end, failing, *order["fds"]):
            os.close(fd)
        os.set_blocking(output, False)
        self.output = output
        error = os.read(failed, 4096)
        os.close(failed)
        if error:
            tell(event="spawn_failed", error=error.decode(errors="replace"))
            self._kill()
        else:
            tell(event="spawned", pid=self.engine)

    def _copy_output(self) -> bool:
        """Move what the pipe holds into the log. False at its end."""
        data = _read(self.output)
        if data and self.log:
            self.log.feed(data)
        if data and self.sign:
            self._look_for_sign(data)
        return data != b""

    def _look_for_sign(self, data: bytes) -> None:
        """Told once. Only the beginnings of lines count: further on stands what clients sent, if the engine logs it."""
        lines = (self.line + data).split(b"\n")
        if any(self.sign in line[:SIGN_WITHIN] for line in lines):
            tell(event="doomed")
            self.sign = b""
            self._look_once_more()
        self.line = lines[-1][:SIGN_WITHIN]

    def _reap(self) -> None:
        """Collect every dead child, the adopted ones too. The engine's own death is news."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.engine:
                self.engine = 0
                tell(event="exited", status=os.waitstatus_to_exitcode(status))
                self._kill()

    def _kill(self) -> None:
        if self.killing_since is None:
            self.killing_since = time.monotonic()

    def _finish_killing(self) -> bool:
        """One round of killing all descendants. True when none was left and the last output is written."""
        self._look_once_more()
        left = descendants(os.getpid())
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._reap()
        if left:
            since = self.killing_since or 0.0
            if not self.stuck_reported and time.monotonic() - since > STUCK_AFTER:
                self.stuck_reported = True
                tell(event="stuck", pids=left)
            return False
        while self.output >= 0 and _read_into(self.log, self.output):
            pass
        if self.log:
            self.log.close()
        for name in self.shared:
            _try(os.unlink, name)
        if self.scratch:
            remove_tree(self.scratch)
        tell(event="gone")
        return True

    def _look_once_more(self) -> None:
        """While the processes live: SGLang kills its own before it ends."""
        if not self.looked:
            self.looked = True
            self._look_at_memory()

    def _look_at_memory(self) -> None:
        """In a thread that is not waited for longer than LOOK_FOR.

        /proc/PID/maps waits for a process that is held in mmap, as by a network file system that hangs, and the killing
        that would free it comes after this.
        """
        found: list[str] = []
        over = _thread.allocate_lock()
        over.acquire()

        def look() -> None:
            try:
                found.extend(shared_memory(descendants(os.getpid())))
            finally:
                over.release()

        try:
            _thread.start_new_thread(look, ())
        except RuntimeError:  # no thread to be had: the names stay
            return
        if over.acquire(timeout=LOOK_FOR):
            self.shared.update(found)


def _become_engine(order: Order, guard: int, output: int, failing: int) -> None:
    """In the forked child: become the engine, or write the reason into `failing` and end."""
    try:
        os.setsid()
        die_with_parent()
        if os.getppid() != guard:
            os._exit(1)
        for number in IGNORED:
            signal.signal(number, signal.SIG_DFL)  # an ignored signal would stay ignored in the engine
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(order["cwd"])
        os.execvpe(order["argv"][0], order["argv"], order["env"])  # noqa: S606
    except OSError as error:
        os.write(failing, f"{error.strerror}: {error.filename or order['argv'][0]}".encode())
    finally:
        os._exit(127)


def _read(fd: int) -> bytes | None:
    """What a non-blocking descriptor holds: bytes, b"" at its end, None when it holds nothing now."""
    try:
        return os.read(fd, LINE_LIMIT)
    except BlockingIOError:
        return None


def _read_into(log: Log | None, fd: int) -> bool:
    data = _read(fd)
    if data and log:
        log.feed(data)
    return bool(data)


def _grow(pipe: int) -> None:
    import fcntl

    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        return  # the user's pipe budget is spent: the default 64 KiB serves too


def tell(**event: Any) -> None:
    """One event line to the supervisor. Nobody listening is no error: the end of stdin says the same."""
    try:
        os.write(1, json.dumps(event).encode() + b"\n")
    except OSError:
        return


if __name__ == "__main__":
    try:
        Guard().run()
    except BaseException as problem:  # noqa: BLE001 - the last words of a process that nobody else can hear
        tell(event="guard_error", error=f"{type(problem).__name__}: {problem}")
        sys.exit(1)
