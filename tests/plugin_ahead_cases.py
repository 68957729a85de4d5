"""The scheduler's loop that looks ahead, on a clock that is counted. Run by the engine environment's python."""
# ruff: noqa: PT009 - unittest: the engine environment has no pytest

from __future__ import annotations

import inspect
import random
import sys
import traceback
import unittest
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from qwen3emb_engine_plugin import ahead
from qwen3emb_engine_plugin.ahead import Ahead
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from serving_model import Costs, Model

TEXT = SimpleNamespace(origin_input_ids=range(33))
PASS, LAUNCH = 0.015, 0.0025  # of 32 texts


class Loop(unittest.TestCase):
    """One scheduler with a batch in the air: when does the hook let its loop go on?"""

    def setUp(self) -> None:
        self.now = 100.0
        self.arrivals: list[tuple[float, int]] = []  # when, how many texts
        self.ends = float("inf")
        self.hooks = Ahead(lambda: self.now)
        self.scheduler = SimpleNamespace(
            result_queue=[], waiting_queue=[], chunked_req=None, is_generation=False, enable_overlap=True,
            server_args=SimpleNamespace(tp_size=1, pp_size=1, dp_size=1),
            request_receiver=SimpleNamespace(recv_requests=self.receive),
        )  # fmt: skip

    def receive(self) -> list[Any]:
        found = [TEXT for when, texts in self.arrivals if when <= self.now for _ in range(texts)]
        self.arrivals = [(when, texts) for when, texts in self.arrivals if when > self.now]
        return found

    def query(self) -> bool:
        self.now += 1e-5
        self.assertLess(self.now, 110.0, "held for ever")
        return self.now >= self.ends

    def launch(self, texts: int) -> Any:
        self.hooks.come_in(self.read, self.scheduler, [TEXT] * texts)
        self.scheduler.waiting_queue.clear()
        self.now += LAUNCH
        result = SimpleNamespace(copy_done=SimpleNamespace(query=self.query, synchronize=lambda: None))
        self.hooks.launched(result, self.scheduler, SimpleNamespace(extend_num_tokens=33 * texts))
        self.scheduler.result_queue.append((None, result))
        return result

    def end(self, result: Any) -> None:
        self.scheduler.result_queue.remove((None, result))
        self.hooks.wanted(lambda *_: None, self.scheduler, None, result)

    def read(self, scheduler: Any, requests: list[Any]) -> None:
        scheduler.waiting_queue += requests

    def learn(self, texts: int = 32, seconds: float = PASS) -> None:
        for _ in range(3):
            result = self.launch(texts)
            self.now += seconds
            self.end(result)

    def waited(self) -> tuple[float, int]:
        """Seconds until the loop goes on, and the texts that wait for it then."""
        before = self.now
        self.hooks.come_in(self.read, self.scheduler, self.receive())
        return self.now - before, len(self.scheduler.waiting_queue)

    def test_nothing_is_held_while_nothing_runs(self) -> None:
        """A text for an idle engine goes at once."""
        self.arrivals = [(self.now, 1)]
        self.assertEqual(self.waited(), (0.0, 1))

    def test_a_batch_of_a_new_size_is_followed_at_once(self) -> None:
        """What a pass takes is not known yet: as soon as anything is there."""
        self.launch(32)
        self.arrivals = [(self.now + 0.004, 1)]
        seconds, texts = self.waited()
        self.assertEqual(texts, 1)
        self.assertAlmostEqual(seconds, 0.004, delta=0.0002)

    def test_half_a_batch_is_enough(self) -> None:
        """Not the first texts alone; the half, as soon as it is there."""
        self.learn()
        self.launch(32)
        self.arrivals = [(self.now + 0.001, 4), (self.now + 0.003, 11), (self.now + 0.005, 1), (self.now + 0.006, 9)]
        seconds, texts = self.waited()
        self.assertEqual(texts, 16)
        self.assertAlmostEqual(seconds, 0.005, delta=0.0002)

    def test_fewer_go_before_the_batch_ends(self) -> None:
        """In time to be launched, with the margin."""
        self.learn()
        self.launch(32)
        self.arrivals = [(self.now + 0.001, 2), (self.now + 0.002, 3)]
        seconds, texts = self.waited()
        self.assertEqual(texts, 5)
        self.assertAlmostEqual(seconds, PASS - max(LAUNCH + ahead.MARGIN, ahead.LAST * PASS), delta=0.0005)

    def test_a_batch_that_ends_sooner_ends_the_wait(self) -> None:
        """With or without anything that waits; the pace is learnt from it."""
        for arrivals in ([], [(0.001, 1)]):
            self.learn()
            result = self.launch(32)
            self.ends = self.now + 0.004
            self.arrivals = [(self.now + when, texts) for when, texts in arrivals]
            seconds, texts = self.waited()
            self.assertEqual(texts, len(arrivals))
            self.assertAlmostEqual(seconds, 0.004, delta=0.0002)
            self.assertFalse(hasattr(result, "_qwen3emb_ahead"))
            self.scheduler.result_queue.clear()
            self.scheduler.waiting_queue.clear()
            self.ends = float("inf")

    def test_short_passes_are_left_to_the_stock_loop(self) -> None:
        """Launching takes longer than they do."""
        self.learn(texts=1, seconds=0.003)
        self.launch(1)
        self.assertEqual(self.waited()[0], 0.0)

    def test_a_paused_or_leaving_engine_is_not_held(self) -> None:
        """Whoever pauses it waits for the loop."""
        for name in ("_engine_paused", "gracefully_exit"):
            self.launch(32)
            setattr(self.scheduler, name, True)
            self.assertLess(self.waited()[0], 0.001, name)
            setattr(self.scheduler, name, False)

    def test_a_pause_that_takes_the_results_itself(self) -> None:
        """`/pause_generation` with mode retract, read while a batch runs: SGLang takes that batch's results at once."""
        for texts in (32, 64):  # of a size that is known, and not
            self.learn()
            result = self.launch(texts)
            self.arrivals = [(self.now + 0.001, 1)]

            def pause(scheduler: Any, requests: list[Any], result: Any = result) -> None:
                if requests:
                    scheduler._engine_paused = True
                    self.ends = self.now
                    self.end(result)

            self.hooks.come_in(pause, self.scheduler, [])
            self.assertFalse(self.scheduler.result_queue)
            self.assertFalse(hasattr(result, "_qwen3emb_ahead"))
            self.scheduler._engine_paused, self.ends = False, float("inf")

    def test_the_rest_of_a_text_in_chunks_is_not_held(self) -> None:
        """It is in no queue, and nobody sends anything that would end the wait."""
        self.learn()
        self.launch(32)
        self.scheduler.chunked_req = TEXT
        self.assertEqual(self.waited()[0], 0.0)

    def test_a_long_queue_is_not_counted_to_its_end(self) -> None:
        """Half a batch is enough to know."""
        counted = []

        class Counted:
            @property
            def origin_input_ids(self) -> range:
                counted.append(self)
                return TEXT.origin_input_ids

        self.learn()
        self.launch(32)
        self.scheduler.waiting_queue = [Counted() for _ in range(5000)]
        self.assertLess(self.waited()[0], 0.0001)
        self.assertEqual(len(counted), 16)

    def test_other_servers_are_left_alone(self) -> None:
        """Generation, no overlap, several processes that have to look for requests together: no event is asked."""
        for change in (
            {"is_generation": True}, {"enable_overlap": False}, {"tp_size": 2}, {"pp_size": 2}, {"dp_size": 2},
        ):  # fmt: skip
            self.setUp()
            for name, value in change.items():
                setattr(self.scheduler if hasattr(self.scheduler, name) else self.scheduler.server_args, name, value)
            result = self.launch(32)
            self.assertEqual(self.waited()[0], 0.0, change)
            result.copy_done.synchronize = self.fail
            self.end(result)

    def test_it_fits_this_release(self) -> None:
        """The hooks are where the release's loop calls them."""
        self.addCleanup(HookRegistry.reset)
        self.assertIsNone(ahead.ahead())


