"""upgrade with fake engines behind the real gateway: each step fails on purpose, and the old engine serves on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning_cases import request
from supervised import Supervised, gateway_plan
from test_up_gateway import behaving, load, pids

from qwen3emb_launch import engines, planning
from qwen3emb_launch.cli import upgrade as command
from qwen3emb_launch.cli.app import run as run_words
from qwen3emb_launch.cli.supervise import SMOKE
from qwen3emb_launch.cli.up_view import show_checks
from qwen3emb_launch.console import Console
from qwen3emb_launch.engines import EnvironmentStatus, Installed
from qwen3emb_launch.errors import CheckFailedError, Exit, InvalidInputError, UnfitError
from qwen3emb_launch.facts import EngineFacts, LaunchPlan
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.results import plain
from qwen3emb_launch.verify.report import Check, Report, Verdict


class Environments:
    """The engine environments of a machine, as far as an upgrade asks: `fake` runs, `install` adds one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, plan: LaunchPlan) -> None:
        self.names = [plan.engine.name]
        self.plan = plan
        self.trouble: Exception | None = None
        for name in ("environments", "install", "find", "remove"):
            monkeypatch.setattr(engines, name, getattr(self, name))

    def facts(self, name: str) -> EngineFacts:
        if name == self.plan.engine.name:
            return self.plan.engine
        return replace(self.plan.engine, name=name, version="0.5.16", python=Path(f"/envs/{name}/bin/python"))

    def environments(self) -> list[EnvironmentStatus]:
        return [
            EnvironmentStatus(n, "complete", "cpu", "0.5.16", None, None, None, True, None, None) for n in self.names
        ]

    def install(self, flavour: str, *, name: str, **_: object) -> Installed:
        if self.trouble:
            raise self.trouble
        self.names.append(name)
        return Installed("adopted", self.facts(name), 1.0, None, None)

    def find(self, flavour: str, name: str | None = None) -> EngineFacts:
        return self.facts(name or self.names[-1])

    def remove(self, name: str, progress: object = None) -> None:
        self.names.remove(name)


@pytest.fixture
def plan() -> LaunchPlan:
    return gateway_plan()


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, plan: LaunchPlan) -> Environments:
    return Environments(monkeypatch, plan)


def becomes(monkeypatch: pytest.MonkeyPatch, plan: LaunchPlan, **faults: Any) -> None:
    """The new environment's engine behaves so."""
    monkeypatch.setattr(command, "plan_on", lambda *_: behaving(plan, **faults))


