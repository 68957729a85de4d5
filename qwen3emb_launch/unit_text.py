"""The text of systemd's files: service units, and what goes with them. Pure; effects are in `systemd/`.

Quoting follows systemd.syntax(7) and systemd.service(5): words in double quotes with C escapes, `%` doubled where
specifiers are expanded. Commands begin with `:`, so `$` means nothing in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qwen3emb_launch.errors import InvalidInputError

Scope = Literal["system", "user"]

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


class Verbatim(str):
    """A word that is written as it stands: a specifier such as `%i`."""

    __slots__ = ()


@dataclass(frozen=True)
class Entry:
    """One setting of a unit. `value` is ready to stand there; `why` becomes a comment above it."""

    key: str
    value: str
    why: str = ""


@dataclass(frozen=True)
class Section:
    """One section in the order it is written."""

    name: str
    entries: tuple[Entry, ...]


def render(head: Iterable[str], sections: Iterable[Section]) -> str:
    """The whole file; `head` are its comment lines. A `why` that follows the same one is not repeated."""
    lines = [f"# {line}".rstrip() for text in head for line in _one_line_each(text)]
    for section in sections:
        lines += ["", f"[{section.name}]"]
        last = ""
        for entry in section.entries:
            if entry.why and entry.why != last:
                lines += [f"# {line}" for line in _one_line_each(entry.why)]
            last = entry.why
            lines.append(f"{entry.key}={entry.value}")
    return "\n".join(lines) + "\n"


def quote(text: str) -> str:
    """One word as systemd reads it back exactly.

    Raises InvalidInputError `unit_unsafe` for what no unit file can hold: NUL, and bytes that are no UTF-8.
    """
    if isinstance(text, Verbatim):
        return str(text)
    _check(text)
    doubled = text.replace("%", "%%")
    if _PLAIN.fullmatch(doubled):
        return doubled
    return f'"{"".join(map(_escaped, doubled))}"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    return f"\\x{ord(char):02x}" if ord(char) < 32 or ord(char) == 127 else char


def command(words: Iterable[str], prefix: str = "") -> str:
    """An Exec line. The program is an absolute path; `$` and `%` in any word are just characters.

    Raises InvalidInputError `unit_unsafe` for a program that systemd refuses to start: relative, or with quotes,
    backslashes or control characters in its path.
    """
    program, *arguments = words
    if not program.startswith("/") or re.search(r"[\"'\\\x00-\x1f\x7f]", program):
        raise InvalidInputError(
            "unit_unsafe",
            f"systemd starts no program by the path {program!r}",
            "install qwen3emb in a folder without quotes, backslashes or control characters in its name",
        )
    return " ".join([quote(f"{prefix}:{program}"), *map(quote, arguments)])


def assignment(name: str, value: str) -> str:
    """The value of an Environment= line. Raises InvalidInputError `unit_unsafe` for what systemd would leave out."""
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", value):
        raise InvalidInputError("unit_unsafe", f"{name} has control characters", "take them out")
    return quote(f"{name}={value}")


def plain_path(path: str) -> str:
    """A path where systemd reads the rest of the line as it is, specifiers apart: EnvironmentFile=, LoadCredential=.

    Raises InvalidInputError `unit_unsafe` for one that a line cannot carry.
    """
    _check(path)
    if not path.startswith("/") or re.search(r"[\x00-\x1f\x7f]", path) or path != path.strip() or path.endswith("\\"):
        raise InvalidInputError(
            "unit_unsafe", f"{path!r} cannot stand in a unit: an absolute path without line ends", "rename the file"
        )
    return path.replace("%", "%%")


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(
            "unit_unsafe", f"{text!r} is no UTF-8, and a unit file is", "rename the file or folder"
        ) from None
    if "\0" in text:
        raise InvalidInputError("unit_unsafe", f"{text!r} holds a NUL", "take it out")


def _one_line_each(text: str) -> list[str]:
    """Comment lines; NUL ends a line too, and a backslash at an end would swallow the next one."""
    return [line.rstrip("\\ ").rstrip() for line in re.split(r"[\r\n\0]+", text)]


# ---- the service -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """What a unit is made from. Times are seconds, sizes bytes; None leaves the setting out.

    `words` start the supervisor in the foreground. `instance` is the instance's name, or `%i` in a template unit.
    `loopback`: nobody outside the machine calls it, and it calls nobody. `cuda`: it needs the NVIDIA devices.
    `credentials` are name -> file, loaded by systemd; `from_credentials` are variables that name their files.
    """

    scope: Scope
    description: str
    words: tuple[str, ...]
    instance: str
    environment: Mapping[str, str]
    cuda: bool
    start_seconds: float
    stop_seconds: float
    watchdog_seconds: float | None
    memory_bytes: int | None = None
    loopback: bool = False
    network: bool = False
    environment_file: str | None = None
    credentials: Mapping[str, str] = field(default_factory=dict)
    from_credentials: Mapping[str, str] = field(default_factory=dict)
    head: tuple[str, ...] = ()
    user: str = "qwen3emb"


RESTARTS = 5  # of the whole supervisor, within as much time as they take; its engine has a policy of its own
RESTART_PAUSE = 10
STORED_SOCKETS = 64  # one a gateway worker and address
FILES = 65536  # open files: a socket a request, in the engine and in the gateway


def service(spec: Service) -> str:
    """The unit file."""
    system = spec.scope == "system"
    after = "network-online.target" if spec.network else "network.target"
    unit = [
        Entry("Description", " ".join(spec.description.split()).replace("%", "%%")),
    ]
    if system:
        unit.append(Entry("After", f"{after} nvidia-persistenced.service" if spec.cuda else after))
        if spec.network:
            unit.append(Entry("Wants", after))
    interval = RESTARTS * (spec.start_seconds + spec.stop_seconds + RESTART_PAUSE)
    limits = f"no more than {RESTARTS} starts in a row, however long each of them takes to fail"
    unit += [
        Entry("StartLimitIntervalSec", _seconds(interval), limits),
        Entry("StartLimitBurst", str(RESTARTS), limits),
    ]
    body = [*_process(spec), *_environment(spec), *_limits(spec)]
    body += _hardening_system(spec) if system else _hardening_user()
    target = "multi-user.target" if system else "default.target"
    return render(
        spec.head,
        [
            Section("Unit", tuple(unit)),
            Section("Service", tuple(body)),
            Section("Install", (Entry("WantedBy", target),)),
        ],
    )


def _process(spec: Service) -> list[Entry]:
    entries = [
        Entry("Type", "notify", "ready once the vectors are proven; `systemctl status` shows what a long start does"),
        Entry("NotifyAccess", "main", "the engine and its children have no say"),
    ]
    if spec.scope == "system" and spec.cuda:
        entries.append(
            Entry(
                "ExecStartPre",
                "+-/usr/bin/nvidia-modprobe -c 0 -u",
                "makes /dev/nvidia* as root; the service itself cannot run setuid programs",
            )
        )
    entries += [
        Entry("ExecStart", command(spec.words)),
        Entry(
            "KillMode",
            "mixed",
            "SIGTERM to the supervisor alone, which lets the engine finish its requests: sent to all, it would kill\n"
            "the engine's workers at once. What is left at the end gets SIGKILL",
        ),
        Entry("TimeoutStartSec", _seconds(spec.start_seconds), "the plan's own deadline, and some room"),
        Entry("TimeoutStopSec", _seconds(spec.stop_seconds), "the drain, the end of all processes, and some room"),
    ]
    if spec.watchdog_seconds is not None:
        why = "each sign of life is a real embedding; long enough for the supervisor to restart a hung engine itself"
        entries += [Entry("WatchdogSec", _seconds(spec.watchdog_seconds), why), Entry("TimeoutAbortSec", "10", why)]
    stays = "`qwen3emb down` ends it for good (status 0); 130 is a stop before it was ready"
    again = "bad input (status 2) is no better the second time"
    entries += [
        Entry("Restart", "on-failure", stays),
        Entry("SuccessExitStatus", "130", stays),
        Entry("RestartSec", str(RESTART_PAUSE)),
        Entry("RestartPreventExitStatus", "2", again),
        Entry(
            "FileDescriptorStoreMax",
            str(STORED_SOCKETS),
            "the address stays open while the service is restarted: who connects then waits, and is not refused",
        ),
        Entry("OOMPolicy", "continue", "an engine killed for memory is restarted by its supervisor"),
        Entry("StandardInput", "null"),
        Entry("StandardOutput", "journal", "the supervisor's talk; the engine's own output is in the state folder"),
        Entry("StandardError", "journal", "the supervisor's talk; the engine's own output is in the state folder"),
        Entry("SyslogIdentifier", f"qwen3emb-{spec.instance}"),
    ]
    return entries


def _environment(spec: Service) -> list[Entry]:
    entries = []
    if spec.scope == "system":
        entries += [
            Entry("User", spec.user, "made by sysusers.d/qwen3emb.conf"),
            Entry("Group", spec.user, "made by sysusers.d/qwen3emb.conf"),
            Entry("StateDirectory", "qwen3emb", "engines, models, instances; the user's home"),
            Entry("StateDirectoryMode", "0700", "engines, models, instances; the user's home"),
            Entry("CacheDirectory", "qwen3emb", "compiled kernels"),
            Entry("CacheDirectoryMode", "0700", "compiled kernels"),
        ]
    entries.append(Entry("UMask", "0077"))
    entries += [Entry("Environment", assignment(name, value)) for name, value in spec.environment.items()]
    if spec.environment_file:
        entries.append(
            Entry(
                "EnvironmentFile", f"-{spec.environment_file}", "settings of one instance: QWEN3EMB_SET_… and the like"
            )
        )
    for name, path in spec.credentials.items():
        entries.append(Entry("LoadCredential", f"{name}:{plain_path(path)}", "read by systemd, for this service only"))
    for variable, name in spec.from_credentials.items():
        entries.append(Entry("Environment", f"{variable}=%d/{name}", "the file's place, not its content"))
    return entries


def _limits(spec: Service) -> list[Entry]:
    entries = [
        Entry("LimitNOFILE", str(FILES), "a socket a request"),
        Entry("LimitMEMLOCK", "infinity", "memory that a GPU reads is locked"),
        Entry("LimitCORE", "0", "a core file would hold the texts being embedded"),
        Entry("TasksMax", "16384"),
    ]
    if spec.memory_bytes is not None:
        why = "twice the plan's estimate: a leak ends this engine, not the machine"
        entries.insert(0, Entry("MemoryMax", str(spec.memory_bytes), why))
    return entries


def _hardening_user() -> list[Entry]:
    """What a user's manager can do without privileges, on any distribution."""
    return [Entry("NoNewPrivileges", "yes"), *_seccomp()]


