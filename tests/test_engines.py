"""Releases and gates, pip's output, damage, the CUDA compiler, and the `engine` commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import engine_index
import pytest
from typer.testing import CliRunner

from qwen3emb_launch import engines
from qwen3emb_launch.cli import app
from qwen3emb_launch.engines import build, inspection, integrity, pip_output, record, releases, toolkit
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.facts import EngineFlag

# ---- releases


def test_the_cpu_lock_pins_every_package_once() -> None:
    """Each line of the shipped lock is one exact version, and sglang itself is left to --no-deps."""
    wanted = releases.build("cpu")
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[\w.]+", line) for line in wanted.locked)
    names = [line.split("==")[0].lower().replace("_", "-") for line in wanted.locked]
    assert len(names) == len(set(names)) > 100
    assert "sglang" not in names
    assert wanted.bare == ("sglang==0.5.15.post1",)


def test_the_key_follows_the_lists() -> None:
    """Anything that changes what would be installed changes the key, so the environment is rebuilt."""
    one = releases.Build("cpu", "1", ("a==1", "b==1"), ("c==1",))
    others = [
        releases.Build("cuda", "1", ("a==1", "b==1"), ("c==1",)),
        releases.Build("cpu", "1", ("a==2", "b==1"), ("c==1",)),
        releases.Build("cpu", "1", ("a==1", "b==1", "c==1"), ()),
    ]
    assert len({b.key for b in [one, *others]}) == 4
    assert one.key == releases.Build("cpu", "1", ("a==1", "b==1"), ("c==1",)).key


@pytest.mark.parametrize("version", ["0.5.14", "0.5.15.post1", "0.5.16", "0.5.23", "0.5.24", "0.5.24rc1"])
def test_supported_releases(version: str) -> None:
    """Everything from the oldest good release up to the next minor one is accepted."""
    assert releases.build("cuda", version).locked[0] == f"sglang=={version}"


@pytest.mark.parametrize(
    ("version", "code", "said"),
    [
        ("0.5.13.post1", "engine_version", "27343"),
        ("0.5.11", "engine_version", "27343"),
        ("0.5.3", "engine_version", "22518"),
        ("0.6.0", "engine_version", "outside"),
        ("latest", "bad_version", "latest"),
        ("0.5.23; rm", "bad_version", "rm"),
    ],
)
def test_refused_releases_say_why(version: str, code: str, said: str) -> None:
    """A known-bad release is refused with its defect and link, one out of range with the range."""
    with pytest.raises(InvalidInputError) as refused:
        releases.build("cuda", version)
    assert refused.value.code == code
    assert said in refused.value.message


def test_the_cpu_flavour_has_one_version() -> None:
    """Another release on a CPU is refused with the way around it: adopting."""
    with pytest.raises(InvalidInputError) as refused:
        releases.build("cpu", "0.5.23")
    assert "--python" in refused.value.hint


def test_a_newer_release_than_tried_is_noted() -> None:
    """What nobody tried is installed with a note, not silently."""
    assert releases.untested("0.5.23") is None
    assert "0.5.30" in (releases.untested("0.5.30") or "")


@pytest.mark.parametrize(("machine", "system"), [("aarch64", "Linux"), ("arm64", "Darwin")])
def test_other_platforms_are_refused_early(machine: str, system: str) -> None:
    """Where no wheels exist the answer comes before gigabytes do."""
    with pytest.raises(UnfitError) as refused:
        releases.check_platform(machine, system)
    assert machine in refused.value.message


# ---- pip's output, recorded from pip 26.3

RECORDED = """\
Looking in indexes: https://pypi.org/simple
Collecting torch==2.14.1
  Downloading torch-2.14.1-cp311-cp311-manylinux_2_28_x86_64.whl (532.1 MB)
