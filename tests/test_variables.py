"""Environment variables of ours: every one in the sources is known, a mistyped one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3emb_launch.cli.app import run
from qwen3emb_launch.variables import KNOWN, OPEN, mistaken

ROOT = Path(__file__).resolve().parents[1]


def test_every_variable_in_the_sources_is_known() -> None:
    """A variable read or documented anywhere, and no other, is one that gives no warning."""
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    texts += [p for part in ("qwen3emb_launch", "engine_plugin") for p in (ROOT / part).rglob("*.py")]
    texts = [p for p in texts if p.name != "variables.py"]
    found = {
        name for p in texts for name in re.findall(r"(?<![A-Z_])QWEN3EMB_[A-Z_]*[A-Z]\b", p.read_text(encoding="utf-8"))
    }
    assert {name for name in found if not name.startswith(OPEN)} == KNOWN


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("QWEN3EMB_STATEDIR", ": did you mean QWEN3EMB_STATE_DIR?"),
        ("QWEN3EMB_DATA", ": did you mean QWEN3EMB_DATA_DIR?"),
        ("QWEN3EMB_GATEWAY_KEYS", ": did you mean QWEN3EMB_GATEWAY_API_KEYS?"),
        ("QWEN3EMB_ZZZZZZZZZZ", ""),
    ],
)
def test_mistyped_variable_is_told_with_the_one_meant(name: str, meant: str) -> None:
    """The nearest known name, where one is near."""
    assert mistaken([name, "PATH", "QWEN3EMB_SET_TP", *KNOWN]) == [f"{name} means nothing to qwen3emb{meant}"]


def test_commands_warn_and_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, once; the command does what it would, with --json too."""
    monkeypatch.setenv("QWEN3EMB_STATEDIR", "/nowhere")
    assert run(["status", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith('{"schema"')
    assert err.count("QWEN3EMB_STATEDIR") == 1
