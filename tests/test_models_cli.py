"""`qwen3emb download` and `qwen3emb models`, through the application's own entry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from loopback_hub import Fault, LoopbackHub, checkpoint, loopback_hub

from qwen3emb_launch.cli.app import run

REPO = "Qwen/Qwen3-Embedding-0.6B"


@pytest.fixture
def server(demo_model: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    monkeypatch.setenv("QWEN3EMB_DATA_DIR", str(own_folders / "data"))
    with loopback_hub() as running:
        running.repos[REPO] = checkpoint(demo_model)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.url)
        yield running


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict]:
    """A command's exit status and its envelope, which is all that stdout holds."""
    status = run([*args, "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    envelope = json.loads(line)
    assert envelope["command"] == " ".join(args[: 2 if args[0] == "models" else 1])
    assert envelope["ok"] == (status == 0)
    return status, envelope


def test_a_models_life(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    """Download, list, show, verify, damage, repair, remove: each says what it did, in one envelope."""
    status, envelope = call(capsys, "download", "0.6b")
    assert status == 0
    result = envelope["result"]
    assert result["commit"] == server.commit
    assert result["bytes_fetched"] == result["bytes_total"]

    _, envelope = call(capsys, "models", "list")
    assert [(r["model"], r["here"]) for r in envelope["result"]][:2] == [("0.6b", True), ("4b", False)]

    _, envelope = call(capsys, "models", "show", "0.6b")
    assert (envelope["result"]["path"], envelope["result"]["eos_token_id"]) == (result["path"], 256)

    assert call(capsys, "models", "verify", "0.6b")[0] == 0
    weights = Path(result["path"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 255
    weights.write_bytes(content)
    status, envelope = call(capsys, "models", "verify", "0.6b")
    assert (status, envelope["error"]["code"]) == (1, "corrupted_model")
    bad = [f["path"] for f in envelope["result"]["files"] if f["state"] != "ok"]
    assert bad == ["model.safetensors"]
    assert call(capsys, "models", "verify", "0.6b", "--repair")[1]["result"]["repaired"] == bad

    status, envelope = call(capsys, "models", "remove", "0.6b")
    assert envelope["result"]["bytes_freed"] == result["bytes_total"]
    assert call(capsys, "models", "remove", "0.6b")[0] == 3


@pytest.mark.parametrize(
    ("args", "status", "code"),
    [
        (("download", "5b"), 2, "unknown_model"),
        (("download", "me/unknown"), 2, "unknown_repo"),
        (("download", "0.6b", "--revision", "v9"), 2, "unknown_revision"),
        (("download", "0.6b", "--source", "ftp"), 2, "usage"),
        (("download", "demo"), 2, "nothing_to_download"),
        (("models", "show", "me/unknown"), 3, "model_missing"),
        (("models", "verify", "8b"), 3, "model_missing"),
        (("models", "remove", "demo"), 3, "model_missing"),
    ],
)
def test_bad_input_has_its_code_and_exit_status(
    server: LoopbackHub, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], status: int, code: str
) -> None:
    got, envelope = call(capsys, *args)
    assert (got, envelope["error"]["code"]) == (status, code)
    assert envelope["error"]["hint"]


@pytest.mark.parametrize(("answer", "extra", "gone"), [("n", [], False), ("y", [], True), (None, ["--yes"], True)])
def test_removal_asks_on_a_terminal(
    server: LoopbackHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    extra: list[str],
    gone: bool,
) -> None:
    """`n` keeps the model and exits 130; `--yes` is not asked; without a terminal nobody is there to be asked."""
    path = Path(call(capsys, "download", "0.6b")[1]["result"]["path"])
    asked: list[str] = []

    def confirm(question: str, **_: object) -> None:
        asked.append(question)
        if answer != "y":
            raise typer.Abort

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr(typer, "confirm", confirm)
    assert run(["models", "remove", "0.6b", *extra]) == (0 if gone else 130)
    assert path.exists() is not gone
    assert len(asked) == (answer is not None)


def test_a_refusing_hub_is_exit_status_5(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    server.faults = [Fault("/api/models", status=401)]
    status, envelope = call(capsys, "download", "0.6b")
    assert (status, envelope["error"]["code"]) == (5, "hub_unauthorized")


def test_people_see_words_and_pipes_see_tabs(server: LoopbackHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["download", "0.6b", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "model.safetensors\t" in shown.out
    assert "to fetch" in shown.out
    assert run(["download", "0.6b"]) == 0
    shown = capsys.readouterr()
    assert "all hashes right" in shown.out
    assert "100% of" in shown.err
    assert run(["download", "0.6b"]) == 0
    assert "nothing, it was all here" in capsys.readouterr().out
    assert run(["models", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith(f"0.6b\t{REPO}\tyes\t")
    assert run(["models", "verify", "0.6b"]) == 0
    assert "every hash is right" in capsys.readouterr().out
    assert run(["models", "show", "4b"]) == 0
    shown = capsys.readouterr()
    assert "7.87 GFLOP a token" in shown.out
    assert "69.45 by task" in shown.out


def test_a_folder_of_ones_own_can_be_shown_and_checked(
    demo_model: Path, capsys: pytest.CaptureFixture[str], server: LoopbackHub
) -> None:
    _, envelope = call(capsys, "models", "show", str(demo_model))
    assert envelope["result"]["source"] == "folder"
    _, envelope = call(capsys, "models", "verify", str(demo_model))
    assert {f["state"] for f in envelope["result"]["files"]} == {"unknown"}
    assert not server.seen


@pytest.mark.parametrize("command", [["download"], *(["models", c] for c in ("list", "show", "verify", "remove"))])
def test_every_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    assert f"qwen3emb {' '.join(command)}" in capsys.readouterr().out.split("Example")[1]
