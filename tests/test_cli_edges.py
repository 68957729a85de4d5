"""The edges of every command: closed or full stdout, other locales, defects, and words that are empty."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from test_state import record as a_record

from qwen3emb_launch import state
from qwen3emb_launch.cli.app import COMMANDS, build, run
from qwen3emb_launch.cli.program_help import first_sentence
from qwen3emb_launch.cli.up_view import UpView
from qwen3emb_launch.console import Console
from qwen3emb_launch.lifecycle import State, Transition

PROGRAM = f"{sys.executable} -m qwen3emb_launch"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, shell=True, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arguments", ["status", "status --json", "profiles list"])
def test_closed_streams_are_no_crash(arguments: str) -> None:
    """A stream closed by the shell is output that nobody wants."""
    done = shell(f"{PROGRAM} {arguments} >&- <&-")
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_open_to_what_the_command_becomes(closed: str, tmp_path: Path) -> None:
    """`up` is replaced by its supervisor, and children inherit: a stream that the shell closed leads to /dev/null."""
    seen = tmp_path / "seen"
    look = f"import os; open({str(seen)!r}, 'w').write(' '.join(os.readlink(f'/proc/self/fd/{{n}}') for n in range(3)))"
    (tmp_path / "code.py").write_text(
        "import os, sys; from qwen3emb_launch.__main__ import _open_closed_streams; _open_closed_streams()\n"
        f"os.execv(sys.executable, ['python', '-c', {look!r}])"
    )
    assert shell(f"{sys.executable} {tmp_path / 'code.py'} {closed}").returncode == 0
    assert seen.read_text().split().count("/dev/null") >= closed.count("&-")


@pytest.mark.parametrize("arguments", ["profiles list", "profiles list --json", "profiles show demo"])
def test_full_stdout_is_told_on_stderr(arguments: str) -> None:
    """Data that cannot be written is a failure: exit 1 and one line on stderr, with --json too."""
    done = shell(f"{PROGRAM} {arguments} > /dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith("error: stdout cannot be written: No space left on device")


@pytest.mark.parametrize(("arguments", "status"), [("status", 0), ("status --json", 0), ("logs nosuch", 2)])
def test_talk_that_cannot_be_written_changes_nothing(arguments: str, status: int) -> None:
    """A stderr on a full disk costs the talk, not the command or its exit status."""
    assert shell(f"{PROGRAM} {arguments} 2> /dev/full").returncode == status


def test_text_survives_a_locale_without_its_letters() -> None:
    """Under LC_ALL=C the bytes of the command line are taken as the UTF-8 that they are; the refusal shows them."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from qwen3emb_launch.cli.embed import _argument; print(ascii(_argument(sys.argv[1])))"
    done = shell(f'{sys.executable} -c "{code}" 你好', **ascii_only)
    assert done.stdout.strip() == "'\\u4f60\\u597d'", done.stderr
    done = shell(f"{PROGRAM} profiles show 演示 --json", **ascii_only)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (2, "unknown_profile")


