"""A real systemd for tests: process 1 of a namespace of its own, with a throw-away overlay of this machine's files.

It needs root, `unshare`, cgroup v2 and Debian's package `systemd` (`apt-get install systemd`); `unfit()` says what is
missing. Nothing outside the namespace is written: units, accounts and state vanish with it. Network and kernel are
shared, so nothing that configures them is started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CGROUPS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
SYSTEMD = Path("/lib/systemd/systemd")
# With pivot_root and ldconfig, which lie where not everybody's PATH leads.
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

INNER = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$SCRATCH"
mkdir "$SCRATCH/upper" "$SCRATCH/work" "$SCRATCH/root"
R="$SCRATCH/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$SCRATCH/upper,workdir=$SCRATCH/work" "$R"
mount -t proc proc "$R/proc"
mount -t sysfs sysfs "$R/sys"
mount -t cgroup2 cgroup2 "$R/sys/fs/cgroup"
mount --rbind /dev "$R/dev"
mount -t tmpfs tmpfs "$R/run"
mount -t tmpfs tmpfs "$R/tmp"
for SHARED in $SHARE; do
    mkdir -p "$R${SHARED#*:}"
    mount --rbind "${SHARED%:*}" "$R${SHARED#*:}"
done
# Nothing in here is to configure kernel or network, which are everybody's.
mount -t tmpfs tmpfs "$R/lib/systemd/system/sysinit.target.wants"
mount -t tmpfs tmpfs "$R/lib/systemd/system/sockets.target.wants"
for UNIT in networkd.service networkd.socket network-generator.service journald-audit.socket udevd.service \
    resolved.service timesyncd.service; do
    ln -sf /dev/null "$R/etc/systemd/system/systemd-$UNIT"
done
mount -t tmpfs tmpfs "$R/lib/systemd/system-generators"
rm -rf "$R"/etc/systemd/system/*.wants
# An earlier installation on this machine is not the test's.
rm -rf "$R/var/lib/qwen3emb" "$R/var/cache/qwen3emb"
echo uninitialized > "$R/etc/machine-id"
printf '[Unit]\\nRequires=basic.target\\nAfter=basic.target\\nWants=systemd-journald.service\\nAllowIsolate=yes\\n' \\
    > "$R/etc/systemd/system/test.target"
mkdir "$SCRATCH/root/.old"
cd "$R"
pivot_root . .old
umount -l /.old
# As at a real boot, and in here only: credentials are mounted by a helper in a namespace of its own.
mount --make-rshared /
export container=test
exec /lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=0
"""


def unfit() -> str:
    """Why no systemd can be booted here; empty when one can."""
    if not SYSTEMD.exists() or not shutil.which("systemctl"):
        return "systemd is not installed: apt-get install systemd"
    if os.geteuid() != 0:
        return "booting systemd in a namespace needs root"
    if not all(map(shutil.which, ("unshare", "nsenter"))):
        return "no unshare or nsenter: apt-get install util-linux"
    if _cgroup() is None:
        return "no writable cgroup v2 hierarchy"
    return ""


def _cgroup() -> Path | None:
    return next((c for c in CGROUPS if (c / "cgroup.procs").exists() and os.access(c, os.W_OK)), None)


