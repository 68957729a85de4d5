"""What the plugin's `ahead` gives: its own hooks in a model of the scheduler's overlap loop, the same on any machine.

    PYTHONPATH=engine_plugin ENGINE_PYTHON benchmarks/engine_ahead.py [--clients 1,16,64,256] [--item-ms 0.42] [--json]

One engine, texts of 33 tokens, clients who ask again when they are answered. A pass takes `pass-ms` plus `item-ms` a
text (by default the 4B in bfloat16 on a Hopper card, fitted to docs/benchmarks/notes.md; with fp8 about half). What the
scheduler's one thread does takes its time too: reading, batching, launching, answering. `away-ms` is how long an
answered client stays away, and `server-ms` what the one HTTP process does for a text; the defaults give what an H200's
host gave without the part (1,535 texts/s to 64 clients, 2,019 to 256). Time is counted, not measured.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from collections import deque
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from qwen3emb_engine_plugin.ahead import Ahead

TOKENS = 33


@dataclass
class Costs:
    """Milliseconds."""

    pass_: float = 1.7
    item: float = 0.42
    read: float = 0.1  # a request, from its socket to the queue
    batch: float = 1.5  # a batch made, and each text of it
    batch_item: float = 0.02
    launch: float = 1.0
    answer: float = 0.06  # a text's results
    server: float = 0.45  # a text in the HTTP process, in and out
    away: float = 6.0
    look: float = 0.01  # a look at the sockets, an event asked


@dataclass
class Model:
    """One run of the loop. `ahead` puts the plugin's hooks where SGLang has them."""

    clients: int
    ahead: bool
    costs: Costs = field(default_factory=Costs)
    most: int = 128
    now: float = 0.0
    done: int = 0
    busy: float = 0.0
    passes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._dice = random.Random(1)
        self._coming = [(self._dice.uniform(0, 0.02), client) for client in range(self.clients)]
        heapq.heapify(self._coming)
        self._http_free = self._gpu_free = 0.0
        self.result_queue: deque[tuple[list[Any], Any]] = deque()
        self.waiting_queue: list[Any] = []
        self.chunked_req = None
        self.request_receiver = SimpleNamespace(recv_requests=self._receive)
        self.server_args = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1)
        self.max_prefill_tokens, self.is_generation, self.enable_overlap = 16_384, False, True
        self._hooks = Ahead(lambda: self.now)

    def run(self, seconds: float = 4.0, warm: float = 1.0) -> float:
        """Texts a second, after `warm` seconds."""
        last: list[Any] | None = None
        before = 0
        while self.now < warm + seconds:
            if self.now < warm:
                before, self.busy = self.done, 0.0
            self._come_in(self._receive())
            batch, self.waiting_queue = self.waiting_queue[: self.most], self.waiting_queue[self.most :]
            if batch:
                self.result_queue.append((batch, self._launch(batch)))
            if last:
                self._results(*self.result_queue.popleft())
            elif not batch:
                self._spend(0.1)
            last = batch
        return (self.done - before) / seconds

    def _spend(self, milliseconds: float) -> None:
        self.now += milliseconds / 1000

    def _receive(self) -> list[Any]:
        self._spend(self.costs.look)
        found = []
        while self._coming and self._coming[0][0] <= self.now:
            found.append(SimpleNamespace(origin_input_ids=range(TOKENS), client=heapq.heappop(self._coming)[1]))
        return found

    def _read(self, _: Any, requests: list[Any]) -> None:
        for request in requests:
            self._spend(self.costs.read)
            self.waiting_queue.append(request)

    def _come_in(self, requests: list[Any]) -> None:
        if self.ahead:
            self._hooks.come_in(self._read, self, requests)
        else:
            self._read(self, requests)

    def _launch(self, batch: list[Any]) -> Any:
        self._spend(self.costs.batch + self.costs.batch_item * len(batch) + self.costs.launch)
        takes = (self.costs.pass_ + self.costs.item * len(batch)) / 1000 * self._dice.uniform(0.98, 1.02)
        ends = self._gpu_free = max(self.now, self._gpu_free) + takes
        self.busy += takes
        self.passes.append(len(batch))
        result = SimpleNamespace(copy_done=_Event(self, ends))
        if self.ahead:
            self._hooks.launched(result, self, SimpleNamespace(extend_num_tokens=TOKENS * len(batch)))
        return result

    def _results(self, batch: list[Any], result: Any) -> None:
        if self.ahead:
            self._hooks.wanted(self._answer, self, batch, result)
        else:
            self._answer(self, batch, result)

    def _answer(self, _: Any, batch: list[Any], result: Any) -> None:
        result.copy_done.synchronize()
        self._spend(self.costs.answer * len(batch))
        for request in batch:
            self._http_free = max(self.now, self._http_free) + self.costs.server / 1000
            away = self.costs.away * self._dice.uniform(0.5, 1.5) / 1000
            heapq.heappush(self._coming, (self._http_free + away, request.client))
        self.done += len(batch)


@dataclass
class _Event:
    """What the GPU says of a pass."""

    model: Model
    ends: float

    def query(self) -> bool:
        self.model._spend(self.model.costs.look)
        return self.model.now >= self.ends

    def synchronize(self) -> None:
        self.model.now = max(self.model.now, self.ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,16,64,256")
    parser.add_argument("--pass-ms", type=float, default=Costs.pass_)
    parser.add_argument("--item-ms", type=float, default=Costs.item)
    parser.add_argument("--server-ms", type=float, default=Costs.server)
    parser.add_argument("--away-ms", type=float, default=Costs.away)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    costs = replace(
        Costs(), pass_=options.pass_ms, item=options.item_ms, server=options.server_ms, away=options.away_ms
    )
    rows = {}
    for clients in map(int, options.clients.split(",")):
        for ahead in (False, True):
            model = Model(clients, ahead, costs)
            rate = model.run()
            rows[f"{clients}, {'ahead' if ahead else 'stock'}"] = {
                "texts_per_s": round(rate), "gpu_busy": round(model.busy / 4.0, 2),
                "texts_a_pass": round(sum(model.passes) / len(model.passes), 1),
            }  # fmt: skip
    if options.json:
        print(json.dumps({"costs": vars(costs), "rows": rows}))
        return
    print("| clients | texts/s | GPU busy | texts a pass |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['texts_per_s']:,} | {row['gpu_busy']:.0%} | {row['texts_a_pass']} |")


if __name__ == "__main__":
    main()
