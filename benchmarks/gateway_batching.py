"""Which rule for making calls keeps one engine busiest: a discrete-event model, the same on any machine.

    python benchmarks/gateway_batching.py [--clients 8,16,64,256] [--pass-ms 1.7 --item-ms 0.42] [--json]
    python benchmarks/gateway_batching.py --workers 1,2,4 --gateway-us 520 --calls 1,2,4 --rules part

An engine runs one pass at a time over all that waits (`pass-ms` plus `item-ms` a text: by default 4B on an H100,
33 tokens a text, fitted to docs/benchmarks/notes.md), its HTTP process and the gateway do one thing at a time, clients
ask again 0.3 ms after their answer. Rules: `half` sends a further call when half of the last one's texts wait; `part`,
which the gateway has, when its equal part of all texts about waits (qwen3emb_launch/gateway/batcher.py). With several
gateway workers each client belongs to one, as the kernel deals connections out, and calls are each worker's.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qwen3emb_launch.gateway.work import Level

WARM, MEASURED = 1_000.0, 4_000.0  # ms


@dataclass
class Costs:
    """Milliseconds of one thing."""

    pass_: float = 1.7
    item: float = 0.42
    single_in: float = 0.3  # a request of one text in the engine's HTTP process, and its answer
    single_out: float = 0.3
    call_in: float = 0.15  # a call from the gateway there, and each text of it
    call_text_in: float = 0.06
    call_text_out: float = 0.025
    gateway_in: float = 0.1  # a text in the gateway, in and out
    gateway_out: float = 0.1
    think: float = 0.3


@dataclass
class Worker:
    """One gateway process: texts that wait in it, and those of its calls in the air."""

    name: str
    waiting: int = 0
    air: list[int] = field(default_factory=list)
    last: int = 1
    level: Level = field(default_factory=Level)


@dataclass
class Model:
    """One run: `clients` against an engine alone (`calls` 0) or through a gateway."""

    clients: int
    calls: int
    rule: str
    costs: Costs
    workers: int = 1
    now: float = 0.0
    done: int = 0
    passes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._dice = random.Random(1)
        self._free: dict[str, float] = {}
        self._queue: list[tuple[int, Callable[[], None]]] = []  # texts and what follows, before the GPU
        self._running = False
        self._gateway = [Worker(f"gateway {number}") for number in range(self.workers)]

    def run(self) -> float:
        """Texts a second."""
        for _ in range(self.clients):
            worker = self._dice.choice(self._gateway)
            self._after(self._dice.random(), lambda w=worker: self._ask(w))  # type: ignore[misc]
        before: int | None = None
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            if before is None and self.now > WARM:
                before = self.done
            if self.now > WARM + MEASURED:
                break
            then()
        return (self.done - (before or 0)) / (MEASURED / 1000)

    def _after(self, pause: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + pause, next(self._order), then))

    def _work(self, who: str, cost: float, then: Callable[[], None]) -> None:
        """One thing after the other, a little longer or shorter each."""
        self._free[who] = max(self.now, self._free.get(who, 0.0)) + cost * self._dice.uniform(0.8, 1.3)
        self._after(self._free[who] - self.now, then)

    def _ask(self, worker: Worker) -> None:
        if self.calls:
            self._work(worker.name, self.costs.gateway_in, lambda: self._arrived(worker))
        else:
            self._work("http", self.costs.single_in, lambda: self._to_gpu(1, lambda: self._alone(worker)))

    def _alone(self, worker: Worker) -> None:
        self._work("http", self.costs.single_out, lambda: self._answered(worker))

    def _answered(self, worker: Worker) -> None:
        self.done += 1
        self._after(self.costs.think * self._dice.uniform(0.5, 1.5), lambda: self._ask(worker))

    def _to_gpu(self, texts: int, then: Callable[[], None]) -> None:
        self._queue.append((texts, then))
        self._pass()

    def _pass(self) -> None:
        if self._running or not self._queue:
            return
        batch, self._queue, self._running = self._queue[:128], self._queue[128:], True
        size = sum(texts for texts, _ in batch)
        self.passes.append(size)

        def over() -> None:
            self._running = False
            for _, then in batch:
                then()
            self._pass()

        self._after(self.costs.pass_ + self.costs.item * size, over)

    def _arrived(self, worker: Worker) -> None:
        worker.waiting += 1
        self._dispatch(worker)

    def _dispatch(self, worker: Worker) -> None:
        while worker.waiting and len(worker.air) < self.calls:
            about = worker.waiting + sum(worker.air)
            if self.rule == "half":
                size, needed = -(-about // self.calls), (worker.last + 1) // 2
            else:
                size = needed = -(-worker.level.see(about, self.now / 1000) // self.calls)
            if worker.air and worker.waiting < needed:
                return
            worker.last = texts = min(worker.waiting, max(4, size))
            worker.waiting -= texts
            worker.air.append(texts)
            self._call(worker, texts)

    def _call(self, worker: Worker, texts: int) -> None:
        cost = self.costs.call_in + self.costs.call_text_in * texts
        self._work("http", cost, lambda: self._to_gpu(texts, lambda: self._back(worker, texts)))

    def _back(self, worker: Worker, texts: int) -> None:
        def read() -> None:
            worker.air.remove(texts)
            self._dispatch(worker)
            for _ in range(texts):
                self._work(worker.name, self.costs.gateway_out, lambda: self._answered(worker))

        cost = 0.05 + self.costs.call_text_out * texts
        self._work("http", cost, lambda: self._work(worker.name, 0.03 + 0.015 * texts, read))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--clients", default="8,16,64,256")
    options.add_argument("--calls", default="2,4,8")
    options.add_argument("--pass-ms", type=float, default=Costs.pass_)
    options.add_argument("--item-ms", type=float, default=Costs.item)
    options.add_argument("--workers", default="1")
    options.add_argument("--rules", default="half,part")
    options.add_argument("--gateway-us", type=float, help="CPU of a text in the gateway, 0.4 of it on arrival")
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    costs = replace(Costs(), pass_=args.pass_ms, item=args.item_ms)
    if args.gateway_us:
        costs = replace(costs, gateway_in=0.4 * args.gateway_us / 1e3, gateway_out=0.6 * args.gateway_us / 1e3)
    columns = [
        (f"{rule}, {calls} calls" + (f", {workers} workers" if args.workers != "1" else ""), calls, rule, workers)
        for rule in args.rules.split(",") for workers in _numbers(args.workers) for calls in _numbers(args.calls)
    ]  # fmt: skip
    columns.insert(0, ("alone", 0, "", 1))
    rows = {
        n: {name: round(Model(n, calls, rule, costs, workers).run()) for name, calls, rule, workers in columns}
        for n in _numbers(args.clients)
    }
    if args.json:
        print(json.dumps({"costs": vars(costs), "texts_per_s": rows}))
        return
    print("| clients | " + " | ".join(name for name, *_ in columns) + " |\n|---" + "|---" * len(columns) + "|")
    for clients, row in rows.items():
        print(f"| {clients} | " + " | ".join(f"{v:,}" for v in row.values()) + " |")


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