def _seccomp() -> list[Entry]:
    calls = "what services need, no more; a refused call is an error, not the end"
    return [
        Entry("LockPersonality", "yes"),
        Entry("RestrictRealtime", "yes"),
        Entry("RestrictSUIDSGID", "yes"),
        Entry("RestrictNamespaces", "yes"),
        Entry("RestrictAddressFamilies", "AF_UNIX AF_INET AF_INET6 AF_NETLINK", "netlink: listing the interfaces"),
        Entry("SystemCallArchitectures", "native"),
        Entry("SystemCallFilter", "@system-service", calls),
        Entry("SystemCallFilter", "~@privileged", calls),
        Entry("SystemCallErrorNumber", "EPERM", calls),
    ]


def _hardening_system(spec: Service) -> list[Entry]:
    nobody = "no privilege is needed once it runs"
    entries = [
        Entry("NoNewPrivileges", "yes", nobody),
        Entry("CapabilityBoundingSet", "", nobody),
        Entry("AmbientCapabilities", "", nobody),
        Entry("ProtectSystem", "strict", "everything is read-only but the folders above and /tmp"),
        Entry("ProtectHome", "yes"),
        Entry("PrivateTmp", "yes"),
        Entry("PrivateMounts", "yes"),
        Entry("ProtectKernelTunables", "yes"),
        Entry("ProtectKernelModules", "yes"),
        Entry("ProtectKernelLogs", "yes"),
        Entry("ProtectControlGroups", "yes"),
        Entry("ProtectClock", "yes"),
        Entry("ProtectHostname", "yes"),
        Entry("ProtectProc", "invisible", "not ProcSubset=pid: CUDA reads /proc/driver/nvidia, torch /proc/cpuinfo"),
        Entry("RemoveIPC", "yes", "shared memory of killed workers goes with the service"),
        Entry(
            "MemoryDenyWriteExecute",
            "no",
            "kernels are compiled in memory: by CUDA's driver and Triton, and by oneDNN on a CPU, which was tried",
        ),
        *_seccomp(),
        *_devices(spec),
    ]
    if spec.loopback:
        only = "it serves this machine only and fetches nothing"
        entries += [Entry("IPAddressDeny", "any", only), Entry("IPAddressAllow", "localhost", only)]
    return entries


