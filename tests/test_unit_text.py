"""Unit files: quoting read back by an independent reading of systemd's rules, and by systemd-analyze itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen3emb_launch import unit_text
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.unit_text import Entry, Section, Service, Verbatim

ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(not ANALYZE, reason="systemd-analyze is missing: apt-get install systemd")

NASTY = (
    "/models/with space/4b", "100%", "%i %n %%", "$HOME ${PATH} $$", 'say "hi"', "it's", "back\\slash", "tab\there",
    "line\nend", "", ";", "#comment", "-", "@x", "!x", "a;b", "=", "统一码 模型", "\u2028", "\x85", "\x01\x7f",
    " lead", "trail ", "\\", "\\n", "a=b c=d", "*?[x]", "{a,b}", "~", "-flag=%h/$USER",
)  # fmt: skip
SERVICE = Service(
    scope="system",
    description="a test",
    words=("/bin/true", *NASTY),
    instance="x",
    environment={"A": "b"},
    cuda=False,
    start_seconds=245.0,
    stop_seconds=55.0,
    watchdog_seconds=122.5,
    memory_bytes=1 << 30,
)


def read_back(line: str) -> list[str]:
    """A command line as systemd.service(5) and systemd.syntax(7) say: quotes, C escapes, then specifiers."""
    words: list[str] = []
    i, n = 0, len(line)
    while i < n:
        if line[i] in " \t":
            i += 1
            continue
        word, quote = "", ""
        while i < n and (quote or line[i] not in " \t"):
            char = line[i]
            if char == "\\":
                code = line[i + 1]
                if code == "x":
                    word += chr(int(line[i + 2 : i + 4], 16))
                    i += 4
                else:
                    word += {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\"}[code]
                    i += 2
                continue
            if char in "\"'" and (quote == char or not quote):
                quote = "" if quote else char
            else:
                word += char
            i += 1
        assert not quote, "an open quote"
        words.append(re.sub(r"%(.)", lambda m: {"%": "%"}[m[1]], word))
    return words


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)


@given(st.lists(TEXT, max_size=6))
@example(list(NASTY))
def test_arguments_come_back_as_they_were(arguments: list[str]) -> None:
    """Spaces, quotes, %, $, backslashes, line ends, control characters: every argument survives, on one line."""
    line = unit_text.command(["/opt/py thon/100%/bin", *arguments])
    assert "\n" not in line
    assert "\r" not in line
    program, *rest = read_back(line)
    assert program == ":/opt/py thon/100%/bin"  # `:` turns environment substitution off, so $ needs no care
    assert rest == arguments


@given(TEXT.filter(lambda t: not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", t)))
@example("%d $x \"'\\ \t\n")
def test_environment_values_come_back(value: str) -> None:
    """An Environment= line is one assignment, read back exactly."""
    assert read_back(unit_text.assignment("NAME", value)) == [f"NAME={value}"]


@given(TEXT)
def test_a_path_that_is_read_raw_is_refused_or_exact(name: str) -> None:
    """Where systemd unquotes nothing, a path stands as it is, % doubled; what a line cannot carry is refused."""
    try:
        written = unit_text.plain_path(f"/etc/{name}")
    except InvalidInputError as error:
        assert error.code == "unit_unsafe"  # noqa: PT017
        return
    assert "\n" not in written
    assert written == written.strip()
    assert not written.endswith("\\")
    assert written.replace("%%", "%") == f"/etc/{name}"


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=60), TEXT)
def test_a_comment_never_becomes_a_setting(comment: str, value: str) -> None:
    """Whatever a comment holds, every line of the file is a comment, a section or one of our entries."""
    text = unit_text.render([comment], [Section("Service", (Entry("ExecStart", unit_text.quote(value), comment),))])
    for line in re.split("[\n\r\0]", text):
        assert line in ("", "[Service]") or line.startswith(("#", "ExecStart="))
        assert not line.endswith("\\") or line.startswith("ExecStart=")


@pytest.mark.parametrize("program", ["python", "./x", "/a'b", '/a"b', "/a\\b", "/a\nb"])
def test_programs_that_systemd_refuses_are_refused_with_a_hint(program: str) -> None:
    """A relative program, or one with quotes or backslashes in its path, is an error that says so."""
    with pytest.raises(InvalidInputError) as refused:
        unit_text.command([program, "x"])
    assert refused.value.code == "unit_unsafe"
    assert refused.value.hint


def test_bytes_that_are_no_text_are_refused() -> None:
    """A path that is not UTF-8 cannot stand in a unit."""
    for text in ("/models/\udcff", "a\0b"):
        with pytest.raises(InvalidInputError):
            unit_text.quote(text)
        with pytest.raises(InvalidInputError):
            unit_text.assignment("A", text)


def test_a_specifier_is_written_only_where_one_is_meant() -> None:
    """`%i` of a template stays a specifier; the same letters in a path do not become one."""
    assert unit_text.command(["/bin/true", Verbatim("%i"), "%i"]) == ":/bin/true %i %%i"


def entries(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def with_(**changes: object) -> dict[str, list[str]]:
    return entries(unit_text.service(Service(**{**SERVICE.__dict__, **changes})))


def test_times_and_limits_follow_the_plan() -> None:
    """Deadlines are rounded up to seconds, and the start limit spans as many starts as it counts."""
    found = with_()
    assert found["TimeoutStartSec"] == ["245"]
    assert found["TimeoutStopSec"] == ["55"]
    assert found["WatchdogSec"] == ["123"]
    assert found["MemoryMax"] == [str(1 << 30)]
    assert int(found["StartLimitIntervalSec"][0]) >= int(found["StartLimitBurst"][0]) * (245 + 55)
    assert found["KillMode"] == ["mixed"]
    assert found["Type"] == ["notify"]
    assert "WatchdogSec" not in with_(watchdog_seconds=None)


def test_a_gpu_service_sees_the_gpu_and_nothing_else() -> None:
    """With CUDA the devices are listed, none are hidden; without, all are."""
    cuda, cpu = with_(cuda=True), with_()
    assert cuda["DeviceAllow"] == ["char-nvidia* rw"]
    assert cuda["DevicePolicy"] == cpu["DevicePolicy"] == ["closed"]
    assert "PrivateDevices" not in cuda
    assert cpu["PrivateDevices"] == ["yes"]
    assert cuda["ExecStartPre"] == ["+-/usr/bin/nvidia-modprobe -c 0 -u"]
    assert "ProcSubset" not in cuda


def test_a_loopback_service_reaches_nobody() -> None:
    """Only what serves this machine alone, and downloads nothing, is cut off from the network."""
    assert with_(loopback=True)["IPAddressDeny"] == ["any"]
    assert "IPAddressDeny" not in with_()
    assert with_(network=True)["Wants"] == ["network-online.target"]


def test_secrets_are_files_that_systemd_hands_over() -> None:
    """A credential is loaded from its file; the unit names a place, never a content."""
    found = with_(credentials={"hf_token": "/etc/keys/a b%"}, from_credentials={"HF_TOKEN_PATH": "hf_token"})
    assert found["LoadCredential"] == ["hf_token:/etc/keys/a b%%"]
    assert "HF_TOKEN_PATH=%d/hf_token" in found["Environment"]


def test_a_users_unit_asks_for_nothing_that_needs_privileges() -> None:
    """A user's manager may not change users, mounts or devices."""
    found = with_(scope="user")
    assert not {"User", "ProtectSystem", "PrivateTmp", "DevicePolicy", "StateDirectory", "CapabilityBoundingSet"} & set(
        found
    )
    assert found["WantedBy"] == ["default.target"]
    assert found["NoNewPrivileges"] == ["yes"]


