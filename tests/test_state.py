"""Instances on disk: exclusive, private, atomic, and never a crash whatever lies there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3emb_launch import state
from qwen3emb_launch.errors import InvalidInputError, UnfitError
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.results import plain
from qwen3emb_launch.state import InstanceRecord, ProcessId


def record(name: str = "one", **changes: object) -> InstanceRecord:
    made = InstanceRecord(
        name=name,
        state=State.READY,
        reason="test",
        supervisor=state.identify(os.getpid()),
        engines=(),
        profile="demo",
        model="demo",
        served_model_name="demo",
        base_url="http://127.0.0.1:1/v1",
        engine_url="http://127.0.0.1:1/v1",
        max_dims=64,
        context_length=512,
        started_at=1.0,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def saved(name: str = "one", **changes: object) -> state.Claim:
    claim = state.claim(name)
    claim.write(record(name, **changes))
    return claim


def test_record_survives_the_file() -> None:
    """What a supervisor writes is what others read."""
    mine = record(engines=(ProcessId(1, 2, "b"),), error={"code": "x"}, ready_at=2.0)
    assert InstanceRecord.from_dict(json.loads(json.dumps(plain(mine)))) == mine


def test_running_while_its_supervisor_lives() -> None:
    """A record counts while the very process it names lives."""
    saved()
    assert state.find("one").running
    assert state.find() == state.find("one")
    assert state.running()[1].max_dims == 64


@pytest.mark.parametrize("field", ["start", "boot"])
def test_a_reused_pid_is_recognised(field: str) -> None:
    """Another start time or another boot: the record is left over, and shown as failed."""
    me = state.identify(os.getpid())
    assert me is not None
    other = replace(me, **{field: "other boot" if field == "boot" else getattr(me, field) + 1})
    saved(supervisor=other)
    left = state.find("one")
    assert (left.state, left.running) == (State.FAILED, False)
    assert left.record is not None
    assert "ended without a word while ready" in left.record.reason
    with pytest.raises(UnfitError) as caught:
        state.running("one")
    assert caught.value.code == "not_running"


def test_zombies_are_not_alive() -> None:
    """A process that ended and was not reaped does not count."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    one = state.identify(child.pid)
    assert one is not None
    assert one.alive
    child.stdin.close()  # type: ignore[union-attr]
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not one.alive
    child.wait()
    assert state.identify(child.pid) is None


def test_every_cut_of_a_record_is_survived() -> None:
    """A state file cut at any byte is taken as left over, with a warning; it crashes nobody."""
    claim = saved()
    path = claim.folder / "instance.json"
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        found = state.find("one")
        assert not found.running
        assert found.warning
        assert str(path) in found.warning
    path.write_bytes(whole)
    assert state.find("one").running


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["schema", "state", "supervisor"]), inner),
    )
)
def test_any_json_is_survived(value: object) -> None:
    """Whatever JSON lies in the place of a record, reading it raises nothing and runs nothing."""
    folder = state.claim("junk").folder if state.load("junk") is None else state.load("junk").folder  # type: ignore[union-attr]
    (folder / "instance.json").write_text(json.dumps(value))
    found = state.find("junk")
    assert not found.running


def test_newer_schema_is_left_alone() -> None:
    """A record of a newer launcher is not guessed at."""
    claim = saved()
    path = claim.folder / "instance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    assert "newer" in str(state.find("one").warning)


def test_two_claims_exclude_each_other_and_name_the_holder() -> None:
    """The second claim of a name fails with the first holder's pid; another name is free; release frees it."""
    first = state.claim("one")
    with pytest.raises(UnfitError) as caught:
        state.claim("one")
    assert caught.value.code == "already_running"
    assert str(os.getpid()) in caught.value.message
    state.claim("two").release()
    first.release()
    state.claim("one").release()