Progress 0 of 532100000
Progress 262144000 of 532100000
Progress 532100000 of 532100000
Collecting aiohttp==3.14.5
  Using cached aiohttp-3.14.5-cp311-cp311-manylinux2014_x86_64.whl (1.9 MB)
Processing /mirror/files/attrs-26.1.0-py3-none-any.whl
Requirement already satisfied: idna==3.20 in ./lib/python3.11/site-packages (3.20)
Collecting yarl==1.25.1
  Downloading yarl-1.25.1-cp311-cp311-manylinux2014_x86_64.whl (117 kB)
Progress 117000 of 117000
Installing collected packages: yarl, torch, attrs, aiohttp
Successfully installed aiohttp-3.14.5 attrs-26.1.0 torch-2.14.1 yarl-1.25.1
""".splitlines()


class Watcher:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def step(self, text: str) -> None:
        self.seen.append(text)

    def update(self, done: int, total: int | None = None) -> None:
        self.seen.append((done, total))


def test_pips_lines_become_progress() -> None:
    """Packages are counted, a big download is a stage with bytes, a small one is not; progress lines are not logged."""
    watcher = Watcher()
    reader = pip_output.PipReader(watcher, expected=5)
    logged = [line for line in RECORDED if reader.feed(line)]
    assert not any(line.startswith("Progress") for line in logged)
    assert len(logged) == len(RECORDED) - 4
    assert watcher.seen == [
        "collecting package 1 of 5",
        "downloading torch 2.14.1 (532.1 MB)",
        (0, 532100000),
        (262144000, 532100000),
        (532100000, 532100000),
        "collecting package 2 of 5",
        "collecting package 3 of 5",
        "collecting package 4 of 5",
        "collecting package 5 of 5",
        "installing 4 packages",
    ]
    assert reader.installing is None


def test_the_silent_stage_is_counted_from_outside() -> None:
    """While pip installs without a word, what is on disk is reported, in tenths."""
    watcher = Watcher()
    reader = pip_output.PipReader(watcher)
    reader.feed("Installing collected packages: " + ", ".join(f"p{i}" for i in range(100)))
    for done in (1, 5, 12, 13, 30, 100):
        reader.installed(done)
    assert watcher.seen == [
        "installing 100 packages",
        "installing package 1 of 100",
        "installing package 12 of 100",
        "installing package 30 of 100",
    ]


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 3, "disk_full"),
        ("ERROR: [Errno 13] Permission denied: '/data/engines'", 3, "folder_unwritable"),
        (
            "WARNING: Retrying (Retry(total=4, connect=None, read=None, redirect=None, status=None)) after connection "
            "broken by 'NewConnectionError'",
            5,
            "index_unreachable",
        ),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", 5, "index_corrupt"),
        ("ERROR: HTTP error 401 while getting x: 401 Client Error: Unauthorized", 5, "index_refused"),
        ("WARNING: There was a problem: SSLError(1, CERTIFICATE_VERIFY_FAILED)", 5, "index_tls"),
        ("ERROR: Cannot install a and b: these have conflicting dependencies.", 3, "engine_conflict"),
        ("ERROR: No matching distribution found for outlines_core==0.1.26", 5, "package_missing"),
        ("ERROR: something new", 1, "pip_failed"),
    ],
)  # fmt: skip
def test_why_pip_failed(line: str, status: int, code: str) -> None:
    """Each known cause has its own code and exit status; pip's line and the log's path are always shown."""
    error = pip_output.failure(["Collecting x", line], 1, "/state/install.log")
    assert (error.exit, error.code) == (status, code)
    assert line in error.message
    assert "/state/install.log" in error.message


def test_last_lines_leave_out_what_says_nothing() -> None:
    """Warnings that pip repeats for each package do not push its last words out."""
    noise = ["WARNING: Location 'file:///x/' is ignored: it is neither a file nor a directory."] * 20
    assert pip_output.last_lines(["ERROR: why", *noise, ""]) == ["ERROR: why"]


def test_credentials_of_an_index_are_redacted() -> None:
    """A password in an index's address reaches neither the log nor an error."""
    line = "Looking in indexes: https://me:s3cret@mirror.example/simple, https://token@other.example/simple"
    shown = pip_output.redact(line)
    assert "s3cret" not in shown
    assert "token" not in shown
    assert "mirror.example/simple" in shown


