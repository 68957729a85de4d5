"""Clients, gateway workers and one engine as discrete events, the same on any machine. `serving_table.py` asks it.

Single-text clients ask again when they are answered. Each process does one thing at a time: the clients' four, the
gateway's workers, the engine's HTTP process, its scheduler. The scheduler's loop is SGLang's, stock or with the
plugin's own `ahead` hooks; the GPU pads a pass to the planner's graph sizes. `Costs` are fitted to what an H200 gave.

A rule for calls is `part`, the gateway's (a further call waits for its equal part of all texts about), or one that was
tried: `hold` (so does the first one, for up to a fifth of a call's usual time, where others are about), `all` (a call
takes all that waits, not its part) or `shared` (workers know of each other's texts and calls).
"""

from __future__ import annotations

import heapq
import random
import sys
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "engine_plugin")]
if find_spec("sglang") is None:  # the hooks need it only where they are registered
    stand_in: Any = ModuleType("sglang")
    stand_in.HookRegistry = stand_in.HookType = None
    for name in ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry"):
        sys.modules[name] = stand_in

from qwen3emb_engine_plugin.ahead import Ahead

from qwen3emb_launch.gateway.work import BatchLimits, Level
from qwen3emb_launch.planning.rules import FULL_GRAPH_SIZES

TOKENS = 33
SMALL_BATCH = 4  # as in the gateway's batcher
EXTRA_CALLS = 4
LIMITS = BatchLimits()
Then = Callable[[], None]


@dataclass
class Costs:
    """Milliseconds of one thing: the 4B on an H200."""

    pass_: float = 1.7  # the GPU's pass, and each 33 tokens of it
    item: float = 0.40
    batch: float = 5.0  # scheduler: a batch chosen, made and launched, and each text of it
    batch_item: float = 0.01
    read: float = 0.03  # a request, from its socket to the queue
    answer: float = 0.012  # a text's results
    look: float = 0.03  # a look at the sockets, an event asked
    single_in: float = 0.17  # HTTP process: a request of one text, and its answer as floats
    single_out: float = 0.25
    call_in: float = 0.25  # a call of the gateway, each text of it, and the answers
    text_in: float = 0.055
    call_out: float = 0.1
    text_out: float = 0.03
    gateway_in: float = 0.14  # gateway: a text, in and out
    gateway_out: float = 0.22
    make: float = 0.6  # a call made, and read
    back: float = 0.35
    client: float = 0.4  # an answer in a client process, and the next request
    wire: float = 0.17  # from one process to the other, until that one wakes


class Process:
    """It does one thing at a time, in rounds as an event loop does: what came during one is the next one."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._inbox: list[tuple[float, Then]] = []
        self._busy = False
        self.spent_ms = 0.0

    def give(self, cost: float, then: Then) -> None:
        self._inbox.append((cost, then))
        if not self._busy:
            self._round()

    def round_over(self) -> None:
        """What is done once for all that a round brought."""

    def _round(self) -> None:
        self._busy, at = True, self._model.now
        todo, self._inbox = self._inbox, []
        for cost, then in todo:
            took = cost * self._model.dice.uniform(0.7, 1.3)
            self.spent_ms += took
            at += took
            self._model.at(at, then)
        self._model.at(at, self._over)

    def _over(self) -> None:
        self.round_over()
        if self._inbox:
            self._round()
        else:
            self._busy = False


@dataclass(eq=False)
class Call:
    """Texts that travel together, of a gateway worker or of a client itself. `left` are not computed yet."""

    clients: list[int]
    worker: Worker | None
    began: float
    left: int


class Http(Process):
    """The engine's: what one round brought goes to the scheduler in one message."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._message: list[Any] = []

    def ask(self, call: Call) -> None:
        costs, model = self._model.costs, self._model
        texts = [SimpleNamespace(origin_input_ids=range(model.tokens()), call=call) for _ in call.clients]
        cost = costs.call_in + costs.text_in * len(texts) if call.worker else costs.single_in
        self.give(cost, partial(self._message.extend, texts))

    def round_over(self) -> None:
        if self._message:
            message = self._message.copy()
            self._message.clear()
            self._model.send(partial(self._model.inbox.extend, message))

    def answered(self, batch: list[Any]) -> None:
        costs, model = self._model.costs, self._model
        for text in batch:
            call = text.call
            call.left -= 1
            if call.left:
                continue
            if call.worker:
                cost = costs.call_out + costs.text_out * len(call.clients)
                self.give(cost, partial(model.send, partial(call.worker.came_back, call)))
            else:
                self.give(costs.single_out, partial(model.send, partial(model.answered, call.clients[0])))