def _devices(spec: Service) -> list[Entry]:
    if not spec.cuda:
        none = "no GPU is used"
        return [
            Entry("PrivateDevices", "yes", none),
            Entry("DevicePolicy", "closed", none),
            Entry("PrivateUsers", "yes", none),
        ]
    why = "NVIDIA's devices and the harmless ones; PrivateDevices=yes would hide the GPU"
    return [Entry("DevicePolicy", "closed", why), Entry("DeviceAllow", "char-nvidia* rw", why)]


def _seconds(value: float) -> str:
    return str(int(-(-value // 1)))


# ---- what goes with it -------------------------------------------------------------------------------------------


def sysusers(user: str, home: str) -> str:
    """sysusers.d(5): the account that the system units run as. It has no shell and no password."""
    head = "The account of qwen3emb's services. A fixed one: engines and models of many gigabytes are its own."
    return render([head], []) + f'u {user} - "Qwen3-Embedding service" {home}\n'


def tmpfiles(user: str, home: str, cache: str) -> str:
    """tmpfiles.d(5): folders there before the first start, and engine logs that nobody wants any more."""
    text = render(
        ["Folders of qwen3emb's services. Engine logs are rotated by size as they grow; old ones go here."], []
    )
    return text + (
        f"d {home} 0700 {user} {user} -\nd {cache} 0700 {user} {user} -\ne {home}/state/instances/*/logs - - - 60d\n"
    )


def modules_load() -> str:
    """modules-load.d(5): without nvidia-uvm at boot its devices are unknown when the unit's list is made."""
    return render(["The module behind /dev/nvidia-uvm, which CUDA needs, before qwen3emb's services start."], []) + (
        "nvidia-uvm\n"
    )