def upgraded(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = run_words(["upgrade", "fake", "--python", "/envs/new", "--level", "quick", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def test_upgrade_under_load_costs_no_request(
    plan: LaunchPlan, there: Environments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Verified, compared, switched, nothing lost; the old environment stays until told, the answer names both."""
    becomes(monkeypatch, plan, drain=0.1)
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        before = pids(run)
        with load(plan) as traffic:
            status, envelope = upgraded(capsys)
        assert status == Exit.OK, envelope
        assert pids(run) != before
        assert (traffic.failed, traffic.wrong) == (0, 0)
        assert traffic.right > 0
        result = envelope["result"]
        assert (result["old"]["engine"], result["new"]["engine"]) == ("fake", "cpu-adopted")
        assert (result["vectors"], result["removed_old"]) == ("same", False)
        assert there.names == ["fake", "cpu-adopted"]
        assert json.loads(run.claim.plan.read_text())["env"] == dict(behaving(plan, drain=0.1).env)


def test_remove_old_is_said_to_be_done(
    plan: LaunchPlan, there: Environments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--remove-old` takes the old environment away after the switch, not before."""
    becomes(monkeypatch, plan, drain=0.1)
    with Supervised(plan) as run:
        run.reach(State.READY)
        status, envelope = upgraded(capsys, "--remove-old")
    assert (status, envelope["result"]["removed_old"]) == (Exit.OK, True)
    assert there.names == ["cpu-adopted"]


@pytest.mark.parametrize(
    ("faults", "exit_", "code"),
    [
        ({"last_words": "RuntimeError: no such thing"}, Exit.ENGINE, "engine_died"),
        ({"nan": True}, Exit.ENGINE, "engine_wrong_answer"),
        ({"shuffle": True}, Exit.ENGINE, "smoke_test_failed"),
        ({"salt": "another model"}, Exit.FAILED, "other_vectors"),
    ],
    ids=["does not start", "embeds NaN", "fails the smoke test", "embeds other vectors"],
)
def test_a_new_engine_that_is_no_good_changes_nothing(
    plan: LaunchPlan,
    there: Environments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: dict[str, Any],
    exit_: Exit,
    code: str,
) -> None:
    """Whatever is wrong with the new engine: the old one serves on, no request is lost, the new environment goes."""
    becomes(monkeypatch, plan, **faults)
    with Supervised(plan, SMOKE) as run:
        run.reach(State.READY)
        before = pids(run)
        with load(plan) as traffic:
            status, envelope = upgraded(capsys)
        assert (status, envelope["error"]["code"]) == (exit_, code), envelope
        assert pids(run) == before
        assert run.supervisor.record.state is State.READY
        assert (traffic.failed, traffic.wrong) == (0, 0)
        assert there.names == ["fake"]
        assert json.loads(run.claim.plan.read_text())["env"] == dict(plan.env)


def test_a_new_engine_that_does_not_verify_changes_nothing(
    plan: LaunchPlan, there: Environments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checks of a verification are asked, and one that fails ends it; `--keep-failed` keeps the environment."""
    becomes(monkeypatch, plan, ignore_dimensions=True)
    with Supervised(plan) as run:  # no smoke test, which would find it first
        run.reach(State.READY)
        before = pids(run)
        status, envelope = upgraded(capsys, "--keep-failed")
        assert (status, envelope["error"]["code"]) == (Exit.FAILED, "verify_failed")
        assert envelope["result"]["checks"]
        assert pids(run) == before
    assert there.names == ["fake", "cpu-adopted"]


@pytest.mark.parametrize(
    ("trouble", "exit_"),
    [
        (UnfitError("disk_full", "16 GB are needed", "free some"), Exit.UNFIT),
        (InvalidInputError("engine_version", "sglang 0.5.12 returns NaN", "take a later one"), Exit.INVALID),
    ],
)
def test_an_environment_that_cannot_be_made_changes_nothing(
    plan: LaunchPlan, there: Environments, capsys: pytest.CaptureFixture[str], trouble: Exception, exit_: Exit
) -> None:
    """No disk, or a release that is refused: said, before anything is started."""
    there.trouble = trouble
    with Supervised(plan) as run:
        run.reach(State.READY)
        before = pids(run)
        assert upgraded(capsys)[0] == exit_
        assert pids(run) == before
    assert there.names == ["fake"]


def test_a_plan_that_the_new_engine_cannot_take_is_refused(
    plan: LaunchPlan, there: Environments, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that the new release does not have: exit 2 before anything is started, and the environment goes."""

    def no_such_option(*_: object) -> LaunchPlan:
        raise InvalidInputError("unknown_flag", "no option --old-one", "leave it out")

    monkeypatch.setattr(command, "plan_on", no_such_option)
    with Supervised(plan) as run:
        run.reach(State.READY)
        status, envelope = upgraded(capsys)
    assert (status, envelope["error"]["code"]) == (Exit.INVALID, "unknown_flag")
    assert there.names == ["fake"]


def test_the_same_environment_is_no_upgrade(
    plan: LaunchPlan, there: Environments, capsys: pytest.CaptureFixture[str]
) -> None:
    """An instance that runs on it already is left alone; two ways to say which one is a mistake."""
    with Supervised(plan) as run:
        run.reach(State.READY)
        capsys.readouterr()
        assert run_words(["upgrade", "--engine", "fake", "--json"]) == Exit.INVALID
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "same_engine"
        assert run_words(["upgrade", "--engine", "fake", "--version", "0.5.23"]) == Exit.INVALID


SETTINGS = {
    "dtype": "bfloat16",
    "deadlines.probe": "12.5",
    "restart.limit": "9",
    "gateway.cache_mb": "16",
    "plugin": "false",
    "load-format": "auto",
    "env.EXAMPLE": "a b",
}


@pytest.mark.parametrize(
    ("profile", "overrides"),
    [
        *((profile, given) for profile in ("demo", "cpu", "rtx4090", "h100", "l4") for given in ({}, SETTINGS)),
        ("rtx4090", {"prefill_graph_sizes": "64,128"}),
    ],
)
def test_the_plan_made_again_is_the_same(profile: str, overrides: dict[str, str]) -> None:
    """From the plan on disk, for the same engine, comes the same plan: every setting of people is taken over."""
    asked = request(profile, overrides=overrides, name="mine", host="127.0.0.1", port=8123, engine_port=12345)
    first = planning.plan(asked)
    kept = planning.plan_from_dict(json.loads(json.dumps(planning.plan_to_dict(first))))
    repeated = planning.again(kept, asked.profile, asked.engine, engine_port=12345, ram_bytes=None)
    second = planning.plan(repeated)
    same = "argv env name host port gateway deadlines restart served_model_name replicas"
    for what in same.split():
        assert getattr(second, what) == getattr(first, what), what


def test_the_table_of_a_failed_verification_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """For people the failed checks are a table, whether the report comes as it is (`upgrade`) or out of an instance's
    record (`up --detach`)."""
    check = Check("norm", "Vectors have length 1", True, Verdict.FAIL, "1 ± 0.005", "0.5")
    report = Report("http://x/v1", "m", "quick", (check,), {}, 64, "bf16", 1.0, 1, "t", "2026-11-22T00:00:00Z")
    for result in (report, plain(report)):
        error = CheckFailedError("verify_failed", "the new engine does not verify")
        error.result = result
        show_checks(Console("upgrade"), error)
        shown = "".join(capsys.readouterr())
        assert "Vectors have length 1" in shown
        assert "FAIL" in shown
