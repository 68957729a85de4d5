"""One fault against a serving instance under steady load, and the row that it gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from faults.instance import Instance, LateError
from faults.load import Load, Reference
from qwen3emb_launch.lifecycle import State
from qwen3emb_launch.state import ProcessId

STEADY = 5  # right answers before a fault, and after the recovery
ROOM = 2.0  # seconds that a recovery may take beyond the engine's own start
KILL_NOTICED = 1.0
PATIENCE = {"demo": 240.0, "fake": 40.0}  # until a fault is taken for one that is never survived
LEFTOVER_PATIENCE = 10.0


@dataclass(frozen=True)
class Row:
    """One line of the table. Seconds; None: does not apply. `misses` say what should have been otherwise.

    `sure` is when a hang was taken for one and ended, `period` how long that may take: the watchdog's. `reasons` are
    why requests failed.
    """

    fault: str
    sent: int = 0
    failed: int = 0
    wrong: int = 0
    gap: float | None = None
    noticed: float | None = None
    recovery: float | None = None
    start: float | None = None
    sure: float | None = None
    period: float | None = None
    seen: str = ""
    reasons: tuple[str, ...] = ()
    misses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """What a fault may cost at most, in seconds from the fault; `failed` requests, None for any number.

    `recovery` None: what it takes to notice for sure, the engine's own start, and ROOM. `period`: how long a hang may
    take to be acted upon, None for faults that the kernel tells.
    """

    noticed: float | None = KILL_NOTICED
    period: float | None = None
    recovery: float | None = None
    failed: int | None = None
    replaces: bool = True  # whether the engine must have been replaced


class Strike:
    """A fault in progress: what was the case before, when it happened, what came of it."""

    def __init__(self, instance: Instance, load: Load) -> None:
        self.instance, self.load = instance, load
        self.engine = instance.engine_processes()
        self.engines = instance.record.engines
        self.wall = time.time()
        self.begin = time.monotonic()

    @property
    def replaced(self) -> bool:
        """Whether another start of the engine serves now."""
        found = self.instance.found
        record = found.record if found else None
        if not found or not record or not found.running or record.state is not State.READY:
            return False
        return bool(record.engines) and record.engines != self.engines

    @property
    def noticed(self) -> bool:
        """Whether the instance has said that something is wrong."""
        return self.instance.state is not State.READY or self.replaced


def strike(
    instance: Instance, reference: Reference, fault: str, act: Callable[[], object], expect: Expectation,
    *, undo: Callable[[], object] = lambda: None,
) -> Row:  # fmt: skip
    """Load, fault, recovery, count. `undo` is called at the end, whatever came."""
    misses: list[str] = []
    timeout = PATIENCE[instance.setup.engine]
    noticed = recovery = None
    engine: dict[ProcessId, str] = {}
    load = instance.load(reference)
    with load:
        instance.until(lambda: load.right_since(0) >= STEADY, f"{fault}: the first answers", 60)
        hit = Strike(instance, load)
        engine = hit.engine
        try:
            act()
            if expect.noticed is not None:
                noticed = instance.until(lambda: hit.noticed, "notice", timeout)
            if expect.replaces:
                instance.until(lambda: hit.replaced, "recovery", timeout)
            recovery = time.monotonic() - hit.begin
            mark = time.monotonic()
            instance.until(lambda: load.right_since(mark) >= STEADY, "right answers again", 60)
        except LateError as error:
            misses.append(str(error))
        finally:
            undo()
    sure = restarting(instance, hit.wall) if expect.period else None
    if expect.period and instance.setup.judge_times and (sure is None or sure > expect.period):
        misses.append(f"taken for a hang after {sure} s, {expect.period:.1f} at most")
    instance.text = load.next_text
    tally = load.tally(hit.begin)
    if expect.replaces:
        misses += leftovers(instance, engine)
    misses += judge(expect, noticed, recovery if expect.replaces else None, instance)
    if tally.wrong:
        misses.append(f"{tally.wrong} wrong vectors")
    if expect.failed is not None and tally.failed > expect.failed:
        misses.append(f"{tally.failed} failed requests, {expect.failed} at most")
    return Row(
        fault=fault,
        sent=tally.sent,
        failed=tally.failed,
        wrong=tally.wrong,
        gap=tally.gap,
        noticed=noticed,
        recovery=recovery if expect.replaces else None,
        start=instance.start_seconds,
        sure=sure,
        period=expect.period,
        reasons=tally.reasons,
        seen=story(instance, hit.wall, tally.reasons),
        misses=tuple(misses),
    )


def restarting(instance: Instance, wall: float) -> float | None:
    """Seconds from `wall` until the instance gave its engine up, as its events say."""
    times = [e["at"] for e in instance.events_since(wall) if e["after"] == State.RESTARTING and not e.get("unit")]
    return times[0] - wall if times else None


def judge(expect: Expectation, noticed: float | None, recovery: float | None, instance: Instance) -> list[str]:
    """Times over their limits."""
    found: list[str] = []
    if not instance.setup.judge_times:
        return found
    if expect.noticed is not None and noticed is not None and noticed > expect.noticed:
        found.append(f"noticed after {noticed:.1f} s, {expect.noticed:.1f} at most")
    limit = (expect.noticed or 0.0) + instance.start_seconds + ROOM if expect.recovery is None else expect.recovery
    if recovery is not None and recovery > limit:
        found.append(f"served again after {recovery:.1f} s, {limit:.1f} at most")
    return found


def leftovers(instance: Instance, engine: dict[ProcessId, str]) -> list[str]:
    """Processes of the struck engine, or of nobody, that still live after a while."""
    end = time.monotonic() + LEFTOVER_PATIENCE
    while time.monotonic() < end:
        left = {w: c for w, c in engine.items() if w.alive} | instance.leftovers()
        if not left:
            return []
        time.sleep(0.05)
    return [f"orphan {who.pid}: {command[:60]}" for who, command in left.items()]


def story(instance: Instance, wall: float, reasons: tuple[str, ...]) -> str:
    """What `status` and the clients said, in one line."""
    mine = [e for e in instance.events_since(wall) if not e.get("unit") and e["after"] != State.STARTING]
    runs = [(text, len(list(same))) for text, same in groupby(f"{e['after']}: {e['reason']}" for e in mine)]
    said = " -> ".join(f"{text} ({count} times)" if count > 1 else text for text, count in runs)
    said = said or "nothing: it stayed ready"
    return f"{said}; clients: {', '.join(reasons)}" if reasons else said
