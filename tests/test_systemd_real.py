"""Units under a real systemd, booted in a namespace: quoting, readiness, restart, watchdog, stop; the real engine."""

from __future__ import annotations

import json
import socket
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import free_port
from supervised import until
from systemd_machine import Interpreters, Machine, unfit
from test_unit_text import NASTY

from qwen3emb_launch import unit_text
from qwen3emb_launch.engine_process.rendezvous import PLACE
from qwen3emb_launch.probe import Target, embed_once
from qwen3emb_launch.systemd.spec import WRITTEN_BY
from qwen3emb_launch.unit_text import Service

REPOSITORY = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(bool(unfit()), reason=unfit() or "-")


@pytest.fixture(scope="module")
def interpreters() -> Interpreters:
    return Interpreters(REPOSITORY, Path(sysconfig.get_path("purelib")), None)


@pytest.fixture(scope="module")
def machine(interpreters: Interpreters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine"), interpreters.share) as booted:
        interpreters.lay_out(booted)
        yield booted


def write(machine: Machine, path: str, text: str) -> None:
    machine.must("bash", "-ec", f'mkdir -p "$(dirname "{path}")"; printf %s "$TEXT" > "{path}"', env={"TEXT": text})


class Endpoint:
    """A unit of ours around the fake engine, run as an account of its own with everything locked."""

    def __init__(
        self, machine: Machine, name: str, watchdog: float | None = None, gateway: bool = False, **behaviour: object
    ) -> None:
        self.machine, self.name, self.unit, self.port = machine, name, f"qwen3emb-{name}.service", free_port()
        machine.must("bash", "-c", "id qwen3emb || useradd --system --home-dir /var/lib/qwen3emb qwen3emb")
        words = ("/opt/launcher/bin/python3", "/opt/repository/tests/notified_service.py", name, str(self.port))
        spec = Service(
            scope="system",
            description="the fake engine",
            words=(*words, "gateway") if gateway else words,
            instance=name,
            environment={
                "FAKE_ENGINE": json.dumps({"width": 64, **behaviour}),
                "QWEN3EMB_STATE_DIR": "/var/lib/qwen3emb/state",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            cuda=False,
            start_seconds=30,
            stop_seconds=20,
            watchdog_seconds=watchdog,
            loopback=True,
        )
        write(machine, f"/etc/systemd/system/{self.unit}", unit_text.service(spec))
        write(
            machine, f"/etc/systemd/system/{self.unit}.d/quick.conf", "[Service]\nRestartSec=100ms\nTimeoutAbortSec=2\n"
        )
        machine.must("systemctl", "daemon-reload")

    def start(self) -> None:
        self.machine.must("systemctl", "start", self.unit)

    def see(self, *names: str) -> dict[str, str]:
        return self.machine.properties(self.unit, *names)

    def says(self, wanted: str, timeout: float = 30) -> None:
        until(lambda: self.see("StatusText")["StatusText"].startswith(wanted), f"{self.name}: {wanted}", timeout)

    def processes(self) -> list[int]:
        path = f"/sys/fs/cgroup/system.slice/{self.unit}/cgroup.procs"
        return [int(pid) for pid in self.machine.run("cat", path).stdout.split()]

    def engine(self) -> str:
        found = self.machine.must("pgrep", "-f", f"fake_engine.py.*--port {self.port} ")
        return found.split()[-1]

    def stop(self) -> dict[str, str]:
        self.machine.must("systemctl", "stop", self.unit)
        return self.see("ActiveState", "Result", "ExecMainStatus")


def test_systemd_hands_over_every_word_as_written(machine: Machine) -> None:
    """A program in a folder with spaces, % and $, and every nasty argument and variable, arrive unchanged."""
    script = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('/var/lib/words.json', 'w'))"
    folder = "/opt/a b %i $HOME"
    machine.must("bash", "-ec", f"mkdir -p '{folder}'; ln -sf /opt/launcher/bin/python3 '{folder}/python3'")
    values = {f"N{i}": value for i, value in enumerate(NASTY) if "\x01" not in value}
    lines = ["[Service]", "Type=oneshot", f"ExecStart={unit_text.command([f'{folder}/python3', '-c', script, *NASTY])}"]
    lines += [f"Environment={unit_text.assignment(name, value)}" for name, value in values.items()]
    write(machine, "/etc/systemd/system/words.service", "\n".join(lines) + "\n")
    machine.must("systemctl", "daemon-reload")
    machine.must("systemctl", "start", "words.service")
    words, environ = json.loads(machine.must("cat", "/var/lib/words.json"))
    assert words == list(NASTY)
    assert {name: environ[name] for name in values} == values


def test_active_means_that_it_serves(machine: Machine) -> None:
    """`systemctl start` returns once an embedding came back; a stop drains, and leaves no process."""
    one = Endpoint(machine, "serves", start_delay=1.0)
    one.start()
    assert embed_once(Target("127.0.0.1", one.port, "fake", 64), "hello", 5).ok
    assert one.see("StatusText")["StatusText"] == f"ready: http://127.0.0.1:{one.port}/v1 serves fake"
    assert len(one.processes()) >= 3
    assert one.stop() == {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
    assert one.processes() == []


def test_a_failing_start_is_a_failed_unit(machine: Machine) -> None:
    """An engine that embeds nonsense never makes the unit active: the start fails, with the reason as its status."""
    one = Endpoint(machine, "nonsense", nan=True)
    write(machine, f"/etc/systemd/system/{one.unit}.d/once.conf", "[Service]\nRestart=no\n")
    machine.must("systemctl", "daemon-reload")
    assert machine.run("systemctl", "start", one.unit).returncode != 0
    seen = one.see("ActiveState", "Result", "ExecMainStatus", "StatusText")
    assert (seen["ActiveState"], seen["Result"], seen["ExecMainStatus"]) == ("failed", "exit-code", "4")
    assert "NaN" in seen["StatusText"]
    assert one.processes() == []


def test_a_killed_engine_is_the_supervisors_business(machine: Machine) -> None:
    """SIGKILL to the engine: a new one serves, the unit stayed active and systemd restarted nothing."""
    one = Endpoint(machine, "killed")
    one.start()
    before = one.engine()
    machine.must("kill", "-9", before)
    until(lambda: embed_once(Target("127.0.0.1", one.port, "fake", 64), "again", 1).ok, "the new engine")
    one.says("ready")
    assert one.engine() != before
    assert one.see("NRestarts", "ActiveState") == {"NRestarts": "0", "ActiveState": "active"}
    one.stop()


def test_a_killed_supervisor_comes_back(machine: Machine) -> None:
    """SIGKILL to the supervisor: systemd starts another, and of the first engine nothing is left."""
    one = Endpoint(machine, "orphan")
    one.start()
    engine = one.engine()
    machine.must("systemctl", "kill", "--signal=KILL", "--kill-who=main", one.unit)
    until(lambda: one.see("NRestarts")["NRestarts"] == "1", "a restart by systemd")
    one.says("ready")
    assert one.engine() != engine
    assert machine.run("kill", "-0", engine).returncode != 0
    one.stop()


def test_who_connects_while_the_service_restarts_waits(machine: Machine) -> None:
    """SIGKILL to the supervisor, with a gateway: its address stays open, and the next one answers who connected
    meanwhile. After a stop it is closed."""
    one = Endpoint(machine, "held", gateway=True)
    one.start()
    assert one.see("NFileDescriptorStore")["NFileDescriptorStore"] == "1"
    before = one.see("MainPID")["MainPID"]
    machine.must("systemctl", "kill", "--signal=KILL", "--kill-who=main", one.unit)
    until(lambda: one.see("MainPID")["MainPID"] != before, "the end of the supervisor")
    assert embed_once(Target("127.0.0.1", one.port, "fake", 64), "early", 30).ok
    assert one.see("NRestarts", "NFileDescriptorStore") == {"NRestarts": "1", "NFileDescriptorStore": "1"}
    one.stop()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", one.port), timeout=5)


def test_a_service_is_not_in_its_own_way(machine: Machine) -> None:
    """A restart with more gateway workers, and one without a gateway: each is ready at its first try, and systemd keeps
    what that start listens on, and nothing of the one before."""
    one = Endpoint(machine, "changes", gateway=True)
    one.start()
    for workers, kept in (("2", "2"), ("0", "0"), ("1", "1")):
        setting = f"[Service]\nEnvironment=GATEWAY_WORKERS={workers}\n"
        write(machine, f"/etc/systemd/system/{one.unit}.d/workers.conf", setting)
        machine.must("systemctl", "daemon-reload")
        machine.must("systemctl", "restart", one.unit)
        assert one.see("NRestarts", "NFileDescriptorStore") == {"NRestarts": "0", "NFileDescriptorStore": kept}
        assert embed_once(Target("127.0.0.1", one.port, "fake", 64), f"{workers} workers", 30).ok
    one.stop()


def test_the_watchdog_ends_a_supervisor_that_hangs(machine: Machine) -> None:
    """SIGSTOP to the supervisor: the engine still answers, and systemd restarts all of it within the period."""
    one = Endpoint(machine, "hangs", watchdog=8)
    one.start()
    main = one.see("MainPID")["MainPID"]
    machine.must("kill", "-STOP", main)
    until(lambda: one.see("NRestarts")["NRestarts"] == "1", "the watchdog", 60)
    said = machine.journal(one.unit)
    assert "Watchdog timeout (limit 8s)!" in said
    assert said.count("Watchdog timeout") == 1
    one.says("ready")
    assert one.see("MainPID")["MainPID"] != main
    one.stop()


def test_a_watchdog_lets_a_good_service_live(machine: Machine) -> None:
    """Probes feed it: the last sign of life moves on, and nothing is restarted."""
    one = Endpoint(machine, "lives", watchdog=8)
    one.start()
    stamp = one.see("WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"]
    until(
        lambda: int(one.see("WatchdogTimestampMonotonic")["WatchdogTimestampMonotonic"]) - int(stamp) > 4_000_000,
        "signs of life over four seconds",
    )
    assert one.see("NRestarts", "ActiveState") == {"NRestarts": "0", "ActiveState": "active"}
    one.stop()


def test_a_hung_engine_is_restarted_before_the_watchdog(machine: Machine) -> None:
    """An engine that answers no more is replaced by its supervisor; the service itself goes on."""
    one = Endpoint(machine, "stuck", watchdog=2, hang_after=20)  # a period too short: the supervisor lengthens it
    one.start()
    assert float(one.see("WatchdogUSec")["WatchdogUSec"].removesuffix("s")) > 7
    first = one.engine()
    until(lambda: machine.run("kill", "-0", first).returncode != 0, "the hung engine's end", 30)
    one.says("ready")
    assert one.see("NRestarts")["NRestarts"] == "0"
    one.stop()


QWEN3EMB = ("/opt/launcher/bin/python3", "-P", "-m", "qwen3emb_launch")


def test_install_and_uninstall_leave_nothing(machine: Machine) -> None:
    """install writes, enables and says so, twice the same; uninstall takes all of it away again."""
    listing = ("bash", "-c", "find /etc -name '*qwen3emb*' | sort")
    before = machine.must(*listing)
    options = ("-p", "demo", "--system", "--json")
    first = json.loads(machine.must(*QWEN3EMB, "systemd", "install", *options))["result"]
    assert {f["did"] for f in first["files"]} == {"written"}
    assert machine.must("systemctl", "is-enabled", "qwen3emb-demo.service").strip() == "enabled"
    assert machine.must("id", "-un", "qwen3emb").strip() == "qwen3emb"
    assert machine.must("stat", "-c", "%U %a", "/var/lib/qwen3emb").strip() == "qwen3emb 700"
    again = json.loads(machine.must(*QWEN3EMB, "systemd", "install", *options))["result"]
    assert {f["did"] for f in again["files"]} == {"unchanged"}
    status = json.loads(machine.must(*QWEN3EMB, "systemd", "status", "--json"))["result"]["units"]
    assert [(u["unit"], u["active"], u["enabled"]) for u in status] == [
        ("qwen3emb-demo.service", "inactive", "enabled")
    ]
    machine.must(*QWEN3EMB, "systemd", "uninstall", "--name", "demo")
    assert machine.must(*listing) == before
    machine.must(*QWEN3EMB, "systemd", "uninstall", "--name", "demo")  # nothing to do is no error


def test_a_launcher_in_a_home_is_refused_for_the_system(machine: Machine) -> None:
    """A qwen3emb that the service's account cannot read is refused before anything is written, with the way out."""
    machine.must("bash", "-ec", "mkdir -p /root/private && cp -r /opt/launcher /root/private/launcher")
    words = ("/root/private/launcher/bin/python3", "-P", "-m", "qwen3emb_launch", "systemd", "install", "-p", "demo")
    machine.must("bash", "-ec", "mkdir /root/x && cp -rL /opt/repository/qwen3emb_launch /root/x && "
                 "cp -r /opt/repository/profiles /root/x")  # fmt: skip
    done = machine.run(*words, "--system", "--json", env={"PYTHONPATH": "/root/x"})
    assert done.returncode == 3, done.stdout + done.stderr
    assert json.loads(done.stdout)["error"]["code"] == "launcher_private"


def test_a_users_own_manager_needs_no_root(machine: Machine) -> None:
    """As an ordinary user: install enables, the locks of a user's unit hold a serving endpoint, uninstall cleans up."""
    machine.must("useradd", "--create-home", "--uid", "4711", "alice")
    machine.must("install", "-d", "-o", "alice", "-m", "700", "/run/user/4711")
    manager = ["--unit=alice-manager", "--uid=alice", "-p", "Delegate=yes", "-E", "XDG_RUNTIME_DIR=/run/user/4711"]
    machine.must("systemd-run", *manager, "/lib/systemd/systemd", "--user")
    environ = {"XDG_RUNTIME_DIR": "/run/user/4711", "HOME": "/home/alice", "USER": "alice", "PATH": "/usr/bin:/bin"}
    alice = ("runuser", "-u", "alice", "--", "env", "-i", *(f"{k}={v}" for k, v in environ.items()))
    until(lambda: machine.run(*alice, "systemctl", "--user", "show", "-p", "Version").returncode == 0, "her manager")

    done = json.loads(machine.must(*alice, *QWEN3EMB, "systemd", "install", "-p", "demo", "--json"))["result"]
    assert (done["scope"], done["enabled"]) == ("user", True)
    port = free_port()
    secret = "/home/alice/secret file"
    machine.must(*alice, "bash", "-c", f"echo s3cret > '{secret}'; chmod 600 '{secret}'")
    spec = Service(
        scope="user",
        description="the fake engine",
        words=("/opt/launcher/bin/python3", "/opt/repository/tests/notified_service.py", "hers", str(port)),
        instance="hers",
        environment={"FAKE_ENGINE": '{"width": 64}', "PYTHONDONTWRITEBYTECODE": "1"},
        cuda=False,
        start_seconds=30,
        stop_seconds=20,
        watchdog_seconds=8,
        credentials={"hf_token": secret},
        from_credentials={"HF_TOKEN_PATH": "hf_token"},
        head=(WRITTEN_BY,),
    )
    write(machine, "/home/alice/.config/systemd/user/qwen3emb-hers.service", unit_text.service(spec))
    machine.must(*alice, "systemctl", "--user", "daemon-reload")
    machine.must(*alice, "systemctl", "--user", "start", "qwen3emb-hers")
    assert embed_once(Target("127.0.0.1", port, "fake", 64), "hello", 5).ok
    rows = json.loads(machine.must(*alice, *QWEN3EMB, "systemd", "status", "--json"))["result"]["units"]
    hers = next(row for row in rows if row["unit"] == "qwen3emb-hers.service")
    assert (hers["active"], hers["says"]) == ("active", f"ready: http://127.0.0.1:{port}/v1 serves fake")
    place = machine.must("bash", "-c", f"tr '\\0' '\\n' < /proc/{hers['pid']}/environ | sed -n 's/^HF_TOKEN_PATH=//p'")
    assert machine.must(*alice, "cat", place.strip()) == "s3cret\n"
    for name in ("hers", "demo"):
        machine.must(*alice, *QWEN3EMB, "systemd", "uninstall", "--name", name)
    assert machine.run("bash", "-c", "find /home/alice/.config/systemd -type f -o -type l").stdout == ""
    machine.must("systemctl", "stop", "alice-manager")


@pytest.mark.engine
@pytest.mark.xdist_group("behind_locks")
def test_the_real_engine_serves_behind_all_locks(engine_python: Path, tmp_path: Path) -> None:
    """The generated unit, unchanged: the real engine starts as its own account, embeds for whoever has a key of the
    file that systemd hands over, is killed, serves again."""
    pythons = Interpreters(REPOSITORY, Path(sysconfig.get_path("purelib")), engine_python)
    folders = {"QWEN3EMB_DATA_DIR": "/var/lib/qwen3emb/data", "HOME": "/var/lib/qwen3emb"}
    port, unit = free_port(), "qwen3emb-demo.service"
    with Machine(tmp_path / "machine", pythons.share) as machine:
        pythons.lay_out(machine)
        machine.must("bash", "-ec", "umask 077; echo alice sesame-open > /etc/embedding-keys")
        install = (*QWEN3EMB, "systemd", "install", "-p", "demo", "--port", str(port), "--system", "--json")
        install = (*install, "--credential", "api_keys=/etc/embedding-keys")
        assert json.loads(machine.must(*install))["result"]["missing"]
        as_service = ("runuser", "-u", "qwen3emb", "--", "env", *(f"{k}={v}" for k, v in folders.items()))
        machine.must(
            *as_service, *QWEN3EMB, "engine", "install", "cpu", "--python", pythons.engine, "--name", "cpu", timeout=300
        )
        started = json.loads(machine.must(*install, "--now"))["result"]
        assert (started["missing"], started["started"]) == ([], True)
        done = machine.run("systemctl", "start", unit, timeout=300)
        assert done.returncode == 0, machine.journal(unit)
        target = Target("127.0.0.1", port, "demo", 256, "sesame-open")
        assert embed_once(target, "hello", 30).ok
        assert embed_once(replace(target, key="sesame-shut"), "hello", 30).status == 401
        engine = machine.must("pgrep", "-f", "qwen3emb_engine_plugin.serve").split()[0]
        assert f"{PLACE}=file:///proc/" in machine.must("cat", f"/proc/{engine}/environ")  # no port of torch's
        machine.must("kill", "-9", engine)
        until(lambda: embed_once(target, "again", 10).ok, "the new engine", 240)
        assert machine.properties(unit, "NRestarts", "ActiveState") == {"NRestarts": "0", "ActiveState": "active"}
        machine.must("systemctl", "stop", unit)
        assert machine.properties(unit, "Result", "ExecMainStatus") == {"Result": "success", "ExecMainStatus": "0"}
        assert machine.run("pgrep", "-u", "qwen3emb").stdout == ""
