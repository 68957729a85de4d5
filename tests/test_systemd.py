"""systemd show, install, uninstall, status without a systemd: what is written where, what is refused, what is kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen3emb_launch import gpu
from qwen3emb_launch.cli.app import run
from qwen3emb_launch.facts import Deadlines
from qwen3emb_launch.notify import watchdog_seconds
from qwen3emb_launch.systemd import places, spec
from qwen3emb_launch.systemd.installer import LOCAL_TEXT
from qwen3emb_launch.systemd.manager import Manager

ANALYZE = shutil.which("systemd-analyze")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no engine, a home of the test's own; os.environ is put back after commands that change it."""
    monkeypatch.setattr(gpu, "inventory", lambda *_: [])
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for name in (*spec.KEPT, *spec.HUBS, *places.SYSTEM_FOLDERS):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def envelope(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    status = run([*args, "--json"])
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return status, json.loads(out)


def shown(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    status, answer = envelope(capsys, "systemd", "show", *args)
    assert status == 0, answer
    return answer["result"]["text"]


def values(text: str, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", text, flags=re.MULTILINE)


def test_show_needs_nothing_and_follows_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """A GPU profile's unit is printed on a machine without GPU, engine or model, with the plan's deadlines."""
    text = shown(capsys, "-p", "rtx4090:lean", "--system", "--set", "deadlines.drain=100")
    assert values(text, "ExecStart") == [
        f":{sys.executable} -P -m qwen3emb_launch up --name rtx4090-lean --offline --profile rtx4090:lean "
        "--set deadlines.drain=100"
    ]
    assert int(values(text, "TimeoutStartSec")[0]) >= 580 + 5  # the planner's start deadline for the 4B, and reap
    assert int(values(text, "TimeoutStopSec")[0]) >= 105
    assert values(text, "WatchdogSec") == [str(int(watchdog_seconds(Deadlines())))]
    assert values(text, "User") == ["qwen3emb"]


def test_show_prints_the_bare_unit(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json stdout is the file and nothing else."""
    assert run(["systemd", "show", "-p", "demo", "--user"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Written by")
    assert out.rstrip().endswith("WantedBy=default.target")


def test_everything_asked_for_reaches_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of `up` go into the unit; folders and files become absolute, odd names survive."""
    (tmp_path / "keys").write_text("alice sesame-open\n")
    monkeypatch.chdir(tmp_path)
    profile = tmp_path / "my 100% profile.yaml"
    profile.write_text((Path(__file__).parents[1] / "profiles" / "demo.yaml").read_text())
    text = shown(
        capsys, "-p", str(profile), "--name", "mine", "--host", "0.0.0.0", "--port", "30100",
        "--set", "max_prefill_tokens=4096", "--set", "env.X=a b$c%d", "--set", "gateway.api_keys=keys",
    )  # fmt: skip
    (line,) = values(text, "ExecStart")
    words = shlex.split(line.replace("%%", "%"))
    assert words[4:] == [
        "up", "--name", "mine", "--offline", "--profile", str(profile), "--host", "0.0.0.0", "--port", "30100",
        "--set", "max_prefill_tokens=4096", "--set", "env.X=a b$c%d", "--set", f"gateway.api_keys={tmp_path / 'keys'}",
    ]  # fmt: skip


def test_only_what_stays_on_this_machine_is_cut_off(capsys: pytest.CaptureFixture[str]) -> None:
    """An address for others, or downloads, open the network; the default closes it."""
    assert "IPAddressDeny=any" in shown(capsys, "-p", "demo", "--system")
    others = ("--host", "0.0.0.0", "--set", "gateway.insecure=true")
    assert "IPAddressDeny" not in shown(capsys, "-p", "demo", "--system", *others)
    download = shown(capsys, "-p", "demo", "--system", "--download")
    assert "IPAddressDeny" not in download
    assert "--offline" not in download
    assert values(download, "Wants") == ["network-online.target"]


def test_a_users_folders_come_along_and_secrets_do_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders and settings of the installing shell stand in a user's unit; tokens never, in neither scope."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("QWEN3EMB_SET_TP", "1")
    monkeypatch.setenv("HF_HOME", "/data/hf cache")
    user, system = shown(capsys, "-p", "demo", "--user"), shown(capsys, "-p", "demo", "--system")
    assert '"HF_HOME=/data/hf cache"' in values(user, "Environment")
    assert "QWEN3EMB_SET_TP=1" in values(user, "Environment")
    assert "QWEN3EMB_STATE_DIR=/var/lib/qwen3emb/state" in values(system, "Environment")
    assert "hf_secret" not in user + system


def test_a_hub_with_a_password_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_ENDPOINT with user and password must not become readable by all."""
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.example")
    status, answer = envelope(capsys, "systemd", "show", "-p", "demo", "--user", "--download")
    assert (status, answer["error"]["code"]) == (2, "secret_in_unit")
    assert "hunter2" not in json.dumps(answer)


def test_a_token_is_handed_over_as_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """--credential hf_token=FILE: LoadCredential= and the variable that names its place."""
    text = shown(capsys, "-p", "demo", "--system", "--download", "--credential", "hf_token=/etc/keys/hf")
    assert values(text, "LoadCredential") == ["hf_token:/etc/keys/hf"]
    assert "HF_TOKEN_PATH=%d/hf_token" in values(text, "Environment")
    for bad in ("hf_token", "hf_token=", "a b=/x"):
        status, answer = envelope(capsys, "systemd", "show", "-p", "demo", "--credential", bad)
        assert (status, answer["error"]["code"]) == (2, "bad_credential")


def test_memory_grows_with_what_the_gateway_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    """MemoryMax leaves room for the gateway's workers and twice its cache, beside the engines."""

    def limit(*settings: str) -> int:
        (value,) = values(shown(capsys, "-p", "demo", "--system", *settings), "MemoryMax")
        return int(value)

    small = limit("--set", "gateway.cache_mb=0")
    assert limit("--set", "gateway.cache_mb=1000") == small + 2 * (1000 << 20)
    assert limit("--set", "gateway.cache_mb=0", "--set", "gateway.workers=2") == small + (256 << 20)
    assert limit("--set", "gateway.enabled=false") == small - (256 << 20)


def test_api_keys_are_handed_over_as_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--credential api_keys=FILE opens the address for others: the gateway gets the place, the unit names no key, and
    a file that holds none is refused now."""
    keys = tmp_path / "keys"
    keys.write_text("alice sesame-open\n")
    others = ("-p", "demo", "--system", "--host", "0.0.0.0", "--credential")
    text = shown(capsys, *others, f"api_keys={keys}")
    assert values(text, "LoadCredential") == [f"api_keys:{keys}"]
    assert "QWEN3EMB_SET_GATEWAY__API_KEYS=%d/api_keys" in values(text, "Environment")
    assert "sesame" not in text
    status, answer = envelope(capsys, "systemd", "show", *others, f"api_keys={tmp_path / 'nowhere'}")
    assert (status, answer["error"]["code"]) == (2, "bad_keys")


def test_the_template_serves_every_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """qwen3emb@PROFILE.service runs that profile, with settings from a file of its own."""
    text = shown(capsys, "--template", "--system")
    assert values(text, "ExecStart")[0].endswith("up --offline --profile %i")
    assert values(text, "EnvironmentFile") == ["-/etc/qwen3emb/%i.env"]
    assert values(text, "SyslogIdentifier") == ["qwen3emb-%i"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-p", "nosuch"), "unknown_profile"),
        (("-p", "demo", "--name", "Bad Name"), "bad_name"),
        (("-p", "demo", "--set", "nosuch=1"), "unknown_setting"),
        (("-p", "demo", "--port", "65000", "--set", "gateway.enabled=false"), "port_too_high"),
        (("-p", "demo", "--set", "gateway.api_keys=/nowhere/keys"), "bad_keys"),
    ],
)
def test_what_up_would_refuse_is_refused_now(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: str
) -> None:
    """A unit that could never start is not written: the plan is made first."""
    status, answer = envelope(capsys, "systemd", "show", *arguments)
    assert (status, answer["error"]["code"]) == (2, code)


def test_an_address_for_others_wants_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Without API keys no unit is written that would serve other machines."""
    status, answer = envelope(capsys, "systemd", "show", "-p", "demo", "--host", "0.0.0.0")
    assert (status, answer["error"]["code"]) == (3, "no_api_keys")


def tree(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("scope", ["--system", "--user"])
def test_install_twice_changes_nothing_and_uninstall_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, scope: str
) -> None:
    """Below another root: files written once, unchanged after, all gone at the end; nothing is executed."""
    root = tmp_path / "root"
    options = ("-p", "demo", scope, "--root", str(root))
    _, first = envelope(capsys, "systemd", "install", *options)
    written = tree(root)
    assert {f["did"] for f in first["result"]["files"]} == {"written"}
    assert {str(Path(f["path"]).relative_to(root)) for f in first["result"]["files"]} == set(written)
    assert first["result"]["missing"] == ["the cpu engine environment"]
    assert not first["result"]["enabled"]
    _, again = envelope(capsys, "systemd", "install", *options)
    assert {f["did"] for f in again["result"]["files"]} == {"unchanged"}
    assert tree(root) == written
    _, changed = envelope(capsys, "systemd", "install", *options, "--port", "30001")
    assert [f["did"] for f in changed["result"]["files"] if f["path"].endswith(".service")] == ["changed"]
    status, _ = envelope(capsys, "systemd", "uninstall", scope, "--root", str(root))
    assert status == 0
    assert tree(root) == {}


def test_the_last_system_unit_takes_the_shared_files_along(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Account and folders' rules stay while another unit needs them."""
    where = ("--system", "--root", str(tmp_path))
    for name in ("a", "b"):
        envelope(capsys, "systemd", "install", "-p", "demo", "--name", name, *where)
    envelope(capsys, "systemd", "uninstall", "--name", "a", *where)
    assert (tmp_path / "etc/sysusers.d/qwen3emb.conf").exists()
    envelope(capsys, "systemd", "uninstall", *where)  # the only one left needs no name
    assert tree(tmp_path) == {}


def test_drop_ins_of_people_survive_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Neither install nor uninstall touches what somebody put into the drop-in folder; uninstall names it."""
    where = ("--system", "--root", str(tmp_path))
    envelope(capsys, "systemd", "install", "-p", "demo", *where)
    folder = tmp_path / "etc/systemd/system/qwen3emb-demo.service.d"
    assert (folder / "local.conf").read_text() == LOCAL_TEXT
    (folder / "local.conf").write_text("[Service]\nMemoryMax=1G\n")
    envelope(capsys, "systemd", "install", "-p", "demo", *where, "--port", "30001")
    assert "1G" in (folder / "local.conf").read_text()
    _, gone = envelope(capsys, "systemd", "uninstall", *where)
    assert ("kept", str(folder / "local.conf")) in {(f["did"], f["path"]) for f in gone["result"]["files"]}
    assert list(tree(tmp_path)) == ["etc/systemd/system/qwen3emb-demo.service.d/local.conf"]


def test_a_unit_of_somebody_else_is_not_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A file of that name without our first line is neither overwritten nor removed."""
    unit = tmp_path / "etc/systemd/system/qwen3emb-demo.service"
    unit.parent.mkdir(parents=True)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    for command in (("install", "-p", "demo"), ("uninstall", "--name", "demo")):
        status, answer = envelope(capsys, "systemd", *command, "--system", "--root", str(tmp_path))
        assert (status, answer["error"]["code"]) == (2, "not_ours")
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"


def test_which_unit_to_remove_must_be_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """None or several: an error that lists them."""
    where = ("--user", "--root", str(tmp_path))
    status, answer = envelope(capsys, "systemd", "uninstall", *where)
    assert (status, answer["error"]["code"]) == (2, "which_unit")
    status, _ = envelope(capsys, "systemd", "uninstall", "--name", "demo", *where)
    assert status == 0


def test_a_disk_that_refuses_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A folder that cannot be made is an error with its path, and exit status 3."""
    (tmp_path / "etc").write_text("a file")
    status, answer = envelope(capsys, "systemd", "install", "-p", "demo", "--system", "--root", str(tmp_path))
    assert status == 3
    assert str(tmp_path / "etc") in answer["error"]["message"]


def fake_systemctl(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """A `systemctl` that writes what it was asked, and does what `script` says."""
    program = folder / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return folder / "asked"


def test_a_users_install_tells_his_manager(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No root is needed: reload and enable go to `systemctl --user`, in that order; the second time only enable."""
    asked = fake_systemctl(tmp_path, monkeypatch, "echo ActiveState=inactive")
    status, _ = envelope(capsys, "systemd", "install", "-p", "demo", "--user", "--now")
    assert status == 0
    assert (tmp_path / "home/.config/systemd/user/qwen3emb-demo.service").exists()
    said = asked.read_text().splitlines()
    assert [line for line in said if "show" not in line] == [
        "--user --no-pager daemon-reload",
        "--user --no-pager enable -- qwen3emb-demo.service",
    ]  # not started: the engine is missing
    asked.unlink()
    envelope(capsys, "systemd", "install", "-p", "demo", "--user")
    assert "daemon-reload" not in asked.read_text()


@pytest.mark.parametrize("ends", [0, 5])
def test_fetch_installs_and_downloads_before_the_start(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int
) -> None:
    """--fetch runs qwen3emb's own commands in the service's environment; a failed one is said, and nothing starts."""
    asked = fake_systemctl(tmp_path, monkeypatch, "echo ActiveState=inactive")
    real, ran = subprocess.run, []

    def observed(words: list[str], **options: Any) -> Any:
        if "qwen3emb_launch" not in words:
            return real(words, **options)
        ran.append(words[words.index("qwen3emb_launch") + 1 :])
        return subprocess.CompletedProcess(words, ends)

    monkeypatch.setattr(subprocess, "run", observed)
    status, answer = envelope(capsys, "systemd", "install", "-p", "cpu", "--user", "--now", "--fetch")
    assert "start" not in asked.read_text().split()  # it is still missing: nothing was really installed
    if ends:
        assert ran == [["engine", "install", "cpu"]]
        assert (status, answer["error"]["code"]) == (1, "fetch_failed")
    else:
        assert ran == [["engine", "install", "cpu"], ["download", "0.6b"]]
        assert answer["result"]["missing"]


@pytest.mark.parametrize(
    ("script", "command", "status", "code"),
    [
        ("echo 'Failed to connect to bus: No medium found' >&2; exit 1", "install", 3, "no_user_manager"),
        ('case "$*" in *enable*) echo refused >&2; exit 1;; esac', "install", 1, "systemctl_failed"),
    ],
)
def test_a_manager_that_refuses_is_said(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    command: str,
    status: int,
    code: str,
) -> None:
    """No bus, or a refused call: systemd's own words and a next step."""
    fake_systemctl(tmp_path, monkeypatch, script)
    seen, answer = envelope(capsys, "systemd", command, "-p", "demo", "--user")
    assert (seen, answer["error"]["code"]) == (status, code)
    assert answer["error"]["hint"]


def test_no_systemd_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without systemctl the error names what works instead, and nothing was written."""
    monkeypatch.setenv("PATH", str(tmp_path))
    status, answer = envelope(capsys, "systemd", "install", "-p", "demo", "--user")
    assert (status, answer["error"]["code"]) == (3, "no_systemd")
    assert not (tmp_path / "home").exists()


def test_the_system_is_for_root(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--system without root is refused with the sudo to use, before anything is written."""
    fake_systemctl(tmp_path, monkeypatch, "exit 0")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    status, answer = envelope(capsys, "systemd", "install", "-p", "demo", "--system")
    assert (status, answer["error"]["code"]) == (3, "needs_root")
    assert "sudo" in answer["error"]["hint"]


def test_a_manager_that_hangs_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A systemctl that never answers ends in an error that names it."""
    from qwen3emb_launch.errors import CheckFailedError

    fake_systemctl(tmp_path, monkeypatch, "exec sleep 60")
    with pytest.raises(CheckFailedError, match="did not end within"):
        Manager("user").do("enable", "x", patience=0.2)


def test_status_without_units(capsys: pytest.CaptureFixture[str]) -> None:
    """No unit is no error, and asks no systemd."""
    status, answer = envelope(capsys, "systemd", "status", "--user")
    assert (status, answer["result"]["units"]) == (0, [])


@pytest.mark.skipif(not ANALYZE, reason="systemd-analyze is missing: apt-get install systemd")
@pytest.mark.parametrize(
    "options",
    [
        ("-p", "demo", "--user"),
        ("-p", "demo", "--system"),
        (
            "-p",
            "h100",
            "--system",
            "--host",
            "0.0.0.0",
            "--set",
            "gateway.insecure=true",
            "--download",
            "--credential",
            "hf_token=/etc/keys/hf",
        ),
        ("--template", "--system"),
        ("--template", "--user"),
    ],
)
def test_generated_units_pass_systemds_own_check(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """`systemd-analyze verify` accepts what `show` prints, without a word."""
    _, answer = envelope(capsys, "systemd", "show", *options)
    unit = tmp_path / answer["result"]["unit"]
    unit.write_text(answer["result"]["text"])
    words = [ANALYZE, "verify", "--recursive-errors=no", *(["--user"] if "--user" in options else []), str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": "/"})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