def test_defect_is_one_envelope(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw: its place on stderr, one envelope on stdout, exit 1."""

    def fall(*_: Any) -> None:
        raise ZeroDivisionError("by the test")

    monkeypatch.setattr(state, "instances", fall)
    assert run(["status", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "internal_error"
    assert "in fall" in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["nosuch"], "qwen3emb --help"),
        (["status", "--nosuch"], "qwen3emb status --help"),
        (["--no"], "qwen3emb --help"),
        (["status", "--json=1"], "qwen3emb status --help"),
    ],
)
def test_usage_error_points_at_help_that_exists(
    capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    """The next command to run is one that runs."""
    assert run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["hint"] == hint


def test_program_help_says_what_the_commands_say() -> None:
    """Each sentence of `qwen3emb --help` is the first of that command's own help; none is missing."""
    commands = typer.main.get_command(build()).commands
    assert {name: first_sentence(command.help) for name, command in commands.items()} == COMMANDS


@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["--version"]])
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    """What takes long to import (a fifth of a second and more) stays out of the commands that should be instant."""
    code = (
        "import sys; from qwen3emb_launch.cli.app import run; status = run(sys.argv[1:]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    heavy = {"pydantic", "httpx", "openai", "huggingface_hub", "numpy", "yaml", "markdown_it", "pygments", "asyncio"}
    heavy |= set() if arguments == ["--help"] else {"rich"}
    assert not heavy & set(done.stderr.split())


def test_completion_knows_a_commands_options() -> None:
    """Tab after `qwen3emb up --pr` gives `--profile`, though the program's own help is built without parameters."""
    asked = {"_QWEN3EMB_COMPLETE": "complete_bash", "COMP_WORDS": "qwen3emb up --pr", "COMP_CWORD": "2"}
    done = shell(f"{Path(sys.executable).with_name('qwen3emb')}", **asked)
    assert (done.returncode, done.stdout.split()) == (0, ["--profile"]), done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--profile", "demo", "--name", ""], "bad_name"),
        (["--profile", ""], "unknown_profile"),
        (["--profile", "demo", "--port", "0"], "bad_port"),
        (["--profile", "demo", "--port", "-5"], "bad_port"),
    ],
)
def test_dry_run_refuses_what_a_start_refuses(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: str
) -> None:
    """An empty word is a mistake (an unset shell variable), not the default; a dry run looks at ports too."""
    assert run(["up", "--dry-run", *arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code


def test_refused_start_leaves_no_instance(capsys: pytest.CaptureFixture[str]) -> None:
    """A claim that never came to a plan is not shown as an instance."""
    state.claim("never").release()
    assert state.instances() == []


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("up --profile rtx40", ["rtx4090"]),
        ("profiles explain h", ["h100", "h200"]),
        ("up --model 0", ["0.6b"]),
        ("logs mi", ["mine"]),
        ("engine check zz", []),
    ],
)
def test_completion_knows_the_names_that_are_there(line: str, offered: list[str]) -> None:
    """Tab after an option or command that takes a name offers profiles, models, instances, environments."""
    mine = state.claim("mine")
    state.write_private(mine.plan, "{}")
    words = f"qwen3emb {line}"
    asked = {"_QWEN3EMB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = shell(f"{Path(sys.executable).with_name('qwen3emb')}", **asked)
    assert (done.returncode, done.stdout.split()) == (0, offered), done.stderr


def test_ctrl_c_before_a_command_is_told_like_any_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the command line is read: 130 and one envelope, as from a command's body."""

    monkeypatch.setattr("qwen3emb_launch.cli.app.build", lambda *_: lambda **_: 130)
    assert run(["status", "--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "interrupted"


def test_ctrl_c_between_up_and_its_supervisor_waits() -> None:
    """Ctrl-C held back over the change of program ends the supervisor in words, before anything is started."""
    code = (
        "import os, signal, sys; from qwen3emb_launch import state; from qwen3emb_launch.up.detached import become;"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); os.kill(os.getpid(), signal.SIGINT);"
        "become(state.claim('held'), ['--json'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (130, "interrupted"), done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_colours_verdicts_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict's cell has its colour beside its word, other cells none; NO_COLOR leaves the word."""

    def shown() -> str:
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        Console("verify").table(["verdict", "seen"], [["PASS", "PASS 3"], ["FAIL", "nothing"]])
        return terminal.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mPASS" in shown()
    assert "\x1b[1;31mFAIL" in shown()
    assert shown().count("\x1b[32m") == 1
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in shown()
    assert "PASS 3" in shown()


def test_an_endpoint_that_cannot_be_printed_is_served_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`up > file` on a disk that is full by the time it is ready: said on stderr, and the instance lives."""
    ready = Transition("one", State.STARTING, State.READY, "test", 2.0)
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        UpView(Console("up")).moved(ready, a_record())
    err = capsys.readouterr().err
    assert "warning: stdout cannot be written: No space left on device" in err
    assert "Ctrl-C stops it." in err


def test_progress_shows_amounts_only_where_the_whole_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a step of unknown size is its words and the time, also after one whose size was known."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Console("engine").progress("engine") as progress:
        progress.step("downloading")
        progress.update(5, 10)
    assert "engine: downloading" in terminal.getvalue()
    assert "5/10 bytes" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Console("engine").progress("engine") as progress:
        progress.update(5, 10)
        progress.step("starting its python")
    last = terminal.getvalue().split("starting its python")[-1]
    assert "bytes" not in last
    assert "/?" not in last


def test_progress_goes_on_after_a_step_that_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bar was full; the next step's spinner and clock move all the same."""
    from rich.progress import Task

    made: list[Task] = []
    create = Task.__init__

    def kept(self: Task, *args: Any, **more: Any) -> None:
        made.append(self)
        create(self, *args, **more)

    monkeypatch.setattr(Task, "__init__", kept)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Console("engine").progress("engine") as progress:
        progress.update(10, 10)
        (task,) = made
        assert task.finished
        progress.step("starting its python")
        assert not task.finished