# ---- the interpreter


def test_a_launcher_on_another_python_takes_one_from_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no wheels exist for the launcher's Python, the newest fitting one on PATH that runs is the base."""
    monkeypatch.setattr(releases, "PYTHONS", ((3, 97), (3, 98), (3, 99)))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnfitError) as none:
        build.base_python()
    assert none.value.code == "python_version"
    assert "3.97 or 3.98 or 3.99" in none.value.message
    for minor, status in ((97, 0), (98, 0), (99, 1)):
        fake = tmp_path / f"python3.{minor}"
        fake.write_text(f"#!/bin/sh\nexit {status}\n")
        fake.chmod(0o755)
    assert build.base_python() == tmp_path / "python3.98"


# ---- integrity


def _installed(folder: Path, name: str, files: dict[str, str], finished: bool = True) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    rows = [f"{file},sha256=x,{len(text)}" for file, text in files.items()]
    last = [f"{info.name}/INSTALLER,,"] if finished else []
    (info / "RECORD").write_text("\n".join([*rows, *last, "mod.pyc,,", f"{info.name}/RECORD,,"]) + "\n")


def test_damage_is_missing_shortened_or_unfinished(tmp_path: Path) -> None:
    """A missing file, one of another size and an installation cut off are found; compiled files do not count."""
    _installed(tmp_path, "good", {"good.py": "x"})
    _installed(tmp_path, "gone", {"gone.py": "x"})
    _installed(tmp_path, "short", {"short.py": "xxxx"})
    _installed(tmp_path, "cut", {"cut.py": "x"}, finished=False)
    (tmp_path / "gone.py").unlink()
    (tmp_path / "short.py").write_text("x")
    assert [str(d) for d in integrity.damages(tmp_path)] == [
        "cut: cut-1.0.dist-info/RECORD is missing or was never finished",
        "gone: gone.py is missing",
        "short: short.py has 1 bytes, not 4",
    ]
    assert integrity.forget_damaged(tmp_path) == ["cut", "gone", "short"]
    assert integrity.damages(tmp_path) == []


def test_an_authority_of_the_companys_own_is_no_damage(tmp_path: Path) -> None:
    """certifi's list of authorities may be longer than it was installed; shorter it is damaged, as any file is."""
    (tmp_path / "certifi").mkdir()
    _installed(tmp_path, "certifi", {"certifi/cacert.pem": "theirs", "certifi/core.py": "x"})
    (tmp_path / "certifi/cacert.pem").write_text("theirs and ours")
    assert integrity.damages(tmp_path) == []
    (tmp_path / "certifi/cacert.pem").write_text("the")
    assert [d.file for d in integrity.damages(tmp_path)] == ["certifi/cacert.pem"]
    (tmp_path / "certifi/cacert.pem").write_text("theirs")
    (tmp_path / "certifi/core.py").write_text("xx")
    assert [d.file for d in integrity.damages(tmp_path)] == ["certifi/core.py"]


def test_a_file_that_two_packages_ship_may_be_either(tmp_path: Path) -> None:
    """Some packages put a file of the same name in site-packages; the one installed last is no damage of the other."""
    _installed(tmp_path, "one", {"build_backend.py": "one one"})
    _installed(tmp_path, "two", {"build_backend.py": "two"})
    assert integrity.damages(tmp_path) == []
    (tmp_path / "build_backend.py").write_text("neither, none")
    assert len(integrity.damages(tmp_path)) == 2


# ---- the report of the environment's python