class Worker(Process):
    """One gateway process: texts that wait in it, and its calls in the air."""

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.waiting: list[tuple[float, int]] = []
        self.air: list[Call] = []
        self.sizes: list[int] = []
        self._level = Level()
        self._usual = 0.0
        self._timer = False

    def ask(self, client: int) -> None:
        self.give(self._model.costs.gateway_in, lambda: self.waiting.append((self._model.now, client)))

    def round_over(self) -> None:
        self.dispatch()

    def dispatch(self) -> None:
        while self.waiting and (texts := self._worth()):
            taken, self.waiting = self.waiting[:texts], self.waiting[texts:]
            model = self._model
            call = Call([client for _, client in taken], self, model.now, len(taken))
            self.air.append(call)
            self.sizes.append(len(taken))
            self.give(model.costs.make, partial(model.send, partial(model.http.ask, call)))

    def _worth(self) -> int:
        """Texts of the call that may go now, as `Batcher._dispatch_kind` and `WaitingRoom.part` decide; 0 for none."""
        model, rule = self._model, self._model.rule
        who, level = (model.workers, model.level) if rule == "shared" else ([self], self._level)
        about = sum(len(w.waiting) + sum(len(c.clients) for c in w.air) for w in who)
        part = min(LIMITS.items, -(-level.see(about, model.now / 1000) // model.calls))
        due = self.waiting[0][0] + max(1000 * LIMITS.wait, self._usual) - model.now
        air, enough = sum(len(w.air) for w in who), len(self.waiting) >= part
        if air >= model.calls + (0 if due > 0 else EXTRA_CALLS) or (due > 0 and air and not enough):
            if due > 0:
                self._look_again_in(2.0 if rule == "shared" else due)
            return 0
        held = self.waiting[0][0] + 0.2 * self._usual - model.now
        if rule == "hold" and not air and not enough and held > 1e-6:
            self._look_again_in(held)
            return 0
        return LIMITS.items if rule == "all" else max(part, SMALL_BATCH)

    def _look_again_in(self, pause: float) -> None:
        if not self._timer:
            self._timer = True
            self._model.at(self._model.now + pause, self._woken)

    def _woken(self) -> None:
        self._timer = False
        self.dispatch()

    def came_back(self, call: Call) -> None:
        self.give(self._model.costs.back, partial(self._read, call))

    def _read(self, call: Call) -> None:
        model = self._model
        self.air.remove(call)
        self.dispatch()  # the engine first
        self._usual += (model.now - call.began - self._usual) / 8
        for client in call.clients:
            self.give(model.costs.gateway_out, partial(model.send, partial(model.answered, client)))


class Model:
    """One run. The scheduler's loop drives the clock, everybody else's events happen meanwhile; the hooks take the
    model itself for a scheduler."""

    def __init__(
        self, clients: int, costs: Costs | None = None, workers: int = 0, *, ahead: bool = True, calls: int = 4,
        rule: str = "part", spread: int = 0, graphs: tuple[int, ...] = FULL_GRAPH_SIZES, overlap: bool = True,
        seed: int = 1,
    ) -> None:  # fmt: skip
        self.costs, self.calls, self.rule = costs or Costs(), calls, rule
        self._ahead, self._spread, self._graphs = ahead, spread, graphs
        self.now, self.dice, self.level = 0.0, random.Random(seed), Level()
        self._events: list[tuple[float, int, Then]] = []
        self._order = count()
        self.http = Http(self)
        self.workers = [Worker(self) for _ in range(workers)]
        self.processes = [Process(self) for _ in range(4)]
        self._worker_of = [self.dice.choice(self.workers) if workers else None for _ in range(clients)]
        self._asked = [0.0] * clients
        for client in range(clients):
            self.at(self.dice.uniform(0, 20), partial(self._ask, client))
        self.inbox: list[Any] = []
        self.result_queue: deque[tuple[list[Any], Any]] = deque()
        self.waiting_queue: list[Any] = []
        self.chunked_req = None
        self.request_receiver = SimpleNamespace(recv_requests=self._receive)
        self.server_args = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1)
        self.is_generation, self.enable_overlap = False, overlap
        self._gpu_free, self._hooks = 0.0, Ahead(lambda: self.now / 1000)
        self._forget()

    def _forget(self) -> None:
        self.gpu_ms = self.scheduler_ms = 0.0
        self.passes: list[int] = []
        self.latencies: list[float] = []
        for process in (self.http, *self.workers, *self.processes):
            process.spent_ms = 0.0
        for worker in self.workers:
            worker.sizes.clear()

    def run(self, seconds: float = 3.0, warm: float = 1.0) -> float:
        """Texts a second, after `warm` seconds."""
        self._loop_until(1000 * warm)
        self._forget()
        self._loop_until(1000 * (warm + seconds))
        return len(self.latencies) / seconds

    # -- the clock and the clients

    def at(self, when: float, then: Then) -> None:
        heapq.heappush(self._events, (when, next(self._order), then))

    def send(self, then: Then) -> None:
        self.at(self.now + self.costs.wire, then)

    def tokens(self) -> int:
        return TOKENS + self.dice.randint(-self._spread, self._spread)

    def _ask(self, client: int) -> None:
        self._asked[client] = self.now
        if worker := self._worker_of[client]:
            self.send(partial(worker.ask, client))
        else:
            self.send(partial(self.http.ask, Call([client], None, self.now, 1)))

    def answered(self, client: int) -> None:
        self.latencies.append(self.now - self._asked[client])
        self.processes[client % len(self.processes)].give(self.costs.client, partial(self._ask, client))

    def until(self, when: float) -> None:
        """The clock goes on, and with it everybody but the scheduler."""
        while self._events and self._events[0][0] <= when:
            self.now, _, then = heapq.heappop(self._events)
            then()
        self.now = max(self.now, when)

    def _spend(self, milliseconds: float) -> None:
        self.scheduler_ms += milliseconds
        self.until(self.now + milliseconds)

    # -- the scheduler

    def _loop_until(self, end: float) -> None:
        last: list[Any] = [] if not self.result_queue else self.result_queue[-1][0]
        while self.now < end:
            self._hooked(self._hooks.come_in, self._read, self._receive())
            batch, self.waiting_queue = self.waiting_queue[:128], self.waiting_queue[128:]
            if batch:
                self.result_queue.append((batch, self._launch(batch)))
            if last if self.enable_overlap else batch:
                self._hooked(self._hooks.wanted, self._answer, *self.result_queue.popleft())
            elif not batch:
                self.until(self.now + 0.05)
            last = batch

    def _hooked(self, hook: Callable[..., Any], original: Callable[..., Any], *given: Any) -> None:
        if self._ahead:
            hook(original, self, *given)
        else:
            original(self, *given)

    def _receive(self) -> list[Any]:
        self.until(self.now + self.costs.look)
        found = self.inbox.copy()
        self.inbox.clear()
        return found

    def _read(self, _: Any, requests: list[Any]) -> None:
        self._spend(self.costs.read * len(requests))
        self.waiting_queue += requests

    def _launch(self, batch: list[Any]) -> Any:
        self._spend(self.costs.batch + self.costs.batch_item * len(batch))
        tokens = padded = sum(len(text.origin_input_ids) for text in batch)
        if self._graphs and tokens <= self._graphs[-1]:
            padded = self._graphs[bisect_left(self._graphs, tokens)]
        takes = (self.costs.pass_ + self.costs.item * padded / TOKENS) * self.dice.uniform(0.98, 1.02)
        ends = self._gpu_free = max(self.now, self._gpu_free) + takes
        self.gpu_ms += takes
        self.passes.append(len(batch))
        event = SimpleNamespace(query=partial(self._is_over, ends), synchronize=partial(self.until, ends))
        result = SimpleNamespace(copy_done=event)
        if self._ahead:
            self._hooks.launched(result, self, SimpleNamespace(extend_num_tokens=tokens))
        return result

    def _is_over(self, ends: float) -> bool:
        self.until(self.now + self.costs.look)
        return self.now >= ends

    def _answer(self, _: Any, batch: list[Any], result: Any) -> None:
        result.copy_done.synchronize()
        self._spend(self.costs.answer * len(batch))
        self.send(partial(self.http.answered, batch))