def test_claim_of_a_dead_process_is_free() -> None:
    """A lock ends with its process, however it ends."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from qwen3emb_launch import state; c = state.claim('one'); print('held', flush=True); input()",
        ],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(UnfitError, match=str(holder.pid)):
        state.claim("one")
    holder.kill()
    holder.communicate()
    state.claim("one").release()


def test_everything_is_private() -> None:
    """Folders are 0700 and files 0600, also where a laxer folder was there before."""
    folder = state.claim("one").folder
    folder.chmod(0o755)
    state.load("one")
    (folder / "lock").unlink()
    claim = saved()
    claim.append(Transition("one", State.STARTING, State.READY, "x", 1.0))
    assert claim.folder.stat().st_mode & 0o777 == 0o700
    for path in claim.folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0


def test_a_failed_write_keeps_the_old_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the disk is full the old record stays whole, no partial file is left, and the error says where."""
    claim = saved()
    path = claim.folder / "instance.json"
    before = path.read_text()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UnfitError) as caught:
        claim.write(record(reason="new"))
    monkeypatch.undo()
    assert caught.value.code == "state_unwritable"
    assert "No space left" in caught.value.message
    assert path.read_text() == before
    assert not list(claim.folder.glob("*.partial"))


def test_an_event_that_does_not_fit_leaves_no_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle of an event takes none of it; the next one stands on a line of its own."""
    claim = state.claim("one")
    event = Transition("one", State.STARTING, State.READY, "x", 1.0)
    claim.append(event)
    write = os.write
    with monkeypatch.context() as disk:
        disk.setattr(os, "write", lambda fd, data: write(fd, data[: len(data) // 2]))
        with pytest.raises(UnfitError, match="No space left"):
            claim.append(event)
    claim.append(event)
    lines = (claim.folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [event.to_dict()] * 2


def test_unusable_state_folder_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A state folder that cannot be made is an unfit environment, with the variable that moves it in the hint."""
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("QWEN3EMB_STATE_DIR", str(blocker / "below"))
    for act in (lambda: state.claim("one"), state.instances):
        with pytest.raises(UnfitError) as caught:
            act()
        assert caught.value.code == "state_unwritable"
        assert "QWEN3EMB_STATE_DIR" in caught.value.hint


@pytest.mark.parametrize("name", ["", "-x", "../x", "a/b", "A", "x" * 64, "a b", "ä", ".hidden", "x\n"])
def test_bad_names_are_refused(name: str) -> None:
    """A name must be a plain folder name: no paths, no flags, no surprises."""
    with pytest.raises(InvalidInputError):
        state.claim(name)
    assert state.load(name) is None


def test_unknown_name_gets_the_nearest() -> None:
    """A mistyped name is answered with the nearest one."""
    saved("demo")
    with pytest.raises(InvalidInputError) as caught:
        state.find("deom")
    assert caught.value.code == "unknown_instance"
    assert "demo" in caught.value.hint


def test_no_name_means_the_only_one() -> None:
    """Without a name: the only running instance, an error where there is none or several."""
    with pytest.raises(UnfitError) as none:
        state.find()
    assert none.value.code == "not_running"
    saved("one")
    assert state.find().name == "one"
    saved("two")
    with pytest.raises(InvalidInputError) as several:
        state.find()
    assert several.value.code == "which_instance"
    assert "one, two" in several.value.message


def test_old_logs_and_events_are_bounded() -> None:
    """Logs of the last ten starts are kept, with their rotated pieces; a full event file is set aside."""
    claim = state.claim("one")
    for number in range(15):
        path = claim.new_log(f"20260101-0000{number:02d}")
        path.write_text("x")
        path.with_name(path.name + ".1").write_text("older")
    assert len(list(claim.logs.glob("engine-*.log"))) == 10
    assert len(list(claim.logs.glob("engine-*.log.1"))) == 10
    (claim.folder / "events.jsonl").write_bytes(b"x" * (2 << 20))
    claim.append(Transition("one", State.STARTING, State.READY, "x", 1.0))
    assert (claim.folder / "events.jsonl").stat().st_size < 1000
    assert (claim.folder / "events.jsonl.1").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"started_at": None}, {"log": 5}, {"error": "text"}, {"restarts": "many"}, {"base_url": None}, {"engines": None}],
)
def test_record_of_wrong_types_is_left_over(wrong: dict[str, object]) -> None:
    """A record that is JSON but not ours is a warning for whoever reads it, not a crash later."""
    claim = saved()
    path = claim.folder / "instance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    found = state.find("one")
    assert (found.state, found.record) == (State.FAILED, None)
    assert found.warning is not None
    assert str(path) in found.warning