REPORT = {
    "error": None, "flavour": "cpu", "python_version": "3.11.7", "dist_info": "/e/sglang-0.5.23.dist-info", "stamp": 1,
    "packages": {"sglang": "0.5.23", "torch": "2.14.1"}, "plugins": {}, "device": {"cuda_available": False},
    "flags": {n: {"takes_value": n != "--is-embedding", "choices": []} for n in inspection.NEEDED},
}  # fmt: skip


def test_a_report_becomes_facts() -> None:
    """Versions and flags arrive as the planner takes them."""
    seen = inspection.understand(REPORT, Path("/e/bin/python"))
    assert seen.version == "0.5.23"
    assert seen.flags["--is-embedding"] == EngineFlag("--is-embedding", takes_value=False)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"packages": {"torch": "2.14.1"}}, "not_an_engine"),
        ({"error": "ImportError: libcuda.so.1: cannot open shared object file"}, "engine_broken"),
        ({"flags": {"--model-path": {"takes_value": True, "choices": []}}}, "engine_broken"),
    ],
)
def test_a_report_of_no_usable_engine(change: dict[str, object], code: str) -> None:
    """No sglang, a failing import and a server without the flags a launch needs are told apart."""
    with pytest.raises(UnfitError) as failed:
        inspection.understand(REPORT | change, Path("/e/bin/python"))
    assert failed.value.code == code


# ---- the CUDA compiler


