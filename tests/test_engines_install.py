"""Installing an engine environment, with the real pip and an index in a folder."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import engine_index
import psutil
import pytest

from qwen3emb_launch import engines, results
from qwen3emb_launch.engines import build, inspection, integrity, plugin, record, releases
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError, NetworkError, UnfitError
from qwen3emb_launch.progress import SilentProgress

WANTED = releases.Build("cpu", "0.5.15.post1", ("torch==1.0", "leaf==1.0"), ("sglang==0.5.15.post1",))


class Watcher:
    """Progress that keeps the stages, and can interrupt at one."""

    def __init__(self, interrupt_at: str | None = None) -> None:
        self.steps: list[str] = []
        self._interrupt_at = interrupt_at

    def step(self, text: str) -> None:
        self.steps.append(text)
        if self._interrupt_at and text.startswith(self._interrupt_at):
            raise KeyboardInterrupt

    def update(self, done: int, total: int | None = None) -> None:
        pass


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    engine_index.repack(folder, "pip")
    engine_index.sglang(folder, "0.5.15.post1")
    engine_index.wheel(folder, "torch", "1.0", {"torch/__init__.py": engine_index.TORCH}, requires=("leaf",))
    engine_index.wheel(folder, "leaf", "1.0", {"leaf.py": "x = 1\n" * 100})
    return folder


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, index: Path) -> Path:
    """A virtual environment with a new pip, made once and copied by the tests that are not about making it."""
    env = tmp_path_factory.mktemp("template") / "env"
    subprocess.run([build.base_python(), "-m", "venv", env], check=True)
    pip = [env / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--find-links", index, "-U", build.PIP]
    subprocess.run(pip, check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})
    return env


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, index: Path, template: Path) -> Path:
    """The same with every package installed already: a build over it has little left to do."""
    env = tmp_path_factory.mktemp("filled") / "env"
    copy_environment(template, env)
    pip = [env / "bin" / "python", "-m", "pip", "install", "-q", "--no-index", "--find-links", index]
    subprocess.run([*pip, *WANTED.locked, *WANTED.bare], check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})
    return env


@pytest.fixture
def folder_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's settings name the folder and nothing else; the flavours ask for what it holds."""
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(releases, "build", lambda flavour, version=None: WANTED)
    return index


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def copy_environment(source: Path, target: Path) -> None:
    """As `cp -a`, but for pip's own thousand files, which are links: nothing here writes into one that is there."""

    def one(here: str, there: str) -> None:
        (os.link if "/site-packages/pip/" in here else shutil.copy2)(here, there)

    shutil.copytree(source, target, symlinks=True, copy_function=one)


