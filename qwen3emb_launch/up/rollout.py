"""Replacing an instance's engines one after the other while it serves; what it promises is in control.py.

Runs in a thread of its own: every change is made by the supervisor's deciding thread (`Supervisor.do`), every wait is
for a machine's state and ends when the instance does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwen3emb_launch.errors import EngineFailedError, InvalidInputError, LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.planning.beside import one_more
from qwen3emb_launch.planning.serialise import plan_text
from qwen3emb_launch.state import write_private
from qwen3emb_launch.up.control import Candidate, How, Replaced
from qwen3emb_launch.up.events import Begin, StopAsked
from qwen3emb_launch.up.machine import CHECK_TIMEOUT
from qwen3emb_launch.up.member import Member
from qwen3emb_launch.up.overall import SERVING
from qwen3emb_launch.up.room import free_bytes
from qwen3emb_launch.up.runner import EngineRunner, EngineSpec, engine_spec
from qwen3emb_launch.up.supervisor import Supervisor

JOIN_TIMEOUT = 60.0  # from the smoke test to the first traffic: one embedding, behind what the engine has
LAST_LOOK = 0.1  # between two looks at a state, where an event was missed


@dataclass(frozen=True)
class Order:
    """What was asked for. `plan` None: the present one again."""

    plan: LaunchPlan | None = None
    how: How = "auto"
    verify: bool = True


class Rollout:
    """One replacement of all engines. `say` gets a line a step; `confirm` raises LaunchError to refuse a candidate."""

    def __init__(
        self,
        supervisor: Supervisor,
        order: Order,
        say: Callable[[str], None],
        confirm: Callable[[Candidate], None] | None = None,
    ) -> None:
        self._supervisor = supervisor
        self._order = order
        self._say = say
        self._confirm = confirm

    def run(self) -> tuple[Replaced, ...]:
        """Replace them all. Raises what stopped it; everything is as before then, or as near to it as could be had."""
        supervisor, old_plan = self._supervisor, self._supervisor.plan
        plan = self._order.plan or old_plan
        self._check(plan)
        if plan is not old_plan:
            write_private(self._new_file, plan_text(plan))
        done: list[Replaced] = []
        try:
            for slot in range(len(supervisor.engines)):
                try:
                    done.append(self._replace(slot, plan))
                except LaunchError as error:
                    if self._order.plan and done:
                        self._take_back(len(done), old_plan, error)
                    raise
            if plan is not old_plan:
                self._adopt(plan)
        finally:
            self._new_file.unlink(missing_ok=True)
        return tuple(done)

    @property
    def _new_file(self) -> Path:
        """Where a new plan lies for its smoke test: the instance's plan.json is the old one's until the end."""
        return self._supervisor.claim.plan.with_name("plan.new.json")

    def _adopt(self, plan: LaunchPlan) -> None:
        """From now on this is the instance's plan."""
        supervisor = self._supervisor
        self._new_file.replace(supervisor.claim.plan)
        supervisor.plan = plan
        for engine in supervisor.engines:
            assert isinstance(engine.runner, EngineRunner)  # noqa: S101 - engines are replaced by engines
            engine.runner.plan_file = supervisor.claim.plan

    def _check(self, plan: LaunchPlan) -> None:
        supervisor = self._supervisor
        if supervisor.link is None:
            raise UnfitError(
                "no_gateway",
                f"{supervisor.plan.name} runs without the gateway: nothing could hold its requests meanwhile",
                f"qwen3emb down {supervisor.plan.name}, then qwen3emb up again",
            )
        if supervisor.record.ready_at is None or supervisor.ending:
            raise UnfitError(
                "not_ready",
                f"{supervisor.plan.name} is {supervisor.record.state}: only what serves is replaced",
                f"qwen3emb status {supervisor.plan.name}",
            )
        now = supervisor.plan
        for what in ("name", "served_model_name", "max_dims", "context_length", "host", "port", "replicas"):
            if getattr(plan, what) != getattr(now, what):
                raise InvalidInputError(
                    "other_service",
                    f"the new plan's {what} is {getattr(plan, what)!r}, the running one's {getattr(now, what)!r}",
                    "qwen3emb down, then qwen3emb up with the new one",
                )

    def _take_back(self, count: int, plan: LaunchPlan, because: LaunchError) -> None:
        """Engines that already run the new plan get the old one again. What fails here leaves the new one serving."""
        self._say(f"taken back: {because.message}")
        for slot in range(count):
            try:
                self._replace(slot, plan, taking_back=True)
            except LaunchError as error:
                self._say(f"{self._supervisor.engines[slot].name} could not be taken back: {error.message}")

    # ---- one engine -----------------------------------------------------------------------------------------------

    def _replace(self, slot: int, plan: LaunchPlan, *, taking_back: bool = False) -> Replaced:
        begin = time.monotonic()
        supervisor = self._supervisor
        old = supervisor.engines[slot]
        name, old_pid = old.name, old.unit.pid
        spec, why = self._way(plan, old)
        same = plan is supervisor.plan
        in_place = spec is None
        if in_place:
            self._say(f"{name}: in place ({why})")
            if sum(member.unit.state in SERVING for member in supervisor.engines if member is not old) == 0:
                hold = (plan.gateway or {}).get("hold")
                self._say(f"{name}: requests wait in the gateway until the new one serves, {hold} s at most")
            self._retire(old)
        else:
            self._say(f"{name}: a new one starts beside it ({why})")
        try:
            new = self._start(name, plan, spec or engine_spec(plan), proven=same and in_place)
            self._approve(new, None if in_place else old, ask=not taking_back)
        except LaunchError as error:
            if in_place and not same and not supervisor.ending:
                self._say(f"{name}: the new one failed, the old one is started again: {error.message}")
                self._enter(slot, self._start(name, supervisor.plan, engine_spec(supervisor.plan), proven=True))
            raise
        self._enter(slot, new)
        if not in_place:
            self._retire(old)
        self._say(f"{name}: replaced, pid {old_pid or 'none'} -> {new.unit.pid}")
        how = "in_place" if in_place else "beside"
        return Replaced(name, how, why, round(time.monotonic() - begin, 3), old_pid, new.unit.pid)

    def _way(self, plan: LaunchPlan, old: Member) -> tuple[EngineSpec | None, str]:
        """The new engine's command beside the old one, or None for its place; and why."""
        if self._order.how == "in_place":
            return None, "as asked"
        if old.ended:
            return engine_spec(plan), "the old one is not there any more"
        argv, why = one_more(plan, free_bytes(plan))
        if argv is None and self._order.how == "beside":
            raise UnfitError("no_room", f"{old.name}: no room for a second one: {why}", "qwen3emb restart --in-place")
        return (replace(engine_spec(plan), argv=argv) if argv is not None else None), why

    def _start(self, name: str, plan: LaunchPlan, spec: EngineSpec, *, proven: bool) -> Member:
        """A new engine, embedding and tested, without traffic. Raises what it failed with; nothing of it is left."""
        supervisor = self._supervisor
        new = supervisor.new_engine(name, plan, spec=spec.elsewhere(), check=self._order.verify, proven=proven)
        new.name = f"{name} (new)"
        new.held_back = True
        assert isinstance(new.runner, EngineRunner)  # noqa: S101 - for the type checker
        if plan is not supervisor.plan:
            new.runner.plan_file = self._new_file

        def begin() -> None:
            supervisor.others.append(new)
            supervisor.feed(new, Begin())

        supervisor.do(begin)
        deadlines = plan.deadlines
        patience = (deadlines.start + CHECK_TIMEOUT + deadlines.reap) * (plan.restart.limit + 1 if proven else 1)
        told = ""

        def started() -> bool:
            nonlocal told
            if new.stage != told:
                told = new.stage
                self._say(f"{name}: {told}")
            return new.unit.state is State.READY or new.ended

        self._await(started, f"{name} to start", patience)
        if new.unit.state is State.READY:
            return new
        self._forget(new)
        raise new.error or EngineFailedError("engine_died", f"{name}: {new.reason}", "qwen3emb logs")

    def _approve(self, new: Member, old: Member | None, *, ask: bool) -> None:
        """The caller's word on a tested engine, then the gateway's; without both it is killed."""
        assert isinstance(new.runner, EngineRunner)  # noqa: S101 - engines are replaced by engines
        try:
            if self._confirm and ask:
                there = old.runner if old and old.unit.state in SERVING else None
                old_key = there.key if isinstance(there, EngineRunner) else None
                self._confirm(
                    Candidate(new.name, new.runner.url, new.runner.key, there.url if there else None, old_key)
                )
            self._join(new)
        except LaunchError:
            self._kill(new)
            raise

    def _join(self, new: Member) -> None:
        """Traffic for it: not before the gateway has seen that its vectors are the same."""
        link = self._supervisor.link
        assert link is not None  # noqa: S101 - checked at the beginning
        if new.unit.state is not State.READY:
            raise new.error or EngineFailedError("engine_died", f"{new.name}: {new.reason}", "qwen3emb logs")
        self._hold_back(new, False)
        link.await_upstream(new.runner.url, JOIN_TIMEOUT, lambda: self._supervisor.ending)

    def _enter(self, slot: int, new: Member) -> None:
        """The new engine takes the old one's place among the instance's own."""
        supervisor = self._supervisor

        def swap() -> None:
            old = supervisor.engines[slot]
            supervisor.others.remove(new)
            new.name, old.name = old.name, f"{old.name} (old)"
            new.held_back = False
            supervisor.engines[slot] = new
            if not old.ended:
                supervisor.others.append(old)
            supervisor.settle(new)

        supervisor.do(swap)

    def _retire(self, old: Member) -> None:
        """Its requests are answered, then it is stopped; nothing of it is left."""
        link = self._supervisor.link
        assert link is not None  # noqa: S101 - checked at the beginning
        drained = True
        if old.unit.state in SERVING:
            try:
                drained = link.drain(old.runner.url, self._supervisor.plan.deadlines.drain)
            except LaunchError:
                drained = False  # the gateway restarts: it knows of no request any more, the engine may
        self._hold_back(old, True)
        self._stop(old, drain=not drained)

    def _kill(self, member: Member) -> None:
        if not self._supervisor.ending:
            self._hold_back(member, True)
            self._stop(member, drain=False)

    def _stop(self, member: Member, *, drain: bool) -> None:
        self._supervisor.do(lambda: self._supervisor.feed(member, StopAsked("replaced", drain=drain)))
        deadlines = self._supervisor.plan.deadlines
        self._await(lambda: member.ended, f"{member.name} to end", deadlines.drain + 2 * deadlines.reap)
        self._forget(member)

    def _forget(self, member: Member) -> None:
        def forget() -> None:
            member.runner.close()
            if member in self._supervisor.others:
                self._supervisor.others.remove(member)
            self._supervisor.publish()

        self._supervisor.do(forget)

    def _hold_back(self, member: Member, held: bool) -> None:
        def change() -> None:
            member.held_back = held
            self._supervisor.route()

        self._supervisor.do(change)

    def _await(self, condition: Callable[[], bool], what: str, timeout: float) -> None:
        """Raises UnfitError `stopping` when the instance ends first, EngineFailedError `too_late`."""
        supervisor = self._supervisor
        end = time.monotonic() + timeout
        while not condition():
            if supervisor.ending:
                raise UnfitError("stopping", f"{supervisor.plan.name} ends", f"qwen3emb logs {supervisor.plan.name}")
            if time.monotonic() > end:
                raise EngineFailedError("too_late", f"waited {timeout:g} s for {what}", "qwen3emb logs")
            with supervisor.changed:  # not held while a condition talks to somebody
                supervisor.changed.wait(LAST_LOOK)