def _toolkit(root: Path, version: str | None = None) -> Path:
    for file in ("bin/nvcc", "include/cuda_runtime.h", "lib/libcudart.so.13", "nvvm/bin/cicc"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("")
    (root / "bin" / "nvcc").chmod(0o755)
    if version:
        (root / "version.json").write_text(json.dumps({"cuda": {"version": version}}))
    return root


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """site-packages that carry a compiler; no system toolkit in the usual place."""
    monkeypatch.setattr(toolkit, "USUAL", tmp_path / "usual")
    _toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    return tmp_path / "site-packages"


def _environment(packages: Path, environ: dict[str, str], cuda: str = "13.0") -> dict[str, str]:
    python = packages.parent / "bin" / "python"
    return toolkit.launch_environment("cuda", python, packages, packages.parent, cuda, environ=environ)


def test_without_a_toolkit_the_packages_compiler_is_given_the_usual_shape(packaged: Path, tmp_path: Path) -> None:
    """CUDA_HOME names a folder with bin/nvcc and with lib64/libcudart.so, which a link with -lcudart needs."""
    env = _environment(packaged, {"PATH": "/usr/sbin"})
    home = Path(env["CUDA_HOME"])
    own = packaged / "nvidia" / "cu13"
    assert (home / "bin" / "nvcc").resolve() == own / "bin" / "nvcc"
    assert (home / "lib64" / "libcudart.so").resolve() == own / "lib" / "libcudart.so.13"
    assert (home / "nvvm" / "bin" / "cicc").exists()
    assert env["PATH"] == f"{tmp_path}/bin:/usr/sbin"
    again = _environment(packaged, {"PATH": "/usr/sbin"})
    assert again == env


def test_links_follow_a_moved_environment(packaged: Path, tmp_path: Path) -> None:
    """A link that points elsewhere is corrected."""
    home = Path(_environment(packaged, {"PATH": ""})["CUDA_HOME"])
    (home / "bin").unlink()
    (home / "bin").symlink_to("/nonexistent")
    _environment(packaged, {"PATH": ""})
    assert (home / "bin" / "nvcc").exists()


def test_a_system_toolkit_goes_first(packaged: Path, tmp_path: Path) -> None:
    """The user's CUDA_HOME, nvcc on PATH and /usr/local/cuda are left to SGLang where they fit."""
    system = _toolkit(tmp_path / "system", "13.1.0")
    assert "CUDA_HOME" not in _environment(packaged, {"PATH": "", "CUDA_HOME": str(system)})
    assert "CUDA_HOME" not in _environment(packaged, {"PATH": str(system / "bin")})
    _toolkit(tmp_path / "usual")
    assert "CUDA_HOME" not in _environment(packaged, {"PATH": ""})


def test_a_system_toolkit_that_cannot_serve_is_passed_over(packaged: Path, tmp_path: Path) -> None:
    """A toolkit of another major version, a lone nvcc on PATH and a CUDA_HOME that leads nowhere are not trusted."""
    old = _toolkit(tmp_path / "old", "12.4.0")
    lone = tmp_path / "lone" / "bin" / "nvcc"
    lone.parent.mkdir(parents=True)
    lone.write_text("#!/bin/sh\n")
    lone.chmod(0o755)
    for environ in ({"CUDA_HOME": str(old)}, {"PATH": str(lone.parent)}, {"CUDA_HOME": "/nonexistent"}):
        assert _environment(packaged, {"PATH": ""} | environ)["CUDA_HOME"] == str(tmp_path / "cuda")


def test_a_usual_toolkit_behind_a_lone_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a packaged compiler, /usr/local/cuda is named where a wrapper on PATH would mislead SGLang."""
    monkeypatch.setattr(toolkit, "USUAL", _toolkit(tmp_path / "usual", "13.0.0"))
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    packages = tmp_path / "site-packages"
    assert _environment(packages, {"PATH": str(tmp_path / "bin")})["CUDA_HOME"] == str(tmp_path / "usual")


def test_the_cpu_engine_needs_one_variable(tmp_path: Path) -> None:
    """No compiler, no PATH: only what makes SGLang take the CPU."""
    env = toolkit.launch_environment("cpu", tmp_path / "python", tmp_path, tmp_path, plugin_path=tmp_path / "p")
    assert env == {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": str(tmp_path / "p")}


# ---- choosing, and the commands


def _record(name: str, flavour: str, version: str, folder: Path, installed_at: float = 1.0) -> record.Record:
    """A record whose environment looks whole."""
    base = folder / f"env-of-{name}"
    info = base / f"sglang-{version}.dist-info"
    info.mkdir(parents=True)
    python = base / "python"
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    report = REPORT | {
        "flavour": flavour,
        "dist_info": str(info),
        "stamp": info.stat().st_mtime_ns,
        "packages": {"sglang": version, "torch": "2.14.1"},
    }
    seen = inspection.understand(report, python)
    made = record.Record(name, flavour, python, False, "k", installed_at, 1, seen)  # type: ignore[arg-type]
    record.folder(name).mkdir(parents=True)
    record.save(made)
    return made


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_find_takes_the_newest_of_the_flavour(data: Path) -> None:
    """Named beats newest, newest is by release; the other flavour is not taken for the one asked for."""
    _record("cpu", "cpu", "0.5.15.post1", data)
    _record("old", "cuda", "0.5.16", data, installed_at=9.0)
    _record("new", "cuda", "0.5.23", data)
    assert engines.find("cuda").name == "new"
    assert engines.find("cuda", name="old").version == "0.5.16"
    assert engines.find("cpu").name == "cpu"
    assert engines.find(name="cpu").flavour == "cpu"
    with pytest.raises(InvalidInputError) as wrong:
        engines.find("cuda", name="cpu")
    assert wrong.value.code == "engine_flavour"
    with pytest.raises(InvalidInputError) as unknown:
        engines.find(name="cud")
    assert "did you mean" in unknown.value.hint


def test_find_without_a_flavour_follows_the_gpu(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both installed: cuda where a GPU is, cpu where none is."""
    _record("cpu", "cpu", "0.5.15.post1", data)
    _record("cuda", "cuda", "0.5.23", data)
    monkeypatch.setattr("qwen3emb_launch.gpu.inventory", list)
    assert engines.find().name == "cpu"
    monkeypatch.setattr("qwen3emb_launch.gpu.inventory", lambda: ["a gpu"])
    assert engines.find().name == "cuda"


def test_a_broken_newest_gives_way_to_an_older_whole_one(data: Path) -> None:
    """An environment whose sglang is gone is not chosen; alone, it is named with what mends it."""
    whole = _record("old", "cuda", "0.5.16", data)
    gone = _record("new", "cuda", "0.5.23", data)
    Path(gone.inspection.dist_info).rmdir()
    assert engines.find("cuda").name == "old"
    whole.python.unlink()
    with pytest.raises(UnfitError) as broken:
        engines.find("cuda")
    assert broken.value.code == "engine_broken"
    assert {e.state for e in engines.environments()} == {"broken"}


def test_nothing_installed(data: Path) -> None:
    """The hint is the command that installs what was asked for."""
    with pytest.raises(UnfitError) as missing:
        engines.find("cuda")
    assert (missing.value.code, missing.value.hint) == ("engine_missing", "qwen3emb engine install cuda")


@pytest.mark.parametrize("text", ["", "{", '{"schema": 99}', '{"schema": 1}', "[]"])
def test_a_record_that_cannot_be_read_is_an_incomplete_environment(data: Path, text: str) -> None:
    """A torn or foreign record never becomes a half-right environment."""
    record.folder("cpu").mkdir(parents=True)
    (record.folder("cpu") / "engine.json").write_text(text)
    assert [e.state for e in engines.environments()] == ["partial"]
    with pytest.raises(UnfitError) as incomplete:
        engines.find(name="cpu")
    assert incomplete.value.code == "engine_incomplete"


def test_a_record_survives_the_disk(data: Path) -> None:
    """What is read is what was written."""
    made = _record("cpu", "cpu", "0.5.15.post1", data)
    assert record.load("cpu") == made


def run(*words: str) -> tuple[int, dict[str, object]]:
    shown = CliRunner().invoke(app.build(), [*words, "--json"])
    return shown.exit_code, json.loads(shown.stdout)


def test_the_commands_answer_in_one_envelope(data: Path) -> None:
    """list, check, remove and a refused install: one JSON line, right exit status, a hint that is a command."""
    _record("cpu", "cpu", "0.5.15.post1", data)
    status, told = run("engine", "list")
    assert (status, told["result"]["environments"][0]["name"]) == (0, "cpu")  # type: ignore[index]
    status, told = run("engine", "install", "--python", str(data / "nowhere"))
    assert (status, told["error"]["code"]) == (2, "python_missing")  # type: ignore[index]
    status, told = run("engine", "install", "cuda", "--version", "0.5.12")
    assert (status, told["error"]["code"]) == (2, "engine_version")  # type: ignore[index]
    status, told = run("engine", "check", "cpu")  # its python is a script that reports nothing
    assert (status, told["error"]["code"]) == (3, "engine_broken")  # type: ignore[index]
    assert told["result"]["ok"] is False  # type: ignore[index]
    status, told = run("engine", "remove", "cpu")
    assert (status, told["ok"]) == (0, True)
    status, told = run("engine", "remove", "cpu")
    assert (status, told["error"]["code"]) == (2, "unknown_engine")  # type: ignore[index]


def test_people_see_a_table_and_what_to_do(data: Path) -> None:
    """Without --json: names and states on stdout, and the next command on stderr where nothing is there."""
    shown = CliRunner().invoke(app.build(), ["engine", "list"])
    assert "engine install" in shown.stderr
    _record("cpu", "cpu", "0.5.15.post1", data)
    shown = CliRunner().invoke(app.build(), ["engine", "list"])
    assert shown.stdout.splitlines()[1].split("\t")[:3] == ["cpu", "cpu", "0.5.15.post1"]


def test_the_fake_index_is_whole(tmp_path: Path) -> None:
    """The wheels that these tests install are wheels as pip writes them: what is repacked keeps its files."""
    path = engine_index.repack(tmp_path, "pip")
    assert path.stat().st_size > 500_000
