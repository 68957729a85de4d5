"""One load-generating process: reads a spec from its stdin, sends the load, streams what happened to its stdout.

    parent -> worker   one line, the spec as JSON; then `{"start": seconds of the monotonic clock}`; then `stop`, or EOF
    worker -> parent   JSON lines: `ready`, `samples` (columns as base64 arrays), `phase`, `end`

EOF stops it too, so that no worker outlives its parent. Standard library only; see `answers` for orjson.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import random
import resource
import signal
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3emb_launch.bench.answers import AnswerChecker
from qwen3emb_launch.bench.connection import Connection, Target
from qwen3emb_launch.bench.spec import LoadSpec, Phase
from qwen3emb_launch.bench.texts import source_of
from qwen3emb_launch.bench.timer import PreciseTimer

REPORT_EVERY = 0.5  # seconds between two batches of samples, and the resolution of the event-loop lag
SWEEP_EVERY = 0.25  # seconds between two looks for requests past their deadline
RETRY_AFTER = 0.1  # seconds a closed-loop client waits after a failed connection: a dead server is not hammered
OTHER_FILES = 64  # that a worker has open beside its connections

Emit = Callable[[dict[str, Any]], None]


class Samples:
    """Columns of finished requests since the last report. Times are seconds since the start of the load."""

    def __init__(self) -> None:
        self.kinds: dict[str, int] = {"": 0}
        self.details: dict[str, str] = {}
        self.clear()

    def clear(self) -> None:
        """Empty the columns; kinds keep their numbers."""
        self.scheduled, self.sent, self.done = array("d"), array("d"), array("d")
        self.tokens, self.kind = array("l"), array("h")

    def add(self, scheduled: float, sent: float, done: float, tokens: int, kind: str, detail: str) -> None:
        """One request. `tokens` is -1 where the endpoint did not count."""
        number = self.kinds.get(kind)
        if number is None:
            number = self.kinds[kind] = len(self.kinds)
            self.details[kind] = detail
        self.scheduled.append(scheduled)
        self.sent.append(sent)
        self.done.append(done)
        self.tokens.append(tokens)
        self.kind.append(number)

    def take(self) -> dict[str, Any]:
        """The columns as one event, and empty them."""
        event: dict[str, Any] = {"event": "samples", "kinds": list(self.kinds)}
        for name in ("scheduled", "sent", "done", "tokens", "kind"):
            column = getattr(self, name)
            event[name] = base64.b64encode(column.tobytes()).decode("ascii")
        self.clear()
        return event


class Load:
    """Runs the phases of one spec on one event loop."""

    def __init__(self, spec: LoadSpec, loop: asyncio.AbstractEventLoop, emit: Emit) -> None:
        headers = dict(spec.headers)
        if spec.api_key:
            headers["Authorization"] = f"Bearer {spec.api_key}"
        self._target = Target.of(spec.url, "/embeddings", headers, spec.verify_tls)
        self._texts = source_of(spec)
        self._checker = AnswerChecker(spec.batch, spec.dims, spec.unit_norm)
        wanted: dict[str, Any] = {"model": spec.model, "encoding_format": spec.encoding}
        if spec.dims is not None:
            wanted["dimensions"] = spec.dims
        self._head = json.dumps(wanted)[:-1].encode() + b', "input": '
        self._spec = spec
        self._loop = loop
        self._emit = emit
        self._samples = Samples()
        self._random = random.Random(spec.seed)  # noqa: S311 - arrival times
        self._connections: list[Connection] = []
        self._idle: list[Connection] = []
        self._backlog: deque[float] = deque()
        self._active = 0
        self._level = 0.0
        self._phase_end = 0.0
        self._counting = False
        self._left = spec.requests
        self._texts_taken = 0
        self._sent = 0
        self._abandoned = 0
        self._stopping = False
        self._stopped = asyncio.Event()
        self._lag = 0.0

    def stop(self) -> None:
        """Send nothing more; what is on its way is awaited until the drain time is over."""
        self._stopping = True
        self._abandoned += len(self._backlog)
        self._backlog.clear()
        self._stopped.set()

    async def run(self, start: float) -> None:
        """The whole load, beginning at `start` on the monotonic clock."""
        self._start = start
        await self._until(start)
        ticker = self._loop.create_task(self._tick())
        timer = PreciseTimer(self._loop, self._arrivals) if self._spec.shape == "open" else None
        self._timer = timer
        end = start
        for phase in self._spec.phases:
            if self._stopping:
                break
            end += phase.seconds
            await self._phase(phase, end)
        self.stop()
        if timer:
            timer.close()
        await self._drained(self._loop.time() + self._spec.drain)
        ticker.cancel()
        self._finish()

    async def _phase(self, phase: Phase, end: float) -> None:
        began, cpu = self._loop.time(), time.process_time()
        self._level, self._phase_end, self._counting = phase.level, end, phase.measured
        if self._spec.shape == "open":
            self._next_arrival = began
            self._schedule_next()
        else:
            self._fill()
        await self._until(end)
        now = self._loop.time()
        self._emit(
            {
                "event": "phase",
                "name": phase.name,
                "measured": phase.measured,
                "began": began - self._start,
                "ended": now - self._start,
                "cpu": time.process_time() - cpu,
            }
        )

    async def _until(self, moment: float) -> None:
        """Sleep until `moment`, or until the load is stopped."""
        try:
            async with asyncio.timeout_at(moment):
                await self._stopped.wait()
        except TimeoutError:
            return

    def _fill(self) -> None:
        """Closed loop: start clients up to the level."""
        while self._active < self._level and not self._stopping:
            self._active += 1
            self._issue(self._connection(), self._loop.time())

    def _schedule_next(self) -> None:
        """Open loop: draw the next arrival; one past the phase's end is left to the next phase (no memory is lost)."""
        assert self._timer is not None  # noqa: S101 - open loops have one
        if self._level <= 0:
            return
        self._next_arrival += self._random.expovariate(self._level)
        if self._next_arrival < self._phase_end:
            self._timer.arm(self._next_arrival)

    def _arrivals(self) -> None:
        """Open loop: everything due now is sent, or waits for a free connection with its clock running."""
        while not self._stopping and self._next_arrival <= self._loop.time():
            due = self._next_arrival
            if self._idle or len(self._connections) < self._spec.max_in_flight:
                self._issue(self._connection(), due)
            else:
                self._backlog.append(due)
            before = due
            self._schedule_next()
            if self._next_arrival >= self._phase_end or self._next_arrival == before:
                return

    def _connection(self) -> Connection:
        if self._idle:
            return self._idle.pop()
        connection = Connection(self._target, self._loop)
        self._connections.append(connection)
        return connection

    def _issue(self, connection: Connection, scheduled: float) -> None:
        """Send one request whose clock started at `scheduled`."""
        if self._counting and self._left is not None:
            if self._left <= 0:
                self._free(connection)
                self.stop()
                return
            self._left -= 1
        batch = self._spec.batch
        take = self._texts.next
        body = take() if batch == 1 else b"[" + b",".join([take() for _ in range(batch)]) + b"]"
        self._texts_taken += batch
        data = self._target.request(self._head + body + b"}")
        sent = self._loop.time()
        self._sent += 1

        def done(status: int, answer: bytes, failure: str) -> None:
            ended = self._loop.time()
            self._next(connection, failure)  # the next request goes out before this answer is checked
            if failure:
                kind, tokens, detail = failure, -1, answer.decode("utf-8", "replace")
            else:
                kind, tokens, detail = self._checker.check(status, answer)
            start = self._start
            self._samples.add(scheduled - start, sent - start, ended - start, tokens, kind, detail)

        connection.send(data, done, sent + self._spec.timeout)

    def _next(self, connection: Connection, failure: str) -> None:
        """A connection is free: give it what is to be sent next."""
        if self._stopping:
            self._free(connection)
        elif self._spec.shape == "open":
            late = self._loop.time() - self._spec.timeout
            while self._backlog and self._backlog[0] < late:
                self._expired(self._backlog.popleft())
            if self._backlog:
                self._issue(connection, self._backlog.popleft())
            else:
                self._free(connection)
        elif self._active > self._level:
            self._active -= 1
            self._free(connection)
        elif failure in ("connect", "reset"):
            self._loop.call_later(RETRY_AFTER, self._again, connection)
        else:
            self._issue(connection, self._loop.time())

    def _again(self, connection: Connection) -> None:
        if self._stopping:
            self._free(connection)
        else:
            self._issue(connection, self._loop.time())

    def _free(self, connection: Connection) -> None:
        self._idle.append(connection)

    def _expired(self, scheduled: float) -> None:
        """An arrival that waited in the client longer than a request may take."""
        since = scheduled - self._start
        now = self._loop.time() - self._start
        self._samples.add(since, now, now, -1, "timeout", "waited in the client for a free connection")

    async def _drained(self, deadline: float) -> None:
        while len(self._idle) < len(self._connections) and self._loop.time() < deadline:
            await asyncio.sleep(0.005)

    async def _tick(self) -> None:
        """Expire overdue requests, report samples, and see how late the loop is."""
        reported = self._loop.time()
        while True:
            before = self._loop.time()
            await asyncio.sleep(SWEEP_EVERY)
            now = self._loop.time()
            self._lag = max(self._lag, now - before - SWEEP_EVERY)
            for connection in self._connections:
                if connection.busy and connection.deadline < now:
                    connection.expire()
            if now - reported >= REPORT_EVERY:
                reported = now
                self._emit(self._samples.take())

    def _finish(self) -> None:
        """Report the rest. Requests still on their way, or never sent for want of a connection, are `unfinished`."""
        unfinished = sum(c.busy for c in self._connections) + self._abandoned
        for connection in self._connections:
            connection.close()
        self._emit(self._samples.take())
        self._emit(
            {
                "event": "end",
                "sent": self._sent,
                "unfinished": unfinished,
                "texts_taken": self._texts_taken,
                "reopened": sum(c.reopened for c in self._connections),
                "connections": len(self._connections),
                "dims": self._checker.dims,
                "wire": self._checker.wire,
                "details": self._samples.details,
                "lag": self._lag,
                "peak_rss": peak_rss(),
            }
        )


