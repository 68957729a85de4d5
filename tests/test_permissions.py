"""A user without rights: closed folders and files, privileged ports. Run as nobody when the tests run as root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
SETPRIV = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
# Where nobody cannot reach this repository: root without the rights that make it root in a file system.
BOUND = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-net_bind_service,-fowner"]
PROGRAM = [sys.executable, "-m", "qwen3emb_launch"]

Answer = tuple[int, dict, str]  # exit status, envelope, stderr


@pytest.fixture(scope="module")
def unprivileged() -> list[str]:
    """What stands before a command so that it runs without root's rights."""
    if os.geteuid() != 0:
        return []
    for prefix in (SETPRIV, BOUND):
        tried = subprocess.run([*prefix, *PROGRAM, "--version"], cwd=ROOT, capture_output=True, check=False)
        if tried.returncode == 0:
            return prefix
    pytest.skip("setpriv (util-linux) is not installed")


@pytest.fixture
def place(unprivileged: list[str]) -> Iterator[Path]:
    """A folder that everybody can reach: `own` for the user, `locked` to read only, `closed` to look into at all."""
    folder = Path(tempfile.mkdtemp(prefix="qwen3emb-rights-"))
    folder.chmod(0o755)
    for name in ("own", "locked", "closed"):
        (folder / name).mkdir()
    if unprivileged == SETPRIV:
        os.chown(folder / "own", NOBODY, NOBODY)
    secret = folder / "secret"
    secret.write_text("sk-nobody-may-read")
    for path, mode in ((folder / "locked", 0o555), (folder / "closed", 0), (secret, 0)):
        path.chmod(mode)
    yield folder
    (folder / "closed").chmod(0o700)
    shutil.rmtree(folder)


@pytest.fixture
def run(unprivileged: list[str], place: Path) -> Callable[..., Answer]:
    def run(*args: str, **folders: Path) -> Answer:
        ours = {f"QWEN3EMB_{kind}_DIR": str(folders.get(kind, place / "own" / kind)) for kind in KINDS}
        environment = {**os.environ, **ours, "HOME": str(place / "own"), "HF_HOME": str(place / "own" / "hub")}
        done = subprocess.run(
            [*unprivileged, *PROGRAM, *args, "--json"],
            env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout), done.stderr

    return run


KINDS = ("STATE", "DATA", "CACHE", "CONFIG")


@pytest.mark.parametrize("kind", ["locked", "closed"])
def test_state_folder_that_cannot_be_written_stops_up(run: Callable[..., Answer], place: Path, kind: str) -> None:
    """Exit 3 before anything is fetched or started; the folder and the variable that moves it are named."""
    status, envelope, _ = run("up", "--profile", "demo", STATE=place / kind / "state")
    assert status == 3
    assert str(place / kind) in envelope["error"]["message"]
    assert "QWEN3EMB_STATE_DIR" in envelope["error"]["hint"]


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("STATE", ["status"]),
        ("STATE", ["logs", "demo"]),
        ("STATE", ["down", "demo"]),
        ("STATE", ["embed", "a text"]),
        ("DATA", ["models", "list"]),
        ("DATA", ["engine", "list"]),
        ("CONFIG", ["profiles", "list"]),
    ],
    ids=" ".join,
)
def test_closed_folder_is_no_defect(run: Callable[..., Answer], place: Path, kind: str, command: list[str]) -> None:
    """A folder of another user: 3 and its name, never a traceback, never taken for an empty one."""
    status, envelope, _ = run(*command, **{kind: place / "closed"})
    assert status == 3, envelope
    assert str(place / "closed") in envelope["error"]["message"]
    assert "_DIR" in envelope["error"]["hint"]


def test_data_folder_that_cannot_be_written_stops_an_install(run: Callable[..., Answer], place: Path) -> None:
    """Before pip is asked for anything."""
    status, envelope, _ = run("engine", "install", "cpu", DATA=place / "locked" / "data")
    assert (status, envelope["error"]["code"]) == (3, "folder_unwritable")


def test_privileged_port_is_refused(run: Callable[..., Answer], place: Path) -> None:
    """A port below the system's limit: 3, and one that is free."""
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first <= 1:
        pytest.skip("this system gives every port to everybody")
    status, envelope, _ = run("up", "--profile", "demo", "--port", str(min(80, first - 1)))
    assert (status, envelope["error"]["code"]) == (3, "port_privileged")
    assert "--port" in envelope["error"]["hint"]


@pytest.mark.parametrize(
    "command",
    [
        ["up", "--dry-run", "--profile"],
        ["profiles", "validate"],
        ["embed", "a text", "--base-url", "http://127.0.0.1:9/v1", "--api-key-file"],
        ["verify", "--base-url", "http://127.0.0.1:9/v1", "--api-key-file"],
        ["gateway", "--upstream", "http://127.0.0.1:9/v1", "--api-keys"],
        ["gateway", "--config"],
        ["bench", "show"],
        ["cost", "--prices"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_file_that_cannot_be_read_is_invalid_input(run: Callable[..., Answer], place: Path, command: list[str]) -> None:
    """Profile, key, settings, record: 2, the file named, and nothing of it shown."""
    given = place / "secret"
    if "--profile" in command:
        given = given.rename(given.with_suffix(".yaml"))
    status, envelope, stderr = run(*command, str(given))
    assert status == 2, envelope
    assert str(given) in envelope["error"]["message"]
    assert "sk-nobody" not in json.dumps(envelope) + stderr