def copying(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def copy(builder: build.Builder) -> None:
        if not builder.env.exists():
            copy_environment(source, builder.env)

    monkeypatch.setattr(build.Builder, "_virtual_environment", copy)


@pytest.fixture
def bare(data: Path, folder_index: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data folder, index, and an empty virtual environment by copying."""
    copying(monkeypatch, template)
    return data


@pytest.fixture
def quick(data: Path, folder_index: Path, filled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the packages in it, for what is not about installing them."""
    copying(monkeypatch, filled)
    return data


def test_from_nothing_with_a_real_venv_and_a_newer_pip(data: Path, folder_index: Path) -> None:
    """An install makes the venv, brings pip up to date, installs the lists, inspects, and only then records."""
    watcher = Watcher()
    done = engines.install("cpu", progress=watcher)
    assert done.did == "installed"
    assert done.facts.python.is_relative_to(data)
    assert done.facts.version == "0.5.15.post1"
    assert done.facts.flags["--is-embedding"].takes_value is False
    assert done.facts.flags["--dtype"].choices == ("auto", "bfloat16")
    assert done.facts.environment == {"SGLANG_USE_CPU_ENGINE": "1"}
    assert "updating pip" in watcher.steps
    assert watcher.steps[-1] == "checking that it starts"
    assert stat.S_IMODE((data / "engines" / "cpu" / "install.log").stat().st_mode) == 0o600
    assert engines.find("cpu") == done.facts
    told = results.plain(done)
    assert (told["did"], told["name"], told["flags"]) == ("installed", "cpu", len(done.facts.flags))


def test_a_second_install_does_nothing(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete environment of the same lock is left alone: no pip, no python, not even the lock is taken."""
    engines.install("cpu")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("started something")

    monkeypatch.setattr("qwen3emb_launch.engines.child.run", never)
    monkeypatch.setattr(record, "locked", never)
    assert engines.install("cpu").did == "nothing"
    assert engines.find().name == "cpu"


def _plugin(environment: Path) -> str | None:
    """The version of the plugin that the environment's python sees."""
    program = "import importlib.metadata as m; print(m.version('qwen3emb-engine-plugin'))"
    shown = subprocess.run([environment, "-c", program], capture_output=True, text=True, check=False)
    return shown.stdout.strip() or None


def test_a_changed_plugin_is_installed_alone(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each environment gets the launcher's plugin; another version of it replaces just that, with no index asked."""
    first = engines.install("cpu")
    assert first.facts.plugin == _plugin(first.facts.python)
    assert first.facts.plugin

    def newer(folder: Path) -> Path:
        return engine_index.wheel(folder, "qwen3emb_engine_plugin", "99.0", {"qwen3emb_engine_plugin/__init__.py": ""})

    monkeypatch.setattr(plugin, "build_plugin_wheel", newer)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    watcher = Watcher()
    second = engines.install("cpu", progress=watcher)
    assert (second.did, second.facts.plugin, _plugin(second.facts.python)) == ("plugin", "99.0", "99.0")
    assert watcher.steps == ["bringing the plugin up to date"]
    assert engines.install("cpu").did == "nothing"


def test_interrupted_while_pip_installs_then_resumed(bare: Path) -> None:
    """Ctrl-C stops pip, leaves nothing that is used, and the next install goes on in the same folder."""
    with pytest.raises(KeyboardInterrupt):
        engines.install("cpu", progress=Watcher(interrupt_at="installing"))
    assert [(e.name, e.state) for e in engines.environments()] == [("cpu", "partial")]
    assert "qwen3emb engine install cpu" in (engines.status("cpu").reason or "")
    with pytest.raises(UnfitError) as missing:
        engines.find("cpu")
    assert missing.value.code == "engine_missing"
    assert not build.users(bare)
    kept = record.folder("cpu") / f"env-{WANTED.key}" / "bin" / "python"
    before = kept.lstat().st_ino
    assert engines.install("cpu").did == "installed"
    assert kept.lstat().st_ino == before


def test_a_package_cut_off_half_way_is_installed_again(quick: Path) -> None:
    """What a power cut leaves, files without a finished RECORD, is not taken for an installed package."""
    with pytest.raises(KeyboardInterrupt):
        engines.install("cpu", progress=Watcher(interrupt_at="checking"))
    packages = build.site_packages(record.folder("cpu") / f"env-{WANTED.key}")
    assert packages
    (packages / "leaf.py").write_text("cut")
    row = (packages / "leaf-1.0.dist-info" / "RECORD").read_text()
    (packages / "leaf-1.0.dist-info" / "RECORD").write_text(row.replace("INSTALLER", "OTHER"))
    engines.install("cpu")
    assert (packages / "leaf.py").read_text() == "x = 1\n" * 100
    assert integrity.damages(packages) == []


def test_a_changed_lock_builds_beside_and_then_replaces(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new environment is whole the old one is what a launch gets; then the old one is deleted."""
    old = engines.install("cpu").facts.python
    changed = releases.Build("cpu", WANTED.version, ("torch==1.0",), WANTED.bare)
    monkeypatch.setattr(releases, "build", lambda flavour, version=None: changed)
    with pytest.raises(KeyboardInterrupt):
        engines.install("cpu", progress=Watcher(interrupt_at="checking"))
    assert engines.find("cpu").python == old
    done = engines.install("cpu")
    assert (done.did, done.facts.python != old, old.exists()) == ("rebuilt", True, False)


def test_a_deleted_file_is_found_by_check_and_mended_by_install(quick: Path) -> None:
    """`check` names the damaged package, `find` refuses from then on, `install` puts only that package back."""
    python = engines.install("cpu").facts.python
    packages = build.site_packages(python.parents[1])
    assert packages
    (packages / "leaf.py").unlink()
    report = engines.check("cpu")
    assert (report.ok, report.damage) == (False, ("leaf: leaf.py is missing",))
    assert "engine install cpu" in report.hint
    with pytest.raises(UnfitError) as broken:
        engines.find("cpu")
    assert broken.value.code == "engine_broken"
    assert "leaf.py" in broken.value.message
    torch = (packages / "torch-1.0.dist-info" / "RECORD").stat().st_mtime_ns
    assert engines.install("cpu").did == "repaired"
    assert (packages / "torch-1.0.dist-info" / "RECORD").stat().st_mtime_ns == torch
    assert engines.check("cpu").ok
    assert engines.find("cpu").python == python


def test_a_module_that_does_not_import_is_named(quick: Path) -> None:
    """A package that imports with an error is reported with that error, even though every file is as installed."""
    python = engines.install("cpu").facts.python
    packages = build.site_packages(python.parents[1])
    assert packages
    server = packages / "sglang" / "srt" / "entrypoints" / "http_server.py"
    server.write_text("import gone\n")
    report = engines.check()
    assert not report.ok
    assert "No module named 'gone'" in (report.error or "")


def test_a_replaced_sglang_is_looked_at_again(quick: Path) -> None:
    """When sglang's metadata changed since the inspection, find() asks its python anew before it answers."""
    python = engines.install("cpu").facts.python
    packages = build.site_packages(python.parents[1])
    assert packages
    args = packages / "sglang" / "srt" / "server_args.py"
    args.write_text(args.read_text() + '        parser.add_argument("--new-flag")\n')
    os.utime(packages / "sglang-0.5.15.post1.dist-info", ns=(1, 1))
    assert "--new-flag" in engines.find("cpu").flags
    seen = record.load("cpu")
    assert seen
    assert inspection.fresh(seen.inspection)


def test_force_builds_anew_but_not_under_a_running_process(quick: Path) -> None:
    """--force starts from nothing; while a process runs from the environment, neither it nor remove touches it."""
    python = engines.install("cpu").facts.python
    stray = python.parents[1] / "stray"
    stray.touch()
    with subprocess.Popen([python, "-c", "input()"], stdin=subprocess.PIPE) as busy:
        for act in (lambda: engines.install("cpu", force=True), lambda: engines.remove("cpu")):
            with pytest.raises(UnfitError) as refused:
                act()
            assert refused.value.code == "engine_in_use"
            assert refused.value.details["pids"] == [busy.pid]
    assert stray.exists()
    assert engines.install("cpu", force=True).did == "rebuilt"
    assert not stray.exists()


def test_two_installs_exclude_each_other(quick: Path) -> None:
    """The second waits for the first, and says for whom, until its patience ends."""
    watcher = Watcher()
    with record.locked("cpu", SilentProgress(), wait=0), pytest.raises(UnfitError) as busy:
        engines.install("cpu", wait=0.3, progress=watcher)
    assert busy.value.code == "engine_busy"
    assert watcher.steps == [f"waiting for another install of 'cpu' (pid {os.getpid()})"]


def test_the_waiting_install_takes_the_result_of_the_first(quick: Path) -> None:
    """Two at once build once."""
    outcomes: list[str] = []
    threads = [threading.Thread(target=lambda: outcomes.append(engines.install("cpu").did)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(outcomes) == ["installed", "nothing"]


def test_no_index_is_a_network_error_with_pips_last_words(
    bare: Path, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that refuses the connection ends in exit status 5, pip's lines and the log's path; a re-run goes on."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    with pytest.raises(NetworkError) as failed:
        engines.install("cpu")
    error = failed.value
    assert (error.exit, error.code) == (5, "index_unreachable")
    assert "install.log" in error.message
    assert any("torch==1.0" in line for line in error.details["pip"])
    assert "secret" not in error.message + (record.folder("cpu") / "install.log").read_text()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert engines.install("cpu").did == "installed"


def test_an_unknown_package_is_told_apart_from_a_dead_index(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that answers but lacks the package is a mirror's or constraint's fault, and said so."""
    monkeypatch.setattr(
        releases, "build", lambda flavour, version=None: releases.Build("cpu", "1", ("no-such-thing==9",), ())
    )
    with pytest.raises(LaunchError) as failed:
        engines.install("cpu")
    assert failed.value.code == "package_missing"


def test_the_users_constraints_hold(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constraint that forbids a pinned version stops the install: it is not worked around."""
    limits = tmp_path / "constraints.txt"
    limits.write_text("leaf<1.0\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(limits))
    with pytest.raises(LaunchError) as failed:
        engines.install("cpu")
    assert failed.value.code == "engine_conflict"
    assert "PIP_CONSTRAINT" in failed.value.hint


def test_a_full_disk_is_told_before_anything_is_made(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both numbers are in the message, and no folder is left behind that looks like an environment."""
    monkeypatch.setattr(build, "free_bytes", lambda folder: 1_500_000_000)
    with pytest.raises(UnfitError) as full:
        engines.install("cpu")
    assert full.value.code == "disk_full"
    assert "9.5 GB" in full.value.message
    assert "1.5 GB" in full.value.message


def test_a_folder_that_cannot_be_written(tmp_path: Path, folder_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder below a file ends in an error about that folder, not in a traceback."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(UnfitError) as failed:
        engines.install("cpu")
    assert str(tmp_path / "file") in failed.value.message


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("echo 'ensurepip is not available. On Debian/Ubuntu systems, you need python3-venv'; exit 1", "venv_missing"),
        ("echo 'No module named venv'; exit 1", "venv_missing"),
        ("echo 'OSError: [Errno 28] No space left on device'; exit 1", "disk_full"),
        ("echo 'something else'; exit 1", "venv_failed"),
    ],
)
def test_a_python_that_cannot_make_environments(
    data: Path, folder_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, code: str
) -> None:
    """A Python without venv or ensurepip is named with the package that brings it."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(build, "base_python", lambda: fake)
    with pytest.raises(UnfitError) as failed:
        engines.install("cpu")
    assert failed.value.code == code


def test_another_failure_of_pip_is_a_failed_operation(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure nobody foresaw keeps pip's last lines and exits 1."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/nonexistent/pip.conf")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(
        releases, "build", lambda flavour, version=None: releases.Build("cpu", "1", ("not a requirement!",), ())
    )
    with pytest.raises(CheckFailedError) as failed:
        engines.install("cpu")
    assert failed.value.code == "pip_failed"
    assert "not a requirement" in failed.value.message


def test_a_killed_launcher_takes_pip_with_it(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL to the installing process ends pip too, and the lock is free again."""
    engines_env = record.folder("cpu") / f"env-{WANTED.key}"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {
            **os.environ,
            "PIP_NO_INDEX": "0",
            "PIP_FIND_LINKS": "",
            "PIP_INDEX_URL": f"http://127.0.0.1:{silent.getsockname()[1]}/simple",
        }
        program = """
            from pathlib import Path
            from qwen3emb_launch.engines import build, record, releases
            from qwen3emb_launch.progress import SilentProgress
            with record.locked("cpu", SilentProgress(), 0) as hold:
                import sys
                builder = build.Builder(Path(sys.argv[1]), Path(sys.argv[2]), SilentProgress(), hold)
                builder.pip("install", "anything")
        """
        build.Builder(engines_env, tmp_path / "log", SilentProgress(), 0)._virtual_environment()
        launcher = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), engines_env, tmp_path / "log"], env=environment
        )
        silent.settimeout(60)
        connection, _ = silent.accept()  # pip is waiting for the index now
        with connection:
            pips = psutil.Process(launcher.pid).children(recursive=True)
            assert pips
            with pytest.raises(UnfitError), record.locked("cpu", SilentProgress(), 0):
                pass
            launcher.send_signal(signal.SIGKILL)
            launcher.wait(10)
            _, alive = psutil.wait_procs(pips, timeout=10)
            assert not alive
    with record.locked("cpu", SilentProgress(), wait=5):
        pass


def test_adopting_leaves_the_environment_as_it_is(quick: Path, tmp_path: Path) -> None:
    """An adopted environment is inspected and recorded, never written into; remove forgets it, not while it is used."""
    own = engines.install("cpu").facts.python.parents[1]
    theirs = tmp_path / "theirs"
    copy_environment(own, theirs)
    before = sorted(theirs.rglob("*"))
    done = engines.install(python=theirs, name="mine")
    assert (done.did, done.facts.adopted, done.facts.flavour) == ("adopted", True, "cpu")
    assert done.facts.python == theirs / "bin" / "python"
    assert engines.install(python=theirs / "bin" / "python", name="mine").did == "nothing"
    assert engines.find("cpu", name="mine").python == done.facts.python
    assert _plugin(theirs / "bin" / "python") == done.facts.plugin  # theirs is a copy of one that has it
    assert Path(done.facts.environment["PYTHONPATH"]).joinpath("qwen3emb_engine_plugin", "__init__.py").is_file()
    assert engines.check("mine").ok
    launched = {**os.environ, **done.facts.environment}
    with subprocess.Popen([done.facts.python, "-c", "input()"], stdin=subprocess.PIPE, env=launched) as busy:
        with pytest.raises(UnfitError) as refused:
            engines.remove("mine")
        assert (refused.value.code, refused.value.details["pids"]) == ("engine_in_use", [busy.pid])
        assert engines.find("cpu", name="mine").python == done.facts.python
    watcher = Watcher()
    assert engines.remove("mine", watcher).adopted
    assert watcher.steps == ["forgetting it; its own files stay"]
    assert [p for p in sorted(theirs.rglob("*")) if "__pycache__" not in p.parts] == [
        p for p in before if "__pycache__" not in p.parts
    ]
    with pytest.raises(InvalidInputError) as unknown:
        engines.find(name="mine")
    assert unknown.value.code == "unknown_engine"


def test_what_cannot_be_adopted(quick: Path, tmp_path: Path, template: Path) -> None:
    """No python there, no sglang there, a name in use, a version that is not ours to choose: each has its own error."""
    engines.install("cpu")
    empty = tmp_path / "empty"
    copy_environment(template, empty)
    liar = tmp_path / "liar"
    liar.write_text("#!/bin/sh\necho no python at all\nexit 3\n")
    liar.chmod(0o755)

    def code(**arguments: object) -> str:
        with pytest.raises(LaunchError) as failed:
            engines.install(**arguments)  # type: ignore[arg-type]
        return failed.value.code

    assert code(python=tmp_path / "nowhere") == "python_missing"
    assert code(python=liar) == "engine_python"
    assert code(python=empty) == "not_an_engine"
    assert code(python=empty, name="cpu") == "engine_name_taken"
    assert code(python=empty, version="0.5.23") == "usage"
    assert code(python=empty, name="../up") == "bad_name"
    assert [e.name for e in engines.environments()] == ["cpu"]


def test_an_adopted_engine_that_is_gated_is_refused(quick: Path, tmp_path: Path, index: Path) -> None:
    """A release known to return NaN is not adopted, and the reason carries its link."""
    env = engines.install("cpu").facts.python.parents[1]
    bad = tmp_path / "bad"
    copy_environment(env, bad)
    folder = next((bad / "lib").glob("python3*")) / "site-packages"
    info = folder / "sglang-0.5.12.dist-info"
    (folder / "sglang-0.5.15.post1.dist-info").rename(info)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.12\n")
    with pytest.raises(InvalidInputError) as refused:
        engines.install(python=bad)
    assert "27343" in refused.value.message


def test_remove_leaves_nothing(quick: Path) -> None:
    """A removed environment is gone from the list and from the disk."""
    engines.install("cpu")
    watcher = Watcher()
    assert engines.remove("cpu", watcher).state == "complete"
    assert watcher.steps == ["deleting its files"]
    assert engines.environments() == []
    assert [p.name for p in (quick / "engines").iterdir()] == [".cpu.lock"]
    with pytest.raises(InvalidInputError):
        engines.remove("cpu")


def test_an_interrupted_removal_is_gone_at_once_and_swept_later(quick: Path) -> None:
    """Ctrl-C while files are deleted leaves no environment, and the next install clears the rest."""
    engines.install("cpu")
    with pytest.raises(KeyboardInterrupt):
        engines.remove("cpu", Watcher(interrupt_at="deleting"))
    assert engines.environments() == []
    assert len(list((quick / "engines").glob(".cpu.removing-*"))) == 1
    engines.install("cpu")
    assert list((quick / "engines").glob(".cpu.removing-*")) == []