def peak_rss() -> int:
    """Most resident bytes of this process. getrusage would count what the parent had when it forked."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allow_connections(spec: LoadSpec) -> None:
    """A file each: without one a connection fails, and the endpoint would be blamed for it. Raises ValueError."""
    clients = int(max((p.level for p in spec.phases), default=1))
    wanted = OTHER_FILES + (spec.max_in_flight if spec.shape == "open" else clients)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if most < wanted and spec.shape == "closed":
        raise ValueError(
            f"{clients} clients in one process need {wanted} open files, and it may have {hard} (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def emit(event: dict[str, Any]) -> None:
    """One event to the parent."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


async def _serve(spec: LoadSpec, lines: Any) -> None:
    loop = asyncio.get_running_loop()
    load = Load(spec, loop, emit)
    emit({"event": "ready"})
    start = json.loads(lines.readline() or "{}").get("start")
    if start is None:  # the parent is gone
        return

    def told() -> None:  # `stop`, or end of file
        loop.remove_reader(lines.fileno())
        load.stop()

    loop.add_reader(lines.fileno(), told)
    await load.run(float(start))
    loop.remove_reader(lines.fileno())


def main() -> None:
    """Run one worker. A bad spec is reported as a `failed` event and exit status 2."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    lines = os.fdopen(os.dup(0), "rb", buffering=0)
    try:
        spec = LoadSpec.from_dict(json.loads(lines.readline()))
        allow_connections(spec)
        gc.collect()
        gc.freeze()
        asyncio.run(_serve(spec, lines))
    except (ValueError, TypeError, OSError) as exc:
        emit({"event": "failed", "message": f"{type(exc).__name__}: {exc}"})
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