@needs_systemd
@pytest.mark.parametrize("scope", ["system", "user"])
@pytest.mark.parametrize("cuda", [True, False])
def test_systemd_finds_no_fault(tmp_path: Path, scope: str, cuda: bool) -> None:
    """`systemd-analyze verify` has nothing to say, nasty arguments and all."""
    unit = tmp_path / "qwen3emb-x.service"
    spec = Service(
        **{
            **SERVICE.__dict__, "scope": scope, "cuda": cuda, "user": "root", "loopback": True,
            "credentials": {"hf_token": "/etc/a b%"}, "from_credentials": {"HF_TOKEN_PATH": "hf_token"},
            "environment": {f"N{i}": v for i, v in enumerate(NASTY) if "\x01" not in v}, "head": ("head \\",),
        }
    )  # fmt: skip
    unit.write_text(unit_text.service(spec))
    words = [ANALYZE, "verify", "--recursive-errors=no", "--man=no", *(["--user"] * (scope == "user")), str(unit)]
    done = subprocess.run(words, capture_output=True, text=True, env={"XDG_RUNTIME_DIR": str(tmp_path), "HOME": "/"})
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize(("cuda", "most"), [(True, 1.4), (False, 1.1)])
def test_exposure_stays_low(tmp_path: Path, cuda: bool, most: float) -> None:
    """`systemd-analyze security` scores the generated unit no worse than docs/systemd.md says."""
    unit = tmp_path / "qwen3emb-x.service"
    unit.write_text(unit_text.service(Service(**{**SERVICE.__dict__, "cuda": cuda, "loopback": True})))
    done = subprocess.run(
        [ANALYZE, "security", "--no-pager", "--offline=yes", str(unit)], capture_output=True, text=True
    )
    score = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert score, done.stderr
    assert float(score[1]) <= most