class Engine:
    """What the release's own `event_loop_overlap` and `pause_generation` ask of a scheduler, on a counted clock."""

    def __init__(self, arrivals: list[tuple[float, Any]], now: float = 100.0) -> None:
        self.now, self.gpu_free = now, 0.0
        self.arrivals = deque(sorted(arrivals, key=lambda one: one[0]))
        self.texts = sum(not isinstance(one, str) for _, one in arrivals)
        self.answered: list[Any] = []
        self.hooks = Ahead(lambda: self.now)
        self.gracefully_exit = self._engine_paused = self.is_generation = False
        self.enable_overlap, self.last_batch, self.chunked_req = True, None, None
        self.waiting_queue: list[Any] = []
        self.running_batch = mock.Mock(reqs=[], **{"is_empty.return_value": True})
        self.server_args = SimpleNamespace(tp_size=1, pp_size=1, dp_size=1, enable_unified_memory=False)
        self.enable_unified_memory = False
        self.request_receiver = SimpleNamespace(recv_requests=self.receive)
        self.metrics_reporter, self.kv_events_publisher = (
            mock.Mock(current_scheduler_metrics_enabled=False),
            mock.Mock(),
        )
        self.disaggregation_mode = None
        self.is_disable_overlap_for_batch = lambda *_, **__: False
        self._apply_war_barrier = lambda: None
        self.plans = "plan.batch_to_run" in inspect.getsource(Scheduler.event_loop_overlap)  # from 0.5.16 on

    def spend(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 200.0, "it goes on for ever"

    def receive(self) -> list[Any]:
        self.spend(1e-5)
        found = []
        while self.arrivals and self.arrivals[0][0] <= self.now:
            found.append(self.arrivals.popleft()[1])
        return found

    def process_input_requests(self, requests: list[Any]) -> None:
        self.hooks.come_in(Engine.read, self, requests)

    def read(self, requests: list[Any]) -> None:
        for request in requests:
            self.spend(1e-4)
            if request == "abort":
                self.texts -= len(self.waiting_queue)
                self.waiting_queue.clear()
            elif request == "continue":
                self._engine_paused = False
            elif isinstance(request, str):
                Scheduler.pause_generation(self, SimpleNamespace(mode=request))
            else:
                self.waiting_queue.append(request)

    def get_next_batch_to_run(self, **_: Any) -> Any:
        taken, self.waiting_queue = self.waiting_queue[:32], self.waiting_queue[32:]
        batch = None
        if taken:
            batch = mock.Mock(reqs=taken, extend_num_tokens=sum(len(one.origin_input_ids) for one in taken))
            batch.is_empty.return_value = True  # once its texts are answered
            batch.copy.return_value = batch
        return SimpleNamespace(batch_to_run=batch, running_batch=self.running_batch) if self.plans else batch

    def run_batch(self, batch: Any) -> Any:
        self.spend(0.0005)
        ends = self.gpu_free = max(self.now, self.gpu_free) + 0.004 + PASS / 32 * len(batch.reqs)
        result = SimpleNamespace(copy_done=mock.Mock(query=lambda: self.spend(1e-5) or self.now >= ends))
        result.copy_done.synchronize = lambda: self.spend(max(0.0, ends - self.now))
        return self.hooks.launched(result, self, batch)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        self.hooks.wanted(Engine.answer, self, batch, result)

    def answer(self, batch: Any, result: Any) -> None:
        result.copy_done.synchronize()
        self.answered += batch.reqs

    def on_idle(self) -> None:
        self.spend(1e-4)
        self.gracefully_exit = not self.arrivals and not self.waiting_queue


class ReleasesLoop(unittest.TestCase):
    """The hooks where the installed release calls them, whatever comes and when."""

    def served(self, *controls: tuple[float, str], seed: int = 1, rate: float = 1500.0) -> Engine:
        dice, when, arrivals = random.Random(seed), 100.0, list[tuple[float, Any]]()
        for _ in range(600):
            when += dice.expovariate(rate)
            text = mock.Mock(origin_input_ids=range(dice.choice((5, 33, 33, 33, 400))))
            arrivals.append((when, text))
        engine = Engine([*arrivals, *((100.0 + when, control) for when, control in controls)])
        Scheduler.event_loop_overlap(engine)
        return engine

    def complete(self, engine: Engine) -> None:
        self.assertEqual(len(engine.answered), len({id(one) for one in engine.answered}), "answered twice")
        self.assertEqual(len(engine.answered), engine.texts)
        self.assertFalse(engine.result_queue)

    def test_each_text_is_answered_once(self) -> None:
        """Few and many at a time, the engine now idle, now behind; and it ends when it is told to."""
        for seed, rate in enumerate((30.0, 300.0, 1500.0, 6000.0)):
            self.complete(self.served(seed=seed, rate=rate))

    def test_pauses_and_aborts_lose_nothing_and_end_nothing(self) -> None:
        """Read while a batch is held, as most is: both kinds of pause, and all that waits aborted."""
        held = []

        def pause(engine: Engine, asked: Any) -> None:
            held.append(any(frame.name == "_while_it_runs" for frame in traceback.extract_stack()))
            stock(engine, asked)

        stock = Scheduler.pause_generation
        with mock.patch.object(Scheduler, "pause_generation", pause):
            for mode in ("in_place", "retract"):
                for step in range(20):
                    begin = 0.5 + 0.00093 * step
                    engine = self.served((begin, mode), (begin + 0.03, "continue"), (begin + 0.1, "abort"), rate=300.0)
                    self.assertGreater(len(engine.answered), 500)
                    self.complete(engine)
                self.assertTrue(any(held), mode)
                held.clear()


class Served(unittest.TestCase):
    """Many clients, in the model of the whole loop."""

    def test_it_fills_the_gaps_and_costs_nothing_where_there_are_none(self) -> None:
        """A GPU that waited for launches works on; one client, and one whose host is too slow anyway, see no change."""
        fp8, fast = {"item": 0.27}, {"single_in": 0.04, "single_out": 0.06, "batch": 2.5, "client": 0.2, "wire": 0.1}
        short = {"pass_": 1.2, "item": 0.23, **fast}
        for clients, workers, costs, least in (
            (1, 0, {}, 0.99), (16, 0, {}, 0.98), (64, 0, {}, 1.12), (256, 0, {}, 1.05),
            (1, 2, {}, 0.99), (16, 2, {}, 0.98), (64, 2, {}, 1.04), (256, 2, {}, 1.15), (256, 2, fp8, 1.18),
            (64, 2, fp8, 0.97), (64, 0, fast, 0.98), (256, 0, fast, 0.98), (4, 0, short, 0.97), (256, 0, short, 0.97),
        ):  # fmt: skip
            rates = [
                sum(Model(clients, Costs(**costs), workers, ahead=on, seed=seed).run(2.0, 0.5) for seed in (1, 2, 3))
                for on in (False, True)
            ]
            self.assertGreater(rates[1] / rates[0], least, (clients, workers, costs))


if __name__ == "__main__":
    unittest.main(verbosity=2)
