"""What others see of an instance: its record and events on disk, and whoever listens."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from qwen3emb_launch import __version__
from qwen3emb_launch.errors import LaunchError, UnfitError
from qwen3emb_launch.facts import LaunchPlan
from qwen3emb_launch.lifecycle import State, Transition
from qwen3emb_launch.state import Claim, InstanceRecord, identify
from qwen3emb_launch.up.events import Move
from qwen3emb_launch.up.member import Member
from qwen3emb_launch.up.runner import engine_spec
from qwen3emb_launch.up.verdict import kept


class Listener(Protocol):
    """Somebody who wants to know: the terminal, the service manager."""

    def moved(self, transition: Transition, record: InstanceRecord) -> None:
        """The instance changed its state."""

    def said(self, text: str) -> None:
        """Something worth a line."""

    def stage(self, text: str) -> None:
        """What a starting engine is busy with now."""


class Reporter:
    """Writes and tells; decides nothing. Called by the supervisor's deciding thread alone."""

    def __init__(self, plan: LaunchPlan, claim: Claim, listeners: Sequence[Listener], *, needs_key: bool) -> None:
        self._claim = claim
        self._listeners = tuple(listeners)
        self._unsaved = False
        self.record = InstanceRecord(
            name=plan.name,
            state=State.STARTING,
            reason="starting",
            supervisor=identify(os.getpid()),
            engines=(),
            profile=plan.profile,
            model=plan.model.name,
            served_model_name=plan.served_model_name,
            base_url=plan.base_url,
            engine_url=engine_spec(plan).url,
            max_dims=plan.max_dims,
            context_length=plan.context_length,
            started_at=time.time(),
            launcher=__version__,
            needs_key=needs_key,
        )

    def begin(self) -> None:
        """The first record. A disk that does not take it ends the start: raises UnfitError `state_unwritable`."""
        self._claim.write(self.record)

    def moved(self, after: State, reason: str) -> None:
        """The instance is in another state."""
        transition = Transition(self.record.name, self.record.state, after, reason, time.time())
        if after is State.READY and self.record.ready_at is None:
            self.record = replace(self.record, ready_at=transition.at)
        self.record = replace(self.record, state=after, reason=reason)
        self._save(lambda: self._claim.write(self.record))
        self._save(lambda: self._claim.append(transition))
        self._tell(lambda listener: listener.moved(transition, self.record))

    def unit_moved(self, member: Member, move: Move) -> None:
        """One of several processes is in another state: an event of its own."""
        transition = Transition(self.record.name, move.before, move.after, move.reason, time.time(), member.name)
        self._save(lambda: self._claim.append(transition))

    def publish(self, engines: Sequence[Member], others: Sequence[Member], error: LaunchError | None) -> None:
        """Write instance.json: `engines` are the instance's own, `others` the gateway and what is being replaced."""
        units = tuple(member.record() for member in (*engines, *others))
        first = engines[0].runner
        self.record = replace(
            self.record,
            engines=tuple(unit.process for unit in units if unit.kind == "engine" and unit.process),
            engine_url=first.url,
            restarts=sum(member.unit.restart_count for member in engines),
            log=str(first.log) if first.log else None,
            error=kept(error) if error else None,
            units=units,
        )
        self._save(lambda: self._claim.write(self.record))

    def say(self, text: str) -> None:
        """A line to every listener."""
        self._tell(lambda listener: listener.said(text))

    def stage(self, text: str) -> None:
        """What a start is busy with."""
        self._tell(lambda listener: listener.stage(text))

    def _save(self, write: Callable[[], None]) -> None:
        """A full disk must not end a service that works: it is said once, and the next write tries again."""
        try:
            write()
            self._unsaved = False
        except UnfitError as error:
            if not self._unsaved:
                self._unsaved = True
                self.say(f"state is not up to date: {error.message}")

    def _tell(self, say: Callable[[Listener], None]) -> None:
        """A terminal that went away must not end it either; rich leaves a broken pipe by SystemExit."""
        for listener in self._listeners:
            with suppress(OSError, SystemExit):
                say(listener)