class Machine:
    """`with Machine(scratch, share) as machine`: a booted systemd; `share` are folders, here and there."""

    def __init__(self, scratch: Path, share: Sequence[tuple[Path, str]]) -> None:
        self._scratch, self._share = scratch, share
        cgroup = _cgroup()
        assert cgroup is not None
        self._cgroup = cgroup / f"qwen3emb-test-{os.getpid()}"
        self.pid = 0

    def __enter__(self) -> Machine:
        self._scratch.mkdir(exist_ok=True)
        self._cgroup.mkdir(exist_ok=True)
        enter = (
            f'echo $$ > {self._cgroup}/cgroup.procs; exec unshare -m -p -u -i -C --fork --kill-child bash -c "$INNER"'
        )
        self._outer = subprocess.Popen(
            ["bash", "-c", enter],
            env={
                "LANG": os.environ.get("LANG", "C.UTF-8"),
                "PATH": PATH,
                "INNER": INNER,
                "SCRATCH": str(self._scratch),
                "SHARE": " ".join(f"{here}:{there}" for here, there in self._share),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        end = time.monotonic() + 60
        while self.run("systemctl", "is-active", "test.target").stdout.strip() != "active":
            if self._outer.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise AssertionError(f"systemd did not boot: {self._outer.stdout.read().decode(errors='replace')}")
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._outer.kill()
        self._outer.wait()
        for folder in sorted(self._cgroup.rglob("*/"), key=lambda p: -len(p.parts)):
            _remove(folder)
        _remove(self._cgroup)

    def run(
        self, *words: str, timeout: float = 120, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A command inside, as root, with nothing of the test's environment but what `env` says."""
        if not self.pid:
            self.pid = self._child()
            if not self.pid:
                return subprocess.CompletedProcess(words, 1, "", "not booted yet")
        clean = {"PATH": PATH, "LANG": "C.UTF-8", **(env or {})}
        inside = ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-C", "env", "-i", "--chdir=/"]
        inside += [f"{k}={v}" for k, v in clean.items()]
        return subprocess.run(
            [*inside, *words], capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )

    def must(self, *words: str, **options) -> str:
        """The output of a command that has to succeed."""
        done = self.run(*words, **options)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def properties(self, unit: str, *names: str) -> dict[str, str]:
        text = self.must("systemctl", "show", f"--property={','.join(names)}", "--", unit)
        return dict(line.split("=", 1) for line in text.splitlines())

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def _child(self) -> int:
        """Process 1 of the namespace, once it has become systemd."""
        try:
            children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text().split()
            pid = int(children[0])
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd" else 0
        except (OSError, IndexError):
            return 0


def _remove(folder: Path) -> None:
    end = time.monotonic() + 10
    while folder.exists():
        try:
            folder.rmdir()
        except OSError:
            if time.monotonic() > end:
                return
            time.sleep(0.05)


class Interpreters:
    """This test's python, and the engine's, where a service of another user finds them: below /opt.

    A virtual environment's python may lie in somebody's home, which services do not see.
    """

    def __init__(self, repository: Path, site: Path, engine: Path | None) -> None:
        self._repository, self._site, self._engine = repository, site, engine
        self.launcher = "/opt/launcher/bin/python3"
        self.engine = "/opt/engine/bin/python3"

    @property
    def share(self) -> list[tuple[Path, str]]:
        """What the machine must be given."""
        found = [
            (self._repository, "/opt/repository"),
            (self._site, "/opt/launcher-site"),
            (Path(sys.executable).resolve().parents[1], "/opt/launcher-python"),
        ]
        if self._engine:
            found.append((self._engine.resolve().parents[1], "/opt/engine-python"))
            found.append((self._engine.parents[1] / "lib", "/opt/engine/lib"))  # whole: libraries find each other
        return found

    def lay_out(self, machine: Machine) -> None:
        """Make the environments there."""
        self._make(machine, "launcher", Path(sys.executable).resolve(), "/opt/repository\n/opt/launcher-site\n")
        if self._engine:
            self._make(machine, "engine", self._engine.resolve(), None)
        # A shared libpython lies beside its python, and is looked for where that python was built.
        machine.must("bash", "-ec", "ls -d /opt/*-python/lib > /etc/ld.so.conf.d/00-test.conf; ldconfig")

    def _make(self, machine: Machine, name: str, python: Path, paths: str | None) -> None:
        home = f"/opt/{name}"
        script = [
            f"mkdir -p {home}/bin",
            f"ln -s /opt/{name}-python/bin/{python.name} {home}/bin/python3",
            f"echo home = /opt/{name}-python/bin > {home}/pyvenv.cfg",
        ]
        if paths:
            site = f"{home}/lib/python3.{sys.version_info[1]}/site-packages"
            script += [f"mkdir -p {site}", f"printf '{paths}' > {site}/all.pth"]
        machine.must("bash", "-ec", "\n".join(script))
