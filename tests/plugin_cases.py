"""The engine plugin's own decisions, without a server. Run by the engine environment's python (see test_plugin.py)."""
# ruff: noqa: PT009, PT027 - unittest: the engine environment has no pytest

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from fastapi import HTTPException
from qwen3emb_engine_plugin import (
    asked,
    cpu_pass,
    graph_inputs,
    housekeeping,
    prefill_graph,
    serve,
    switches,
    template,
)
from qwen3emb_engine_plugin.answer import AnswerWriter
from qwen3emb_engine_plugin.asked import Asked
from qwen3emb_engine_plugin.engine_calls import EngineCalls, NotPlainError
from qwen3emb_engine_plugin.housekeeping import FreedTogether, IdleRounds, Snapshots
from qwen3emb_engine_plugin.route import PATH, EmbeddingsRoute
from qwen3emb_engine_plugin.tokens import PROBES, encoder
from qwen3emb_engine_plugin.unsampled import Unsampled
from sglang.srt.plugins.hook_registry import HookRegistry
from starlette.responses import JSONResponse
from starlette.routing import Match

USAGE = {"prompt_tokens": 0, "total_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": None}

QWEN3 = {"architectures": ["Qwen3ForCausalLM"]}


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


class Serving(unittest.TestCase):
    def test_the_checkpoint_is_read_where_the_model_is_named(self) -> None:
        """As one word or two; of anything unreadable nothing is known, and nothing is left out then."""
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(QWEN3))
            self.assertEqual(serve.checkpoint(["--port", "1", "--model-path", folder]), QWEN3)
            self.assertEqual(serve.checkpoint([f"--model-path={folder}"]), QWEN3)
            self.assertEqual(serve.checkpoint(["--model", folder]), QWEN3)
            for broken in ("", "[]", "3", "{}"):
                Path(folder, "config.json").write_text(broken)
                self.assertEqual(serve.checkpoint(["--model-path", folder]), {}, broken)
        self.assertEqual(serve.checkpoint(["--model-path", "Qwen/Qwen3-Embedding-4B"]), {})
        self.assertEqual(serve.checkpoint(["--model-path"]), {})
        self.assertEqual(serve.checkpoint([]), {})

    def test_only_the_classes_of_qwen3_are_let_in(self) -> None:
        """For its own checkpoints, through SGLang's own list; a list somebody set stays."""
        for config, let_in in (({"architectures": ["LlamaForCausalLM"]}, False), ({}, False), (QWEN3, True)):
            with mock.patch.dict(os.environ):
                os.environ.pop(serve.DISABLED, None)
                serve.leave_out_models(config)
                out = set(filter(None, os.environ.get(serve.DISABLED, "").split(",")))
                self.assertEqual("llama" in out, let_in)
                self.assertFalse(out & {"qwen3", "qwen2", "registry"})
        with mock.patch.dict(os.environ, {serve.DISABLED: "llama"}):
            serve.leave_out_models(QWEN3)
            self.assertEqual(os.environ[serve.DISABLED], "llama")

    def test_sglang_s_own_list_of_plugins_holds(self) -> None:
        """Before SGLang reads it."""
        for value, wanted in (("", True), ("qwen3emb", True), ("other, qwen3emb", True), ("none", False)):
            with mock.patch.dict(os.environ, {"SGLANG_PLUGINS": value}):
                self.assertEqual(serve.chosen(), wanted, value)

    def test_a_target_sees_the_environment_of_its_start(self) -> None:
        """Not that of the template, which is older."""
        with mock.patch.dict(os.environ, {"QWEN3EMB_CASE": "at start"}):
            with mock.patch.object(template.forkserver._forkserver, "_forkserver_pid", os.getppid()):
                target = template.InEnvironment(os.getenv)
            os.environ["QWEN3EMB_CASE"] = "later"
            os.environ["QWEN3EMB_LATER"] = "1"
            with mock.patch.object(template, "_dies_with", return_value=True):
                self.assertEqual(target("QWEN3EMB_CASE"), "at start")
            self.assertNotIn("QWEN3EMB_LATER", os.environ)

    def test_a_process_comes_from_the_template_and_dies_with_the_main_one(self) -> None:
        """Forked, not spawned; with the arguments and the environment it was given; none is left after SIGKILL."""
        code = (
            "import multiprocessing, os, sys, time, plugin_template_case as case\n"
            "from qwen3emb_engine_plugin import template\n"
            "assert template.start(modules=['plugin_template_case']) is None\n"
            "template.use()\n"
            "os.environ['QWEN3EMB_CASE'] = 'late'\n"
            "queue = multiprocessing.get_context('spawn').SimpleQueue()\n"
            "worker = multiprocessing.Process(target=case.tell, args=(queue,))\n"
            "worker.start()\n"
            "print(*queue.get(), os.getpid(), case.IMPORTED_BY, multiprocessing.get_start_method(), flush=True)\n"
            "time.sleep(60)\n"
        )
        case = (
            "import os, time\n"
            "IMPORTED_BY = os.getpid()\n"
            "def tell(queue):\n"
            "    queue.put((os.environ['QWEN3EMB_CASE'], IMPORTED_BY, os.getpid(), os.getppid()))\n"
            "    time.sleep(60)\n"
        )
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "plugin_template_case.py").write_text(case)
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, os.environ["PYTHONPATH"]])}
            environ["OPENBLAS_NUM_THREADS"] = "1"
            main = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)
            try:
                assert main.stdout
                value, imported_by, worker, parent, pid, imported_here, method = main.stdout.readline().split()
                self.assertEqual((value, method), ("late", "spawn"))
                self.assertEqual(imported_by, imported_here)
                self.assertEqual(int(pid), main.pid)
                self.assertNotIn(parent, (pid, worker))
            finally:
                main.kill()
                main.wait(10)
                main.stdout.close()
        deadline = time.monotonic() + 60
        while any(_lives(int(one)) for one in (worker, parent)):
            self.assertLess(time.monotonic(), deadline, "the template or its worker outlived the main process")
            time.sleep(0.01)

    def test_a_scheduler_is_bound_to_its_node_without_another_program(self) -> None:
        """Where SGLang would go by way of numactl; what somebody has set stays.

        A sandbox that lets cores be looked at and not chosen would end the scheduler: numactl is tried out beforehand.
        """
        for second, numactl, chosen, forbidden, found in (
            ("/", "/usr/bin/numactl", None, None, "0"),
            ("/", "/usr/bin/numactl", "1", None, "1"),
            ("/", None, None, None, None),
            ("/nowhere", "/usr/bin/numactl", None, None, None),
            ("/", "/usr/bin/numactl", None, PermissionError(1, "Operation not permitted"), None),
        ):
            with (
                mock.patch("os.sched_setaffinity", side_effect=forbidden),
                mock.patch.object(template, "SECOND_NODE", Path(second)),
                mock.patch("shutil.which", return_value=numactl),
                mock.patch.dict(os.environ, {template.BOUND_BY_NUMACTL: chosen} if chosen else {}),
                mock.patch.object(template.multiprocessing.context._default_context, "_actual_context", None),
            ):
                template.use()
                self.assertEqual(os.environ.get(template.BOUND_BY_NUMACTL), found)

    def test_it_stands_aside_where_a_fork_would_not_be_harmless(self) -> None:
        """Threads that imports left, and a fork server of another shape, are reasons not to."""
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        try:
            with mock.patch.object(template, "_fork") as fork:
                self.assertIn("threads", template.start(modules=["json"]) or "")
                fork.assert_not_called()
        finally:
            stop.set()
            thread.join()
        with mock.patch.object(template.forkserver, "main", _of_another_shape):
            self.assertIn("fork server", template.start(modules=["json"]) or "")


def _of_another_shape(fd: int, key: bytes) -> None:
    """A fork server's main, as a later Python may have it."""


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


class Reading(unittest.TestCase):
    def test_plain_requests_are_taken(self) -> None:
        """A text, texts, ids and lists of ids, with the fields that OpenAI's clients send."""
        self.assertEqual(asked.read(body(input="a")), Asked(["a"], None, None, "float"))
        self.assertEqual(asked.read(body(input=["a", "b"], model="m")), Asked(["a", "b"], None, None, "float"))
        self.assertEqual(asked.read(body(input=[1, 2])), Asked(None, [[1, 2]], None, "float"))
        self.assertEqual(asked.read(body(input=[[1], [2, 3]])), Asked(None, [[1], [2, 3]], None, "float"))
        full = body(input="a", model="m", dimensions=32, encoding_format="base64", user="u")
        self.assertEqual(asked.read(full), Asked(["a"], None, 32, "base64"))
        self.assertEqual(asked.read(body(input="a", dimensions=None, user=None)), Asked(["a"], None, None, "float"))

    def test_everything_else_is_left_to_the_stock_route(self) -> None:
        """What pydantic would coerce, refuse or treat apart is not judged here."""
        for unusual in (
            b"",
            b"{",
            b"[]",
            b'"text"',
            b'{"input": "\\ud800"}',
            b'{"input": NaN}',
            body(),
            body(input=None),
            body(input=""),
            body(input=" \n"),
            body(input=[]),
            body(input=["a", " "]),
            body(input=["a", 1]),
            body(input=[1, "a"]),
            body(input=[True, False]),
            body(input=[1.0, 2.0]),
            body(input=[-1]),
            body(input=[2**40]),
            body(input=[[]]),
            body(input=[[1], []]),
            body(input=[[1], ["a"]]),
            body(input={"text": "a"}),
            body(input=[{"text": "a"}]),
            body(input="a", model=None),
            body(input="a", model="base:adapter"),
            body(input="a", model=3),
            body(input="a", dimensions="32"),
            body(input="a", dimensions=32.0),
            body(input="a", dimensions=True),
            body(input="a", encoding_format="int8"),
            body(input="a", encoding_format=None),
            body(input="a", user=7),
            body(input="a", rid="r"),
            body(input="a", priority=1),
            body(input="a", embed_overrides=[]),
            body(input="a", unknown=1),
        ):
            with self.subTest(unusual):
                self.assertIsNone(asked.read(unusual))


class Writing(unittest.TestCase):
    def setUp(self) -> None:
        self.writer = AnswerWriter(USAGE)
        self.random = random.Random(3)

    def test_an_array_prints_as_the_list_of_the_same_numbers(self) -> None:
        """Also for numbers whose shortest float32 text would name another double, and for NaN and infinity."""
        numbers = [self.random.uniform(-1, 1) for _ in range(500)] + [0.0, -0.0, 1e-38, math.nan, math.inf, 0.1]
        row = np.array(numbers, dtype=np.float32)
        as_array = self.writer.write([row], 3, "m", "float")
        self.assertEqual(as_array, self.writer.write([row.tolist()], 3, "m", "float"))

    def test_the_answer_has_the_keys_in_the_engine_s_order(self) -> None:
        """data, model, object, usage; embedding, index, object; the counts in the engine's own usage."""
        answer = json.loads(self.writer.write([[0.5], [1.0]], 7, 'a "b"', "float"))
        self.assertEqual(list(answer), ["data", "model", "object", "usage"])
        self.assertEqual([list(item) for item in answer["data"]], [["embedding", "index", "object"]] * 2)
        self.assertEqual([item["index"] for item in answer["data"]], [0, 1])
        self.assertEqual(answer["model"], 'a "b"')
        self.assertEqual(answer["usage"], {**USAGE, "prompt_tokens": 7, "total_tokens": 7})
        self.assertEqual(list(answer["usage"]), list(USAGE))

    def test_base64_is_little_endian_float32(self) -> None:
        """From an array and from a list alike."""
        row = np.array([0.5, -0.25, 3.0], dtype=np.float32)
        for vector in (row, row.tolist()):
            text = json.loads(self.writer.write([vector], 1, "m", "base64"))["data"][0]["embedding"]
            self.assertEqual(base64.b64decode(text), row.astype("<f4").tobytes())


class Tokens(unittest.TestCase):
    class Tokenizer:
        """Answers as a transformers tokenizer does: ids of characters, with or without an end that Rust adds too."""

        def __init__(self, same: bool) -> None:
            self._tokenizer = SimpleNamespace(truncation=None, padding=None, encode_batch_fast=self.rust)
            self.same, self.calls = same, 0

        def rust(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
            return [SimpleNamespace(ids=[ord(c) for c in text] + [9]) for text in texts]

        def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
            self.calls += 1
            return {"input_ids": [[ord(c) for c in text] + [9 if self.same else 8] for text in texts]}

    def test_the_rust_tokenizer_is_used_where_it_says_the_same(self) -> None:
        """Proven on probes once; transformers is not called again."""
        tokenizer = self.Tokenizer(same=True)
        self.assertEqual(encoder(tokenizer)(["ab"]), [[97, 98, 9]])
        self.assertEqual(tokenizer.calls, 1)

    def test_a_tokenizer_that_adds_something_in_python_is_called_whole(self) -> None:
        """The probes differ: every text goes through transformers."""
        self.assertEqual(encoder(self.Tokenizer(same=False))(["ab"]), [[97, 98, 8]])

    def test_truncation_left_by_another_call_is_noticed(self) -> None:
        """The shared Rust object carries settings: with any set, transformers resets them first."""
        tokenizer = self.Tokenizer(same=True)
        encode = encoder(tokenizer)
        tokenizer._tokenizer.truncation = {"max_length": 2}
        encode(["ab"])
        self.assertEqual(tokenizer.calls, 2)

    def test_the_probes_cover_what_tokenizers_differ_in(self) -> None:
        """Special tokens in the text, spaces, other scripts, a long text."""
        self.assertTrue(any("<|endoftext|>" in p for p in PROBES) and any(len(p) > 100 for p in PROBES))


class Lock:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


class Manager:
    """As much of the tokenizer manager as the plugin calls; `answers` decides what the scheduler says."""

    def __init__(self) -> None:
        self.tokenizer = Tokens.Tokenizer(same=True)
        self.model_update_lock = SimpleNamespace(reader_lock=Lock())
        self.request_logger = SimpleNamespace(log_requests=False)
        self.is_pause, self.dump_requests_folder, self.model_path = False, "", "the/model"
        self.rid_to_state: dict[str, Any] = {}
        self.asyncio_tasks: set[Any] = set()
        self.messages: list[list[Any]] = []
        self.aborted: list[str] = []
        self.silent = False
        self.finish: dict[str, Any] = {"type": "length", "length": 0}

    def auto_create_handle_loop(self) -> None: ...

    def _set_default_priority(self, one: Any) -> None: ...

    def _init_req_state(self, one: Any, request: Any) -> None:
        self.rid_to_state[one.rid] = SimpleNamespace(obj=one, event=None, out_list=[], finished=False)

    def _validate_one_request(self, one: Any, ids: list[int]) -> None:
        if len(ids) > 20:
            raise ValueError("too long")

    def _create_tokenized_object(self, one: Any, text: str | None, ids: list[int]) -> Any:
        return SimpleNamespace(rid=one.rid, ids=ids)

    def _send_one_request(self, tokenized: Any) -> None:
        self._send_batch_request([tokenized])

    def _send_batch_request(self, tokenized: list[Any]) -> None:
        self.messages.append(tokenized)
        if not self.silent:
            asyncio.get_running_loop().call_soon(self.answer, tokenized)

    def answer(self, tokenized: list[Any]) -> None:
        for one in reversed(tokenized):
            state = self.rid_to_state.pop(one.rid)
            state.finished = True
            meta = {"prompt_tokens": len(one.ids), "finish_reason": self.finish}
            state.out_list.append({"embedding": [float(one.ids[0])], "meta_info": meta})
            state.event.set()

    async def _handle_abort_finish_reason(self, out: Any, state: Any, is_stream: bool) -> None:
        if out["meta_info"]["finish_reason"].get("type") == "abort":
            raise HTTPException(503, "queue full")

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)


async def connected() -> bool:
    return False


def plain(*texts: str) -> Asked:
    return Asked(list(texts), None, None, "float")


class Calls(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.manager = Manager()
        self.calls = EngineCalls(self.manager, SimpleNamespace, 0.01)

    async def test_requests_of_one_tick_travel_in_one_message_and_come_back_apart(self) -> None:
        """Order within a request is kept though the scheduler answers in another."""
        found = await asyncio.gather(
            self.calls.vectors(plain("a", "b"), connected), self.calls.vectors(plain("c"), connected)
        )
        self.assertEqual(found, [([[97.0], [98.0]], 4), ([[99.0]], 2)])
        self.assertEqual([len(message) for message in self.manager.messages], [3])
        self.assertFalse(self.manager.rid_to_state)

    async def test_ids_pass_untouched(self) -> None:
        """No tokenizer call, no added end."""
        found = await self.calls.vectors(Asked(None, [[5, 6], [7]], None, "float"), connected)
        self.assertEqual(found, ([[5.0], [7.0]], 3))

    async def test_a_request_that_the_engine_refuses_does_not_touch_its_neighbours(self) -> None:
        """Too long: left to the stock route, no state behind, the others answered."""
        long, short = await asyncio.gather(
            self.calls.vectors(plain("a", "b" * 30), connected),
            self.calls.vectors(plain("c"), connected),
            return_exceptions=True,
        )
        self.assertIsInstance(long, NotPlainError)
        self.assertEqual(short, ([[99.0]], 2))
        self.assertFalse(self.manager.rid_to_state)

    async def test_an_abort_by_the_scheduler_is_raised_as_the_stock_path_raises_it(self) -> None:
        """A full queue is a 503."""
        self.manager.finish = {"type": "abort", "status_code": 503}
        with self.assertRaises(HTTPException):
            await self.calls.vectors(plain("a"), connected)

    async def test_a_client_that_left_is_aborted(self) -> None:
        """Found out while waiting, each of its items is taken back."""
        self.manager.silent = True

        async def gone() -> bool:
            return True

        with self.assertRaisesRegex(ValueError, "disconnected"):
            await self.calls.vectors(plain("a", "b"), gone)
        self.assertEqual(len(self.manager.aborted), 2)

    async def test_no_request_id_begins_with_another(self) -> None:
        """The scheduler aborts every request whose id starts with the aborted one."""
        await self.calls.vectors(plain(*(f"text {i}" for i in range(40))), connected)
        ids = [one.rid for message in self.manager.messages for one in message]
        self.assertEqual(len(set(ids)), 40)
        self.assertEqual(len({len(rid) for rid in ids}), 1)

    async def test_a_long_wait_is_no_error(self) -> None:
        """The client is there: waiting goes on past the time between two looks."""
        self.manager.silent = True
        task = asyncio.create_task(self.calls.vectors(plain("a"), connected))
        looks = 0

        async def look() -> bool:
            nonlocal looks
            looks += 1
            return False

        second = asyncio.create_task(self.calls.vectors(plain("b"), look))
        while looks < 2:
            await asyncio.sleep(0)
        for message in self.manager.messages:
            self.manager.answer(message)
        self.assertEqual(await asyncio.gather(task, second), [([[97.0]], 2), ([[98.0]], 2)])

    async def test_a_paused_or_logging_engine_is_left_alone(self) -> None:
        """accepts() is asked for every request."""
        self.assertTrue(self.calls.accepts())
        self.manager.request_logger.log_requests = True
        self.assertFalse(self.calls.accepts())

    async def test_a_failing_tokenizer_leaves_the_answer_to_the_stock_route(self) -> None:
        """Nothing was sent."""
        self.calls._encode = None
        with self.assertRaises(NotPlainError):
            await self.calls.vectors(plain("a"), connected)
        self.assertFalse(self.manager.messages)


class Stock:
    """FastAPI's route: records what reached it."""

    endpoint = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def matches(self, scope: Any) -> tuple[Match, Any]:
        return Match.FULL, {"path_params": {}}

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        found, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            found += message["body"]
            more = message.get("more_body", False)
        self.bodies.append(found)


class Route(unittest.IsolatedAsyncioTestCase):
    def setUp(self) -> None:
        self.manager, self.stock, self.sent = Manager(), Stock(), []
        calls = EngineCalls(self.manager, SimpleNamespace, 5.0)
        self.route = EmbeddingsRoute(self.stock, None, calls, AnswerWriter(USAGE))

    async def post(self, *chunks: bytes, headers: Any = ((b"content-type", b"application/json"),)) -> None:
        messages = iter(
            {"type": "http.request", "body": chunk, "more_body": i + 1 < len(chunks)} for i, chunk in enumerate(chunks)
        )

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            self.sent.append(message)

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": list(headers)}
        await self.route.handle(scope, receive, send)

    async def test_a_plain_request_never_reaches_the_stock_route(self) -> None:
        """Also when its body comes in pieces."""
        whole = body(input="ab")
        await self.post(whole[:5], whole[5:])
        self.assertEqual(self.stock.bodies, [])
        answer = json.loads(self.sent[1]["body"])
        self.assertEqual(answer["data"][0]["embedding"], [97.0])
        self.assertEqual(dict(self.sent[0]["headers"])[b"content-length"], str(len(self.sent[1]["body"])).encode())

    async def test_an_abort_without_a_vector_is_answered_in_the_stock_handlers_form(self) -> None:
        """`/abort_request` of a text that waits: SGLang says a KeyError as JSON, not as a bare line of text."""

        def aborted(tokenized: list[Any]) -> None:
            for one in tokenized:
                state = self.manager.rid_to_state.pop(one.rid)
                state.finished = True
                state.out_list.append({"text": "", "meta_info": {"finish_reason": {"type": "abort"}}})
                state.event.set()

        async def not_refused(*_: Any) -> None: ...  # the stock one raises for a status code alone

        self.manager.answer, self.manager._handle_abort_finish_reason = aborted, not_refused
        self.route._serving = SimpleNamespace(
            create_error_response=lambda message, err_type, status_code: JSONResponse(
                {"message": message, "type": err_type}, status_code
            )
        )
        with self.assertLogs("qwen3emb_engine_plugin"):
            await self.post(body(input="a"))
        self.assertEqual(self.sent[0]["status"], 500)
        found = json.loads(self.sent[1]["body"])
        self.assertEqual(found, {"message": "Internal server error: 'embedding'", "type": "InternalServerError"})

    async def test_what_is_not_plain_reaches_it_with_its_whole_body(self) -> None:
        """Bad JSON, another content type, a routing header, a text that is too long."""
        routed = ((b"content-type", b"application/json"), (b"x-smg-routing-key", b"k"))
        await self.post(b"{bad", b" json")
        await self.post(body(input="a"), headers=((b"content-type", b"text/plain"),))
        await self.post(body(input="a"), headers=())
        await self.post(body(input="a"), headers=routed)
        await self.post(body(input="a" * 50))
        wanted = [b"{bad json", *[body(input="a")] * 3, body(input="a" * 50)]
        self.assertEqual(self.stock.bodies, wanted)
        self.assertEqual(self.sent, [])

    async def test_only_post_on_the_path_is_matched(self) -> None:
        """GET, another path and a mounted application fall through to the stock routes."""
        scope = {"type": "http", "method": "POST", "path": PATH}
        self.assertEqual(self.route.matches(scope)[0], Match.FULL)
        for other in ({"method": "GET"}, {"path": "/v1/rerank"}, {"root_path": "/engine"}, {"type": "websocket"}):
            self.assertEqual(self.route.matches({**scope, **other})[0], Match.NONE)


class Fitting(unittest.TestCase):
    def test_releases_outside_the_read_range_are_refused(self) -> None:
        """0.5.14 to 0.5.23, post releases included; what cannot be parsed is not trusted."""
        for known in ("0.5.14", "0.5.15.post1", "0.5.16", "0.5.23"):
            self.assertIsNone(switches.misfit_of_version(known))
        for unknown in ("0.5.13.post1", "0.5.24", "0.6.0", "1.0", "main"):
            self.assertIn(unknown, switches.misfit_of_version(unknown) or "")

    def test_a_changed_function_is_named(self) -> None:
        """Other parameters, or a line gone that the hook rests on."""

        def known(self: Any, value: int) -> int:
            return value + 1

        self.assertIsNone(switches.misfit(known, "self value", "value + 1"))
        self.assertIn("(self value)", switches.misfit(known, "self other") or "")
        self.assertIn("value + 2", switches.misfit(known, "self value", "value + 2") or "")


class Housekeeping(unittest.TestCase):
    def setUp(self) -> None:
        self.now = 100.0
        self.scheduler = SimpleNamespace(forward_ct=0, is_fully_idle=lambda: True, maybe_sleep_on_idle=self.sleep)
        self.rounds = self.sleeps = 0

    def sleep(self) -> None:
        self.sleeps += 1

    def round(self, scheduler: Any, *_: Any) -> str:
        self.rounds += 1
        return "written"

    def test_an_idle_scheduler_checks_itself_after_a_batch_and_then_now_and_then(self) -> None:
        """Turns in between only sleep, where sleeping is on."""
        on_idle = IdleRounds(0.0, lambda: self.now)
        for _ in range(5):
            on_idle(self.round, self.scheduler)
        self.assertEqual((self.rounds, self.sleeps), (1, 4))
        self.scheduler.forward_ct = 1
        on_idle(self.round, self.scheduler)
        self.assertEqual(self.rounds, 2)
        self.now += 0.06
        on_idle(self.round, self.scheduler)
        self.assertEqual(self.rounds, 3)

    def test_it_lingers_after_a_batch(self) -> None:
        """Neither housekeeping nor sleep at first, then both; what is long owed is done, and does not end in sleep."""
        on_idle = IdleRounds(0.005, lambda: self.now)
        sleeper = self.scheduler.idle_sleeper = object()
        awake = []

        def original(scheduler: Any) -> None:
            awake.append(scheduler.idle_sleeper is None)

        on_idle(original, self.scheduler)  # none has been yet
        for batch in range(1, 4):
            self.scheduler.forward_ct = batch
            for _ in range(4):
                self.now += 0.001
                on_idle(original, self.scheduler)
        self.assertEqual((awake, self.sleeps), ([True], 0))
        self.now += 0.005
        on_idle(original, self.scheduler)
        on_idle(original, self.scheduler)
        self.assertEqual((awake, self.sleeps), ([True, False], 1))
        self.assertIs(self.scheduler.idle_sleeper, sleeper)

        self.scheduler.forward_ct = 9
        self.now += 0.06
        with self.assertRaises(ZeroDivisionError):
            on_idle(lambda _: 1 // 0, self.scheduler)
        self.assertIs(self.scheduler.idle_sleeper, sleeper)

    def test_a_scheduler_that_waits_for_something_does_not_sleep(self) -> None:
        """Not fully idle: the loop turns on."""
        on_idle = IdleRounds(0.0, lambda: self.now)
        on_idle(self.round, self.scheduler)
        self.scheduler.is_fully_idle = lambda: False
        on_idle(self.round, self.scheduler)
        self.assertEqual((self.rounds, self.sleeps), (1, 0))

    def test_a_batch_s_places_are_given_back_at_once(self) -> None:
        """All of them, by one copy of the free list; also where the batch's processing fails, and inside a group."""
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

        class Places(TokenToKVPoolAllocator):
            copies = 0

            def free(self, free_index: torch.Tensor) -> None:
                self.copies += self.is_not_in_free_group
                super().free(free_index)

        def process(processor: Any, batch: Any, result: Any) -> Any:
            for text in batch:
                processor.token_to_kv_pool_allocator.free(text)
            return result()

        places = Places(40, torch.bfloat16, "cpu", None, need_sort=False)
        processor = SimpleNamespace(token_to_kv_pool_allocator=places, is_generation=False)
        freed = FreedTogether()
        batch = list(places.alloc(30).split(5))
        self.assertEqual(freed(process, processor, batch, lambda: "done"), "done")
        self.assertEqual((places.available_size(), places.copies), (40, 1))
        self.assertEqual(sorted(places.free_pages.tolist()), list(range(1, 41)))

        batch = list(places.alloc(20).split(5))
        with self.assertRaises(ZeroDivisionError):
            freed(process, processor, batch, lambda: 1 // 0)
        self.assertEqual((places.available_size(), places.copies), (40, 2))

        batch = list(places.alloc(10).split(5))
        places.free_group_begin()
        freed(process, processor, batch, lambda: None)
        self.assertEqual((places.available_size(), places.copies), (30, 2))
        places.free_group_end()
        self.assertEqual((places.available_size(), places.copies), (40, 3))

    def test_a_batch_s_places_are_back_when_it_is_reported(self) -> None:
        """Usage in log and metrics is the stock server's; a model that generates goes the stock way altogether."""
        from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

        self.addCleanup(HookRegistry.reset)
        self.assertIsNone(housekeeping.freeing())
        ((_, freed, _),) = HookRegistry._hooks[f"{housekeeping.PROCESSOR}.process_batch_result_prefill"]
        ((_, after_answers, _),) = HookRegistry._hooks[f"{housekeeping.STREAMER}.stream_output"]
        places = TokenToKVPoolAllocator(40, torch.bfloat16, "cpu", None, need_sort=False)

        def process(processor: Any, batch: Any, result: Any) -> list[int]:
            free = []
            for text in batch:
                places.free(text)
                free.append(places.available_size())
            self.assertIsNone(after_answers(object(), [], False, None))
            return [*free, places.available_size()]

        for generation, expected in ((False, [30, 30, 40]), (True, [35, 40, 40])):
            processor = SimpleNamespace(token_to_kv_pool_allocator=places, is_generation=generation)
            batch = places.alloc(10).split(5)
            self.assertEqual(freed(process, processor, batch, None), expected)

    def test_the_last_load_is_always_published(self) -> None:
        """Under load some are left out; an idle scheduler writes whatever the clock says."""
        publish = Snapshots(lambda: self.now)
        self.scheduler.is_fully_idle = lambda: False
        self.assertEqual([publish(self.round, self.scheduler, True) for _ in range(3)], ["written", None, None])
        self.scheduler.is_fully_idle = lambda: True
        self.assertEqual(publish(self.round, self.scheduler), "written")


class Sampling(unittest.TestCase):
    """Parameters of a batch that samples nothing."""

    def setUp(self) -> None:
        from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

        self.made = 0
        self.info = SamplingBatchInfo
        self.hook = Unsampled()

    def make(self, cls: Any, batch: Any, vocab_size: int) -> Any:
        from sglang.srt.sampling import penaltylib

        self.made += 1
        count = len(batch.reqs)
        given = {field.name: False for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        given |= {name: torch.ones(count) for name in ("temperatures", "top_ps", "top_ks", "min_ps")}
        kinds = {penaltylib.BatchedRepetitionPenalizer, penaltylib.BatchedFrequencyPenalizer}
        penalties = penaltylib.BatchedPenalizerOrchestrator(vocab_size, batch, kinds)
        bias = torch.zeros(count, vocab_size) if self.biased else None
        return cls(**{**given, "logit_bias": bias, "penalizer_orchestrator": penalties})

    biased = False

    def of(self, texts: int, *, generates: bool = False, **parameters: Any) -> Any:
        from sglang.srt.sampling.sampling_params import SamplingParams

        class Batch:  # one that can be referred to weakly, as SGLang's
            model_config, device = SimpleNamespace(is_generation=generates), "cpu"
            reqs = [SimpleNamespace(sampling_params=SamplingParams(max_new_tokens=0, **parameters))] * texts

        return self.hook(self.make, self.info, Batch(), 100)

    def test_they_are_made_once_for_each_number_of_texts(self) -> None:
        """And for each batch of a model that generates."""
        for texts in (1, 3, 1, 3, 3):
            self.assertEqual(len(self.of(texts).temperatures), texts)
        self.assertEqual(self.made, 2)
        self.of(1, generates=True)
        self.of(1, generates=True)
        self.assertEqual(self.made, 4)

    def test_what_a_batch_does_to_its_own_stays_there(self) -> None:
        """Filtering and grammars are assignments; the next batch finds all as it was."""
        first = self.of(3)
        first.filter_batch([0], torch.tensor([0]))
        first.grammars = ["of this batch"]
        self.assertEqual(len(first.temperatures), 1)
        second = self.of(3)
        self.assertEqual((len(second.temperatures), second.grammars), (3, None))

    def test_what_a_request_asked_of_sampling_is_left_out(self) -> None:
        """A bias and a penalty are a request's; the next batch of as many texts finds neither."""
        self.biased = True
        for parameters in ({"repetition_penalty": 1.2}, {}):
            found = self.of(2, **parameters)
            self.assertIsNone(found.logit_bias)
            self.assertFalse(found.penalizer_orchestrator.is_required)
        self.assertEqual(self.made, 1)

    def test_batches_are_merged_whatever_was_asked_of_them(self) -> None:
        """Each is, in the overlap loop. The batch for which parameters were made is gone by then."""
        for first, second in (({}, {"repetition_penalty": 1.2}), ({"frequency_penalty": 1.0}, {})):
            self.hook = Unsampled()
            self.of(1, **first)
            running = self.of(1)
            running.merge_batch(self.of(2, **second))
            self.assertEqual(len(running), 3)
            running.filter_batch([1, 2], torch.tensor([1, 2]))
            self.assertEqual((len(running), len(self.of(1)), len(self.of(2))), (2, 1, 2))


class GraphInputs(unittest.TestCase):
    """One kernel in place of a runner's copies, on a runner of plain tensors."""

    def setUp(self) -> None:
        self.offsets = torch.zeros(5, dtype=torch.int32)
        self.backend = SimpleNamespace(
            fa_skip_kv_cache=True, full_cg_prefill_metadata=SimpleNamespace(cu_seqlens_q=self.offsets)
        )
        self.runner = SimpleNamespace(
            _is_full_backend=True, _capture_req_slots=4, capture_num_tokens=[8, 16], static_draft_hidden_states=None,
            _pad_to_bucket=lambda tokens, sizes: min(s for s in sizes if s >= tokens),
            buffer_registry=SimpleNamespace(slot_names=lambda: list(graph_inputs.READ)),
            model_runner=SimpleNamespace(attn_backend=self.backend, is_generation=False),
            layer_model=type("Qwen3Model", (), {})(),
        )  # fmt: skip
        self.slots = {name: torch.full((16,), 7) for name in ("input_ids", "positions")}
        self.stock = 0
        self.filled: list[Any] = []
        put = mock.patch.object(graph_inputs, "_fill", lambda *given: self.filled.append(given))
        put.start()
        self.addCleanup(put.stop)

    def load(self, runner: Any, batch: Any, **_: Any) -> Any:
        self.stock += 1
        size = runner._pad_to_bucket(len(batch.input_ids), runner.capture_num_tokens)
        return SimpleNamespace(**{name: slot[:size] for name, slot in self.slots.items()})

    def batch(self, *lengths: int, **more: Any) -> Any:
        tokens = sum(lengths)
        given = {"mrope_positions": None, "spec_info": None, "extend_seq_lens": torch.tensor(lengths)}
        ids = torch.arange(1, tokens + 1)
        return SimpleNamespace(**{**given, **more}, batch_size=len(lengths), input_ids=ids, positions=ids - 1)

    def test_the_stock_way_is_gone_once_for_each_size(self) -> None:
        """What the runner keeps of a batch is set each time, and the kernel fills the buffers of that size."""
        hook = graph_inputs.Filled()
        for lengths, size in (((3,), 8), ((3, 4), 8), ((9, 2, 1), 16), ((2,), 8)):
            batch = self.batch(*lengths)
            made = hook(self.load, self.runner, batch, pp_proxy_tensors=None, get_embedding=True)
            self.assertEqual(len(made.input_ids), size)
            kept = (self.runner.raw_num_tokens, self.runner.raw_bs, self.runner._static_num_tokens)
            self.assertEqual(kept, (sum(lengths), len(lengths), size))
            self.assertEqual(
                [x is y for x, y in zip(self.filled[-1], (batch, made, self.offsets), strict=True)], [True] * 3
            )
            self.assertIs(self.backend.forward_metadata, self.backend.full_cg_prefill_metadata)
        self.assertEqual((self.stock, len(self.filled)), (2, 4))

    def test_other_runners_and_batches_are_left_alone(self) -> None:
        """Another backend, a cache, another slot, logits; and positions or drafts of another kind."""
        for where, name, value in (
            (self.runner, "_is_full_backend", False),
            (self.backend, "fa_skip_kv_cache", False),
            (self.runner, "static_draft_hidden_states", object()),
            (self.runner.model_runner, "is_generation", True),
            (self.runner, "_capture_req_slots", 3),
            (self.runner, "layer_model", object()),
            (self.runner.buffer_registry, "slot_names", lambda: [*graph_inputs.READ, "mamba_track_mask"]),
        ):
            with mock.patch.object(where, name, value):
                graph_inputs.Filled()(self.load, self.runner, self.batch(3))
        hook = graph_inputs.Filled()
        for more in ({"mrope_positions": 1}, {"spec_info": 1}):
            hook(self.load, self.runner, self.batch(3, **more))
        for handed_on in ({"input_embeds": 1}, {"get_embedding": True, "pp_proxy_tensors": 1}):
            hook(self.load, self.runner, self.batch(3), **handed_on)
        self.assertEqual((self.stock, self.filled), (11, []))

    def test_another_runner_has_buffers_of_its_own(self) -> None:
        """Graphs captured anew: what was made for the old ones is forgotten."""
        hook = graph_inputs.Filled()
        for runner in (self.runner, self.runner, SimpleNamespace(**vars(self.runner))):
            hook(self.load, runner, self.batch(3), get_embedding=True)
        self.assertEqual((self.stock, len(self.filled)), (2, 3))

    def test_what_the_engine_hands_on_with_a_batch_is_known(self) -> None:
        """Were it not, the part would leave every batch to the stock way, and nobody notice."""
        from sglang.srt.model_executor.model_runner import ModelRunner

        if not hasattr(ModelRunner, "_extend_forward_kwargs"):
            self.skipTest("a release that hands it on elsewhere")
        engine = SimpleNamespace(support_pp=True, is_generation=False)
        engine._pp_kwargs = lambda proxies: ModelRunner._pp_kwargs(engine, proxies)
        batch = self.batch(3, input_embeds=None, replace_embeds=None)
        handed_on = ModelRunner._extend_forward_kwargs(engine, batch, None)
        self.assertEqual(handed_on.keys(), graph_inputs.HANDED_ON)
        graph_inputs.Filled()(self.load, self.runner, batch, **handed_on)
        self.assertEqual(len(self.filled), 1)


class FullGraph(unittest.TestCase):
    """Segments of a padded batch under a whole-pass graph: as the kernel over raw keys wants them."""

    def setUp(self) -> None:
        metadata = SimpleNamespace(cu_seqlens_q=torch.zeros(5, dtype=torch.int32))
        self.backend = SimpleNamespace(fa_skip_kv_cache=True, full_cg_prefill_metadata=metadata, forward_metadata=None)
        self.runner = SimpleNamespace(
            _is_full_backend=True, _capture_req_slots=4, model_runner=SimpleNamespace(attn_backend=self.backend)
        )
        self.batch = SimpleNamespace(batch_size=4, extend_seq_lens=torch.tensor([5, 7, 0, 0, 99]))
        self.originals = 0

    def prepare(self, runner: Any, batch: Any, static: Any, shape: Any) -> str:
        prefill_graph._fill(self.fill, self.backend, self.batch, False)
        return "kept"

    def fill(self, *_: Any) -> None:
        self.originals += 1

    def test_the_padding_is_a_segment_of_its_own(self) -> None:
        """Real lengths first, the padded row count last; both forms of the shape; the original's result passed on."""
        for shape in (16, SimpleNamespace(size=16)):
            self.assertEqual(prefill_graph._prepare(self.prepare, self.runner, self.batch, None, shape), "kept")
            self.assertEqual(self.backend.full_cg_prefill_metadata.cu_seqlens_q.tolist(), [0, 5, 12, 12, 16])
        self.assertIs(self.backend.forward_metadata, self.backend.full_cg_prefill_metadata)
        self.assertEqual(self.originals, 0)

    def test_one_slot_stays_free_for_it(self) -> None:
        """As many requests as slots run eagerly; fewer are SGLang's own decision."""
        for size, possible in ((3, True), (4, False), (5, False)):
            batch = SimpleNamespace(batch_size=size)
            self.assertEqual(prefill_graph._can_run(lambda *_: True, self.runner, batch), possible)
        self.assertFalse(prefill_graph._can_run(lambda *_: False, self.runner, SimpleNamespace(batch_size=1)))

    def test_capture_and_servers_with_a_cache_are_left_alone(self) -> None:
        """The stock metadata, and no slot taken."""
        prefill_graph._fill(self.fill, self.backend, self.batch, True)
        self.backend.fa_skip_kv_cache = False
        prefill_graph._fill(self.fill, self.backend, self.batch, False)
        self.assertEqual(self.originals, 2)
        self.assertTrue(prefill_graph._can_run(lambda *_: True, self.runner, SimpleNamespace(batch_size=4)))
        prefill_graph._prepare(lambda *_: None, self.runner, self.batch, None, 16)
        self.assertEqual(self.backend.full_cg_prefill_metadata.cu_seqlens_q.tolist(), [0] * 5)


class CpuPass(unittest.TestCase):
    """A norm in blocks is the stock norm, bit by bit; anything unusual is left to it."""

    def norm(self, width: int, **other: Any) -> Any:
        from sglang.srt.layers.layernorm import RMSNorm

        norm = RMSNorm(width, eps=1e-6)
        norm.weight.data = torch.randn(width, generator=self.random).to(torch.bfloat16)
        for name, value in other.items():
            setattr(norm, name, value)
        return norm

    def setUp(self) -> None:
        self.random = torch.Generator().manual_seed(5)
        self.enterContext(torch.no_grad())

    def rows(self, count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (3 * torch.randn((count, width), generator=self.random)).to(dtype)

    def both(self, norm: Any, *tensors: Any) -> tuple[Any, Any]:
        stock = type(norm).forward_native
        with mock.patch.object(cpu_pass, "BLOCK", 4096):
            return stock(norm, *tensors), cpu_pass._forward(lambda *given: stock(*given), norm, *tensors)

    def test_it_gives_the_stock_s_bits(self) -> None:
        """With a residual and without; whole blocks, a rest, a strided batch; either half type."""
        for count, width, dtype in ((64, 1024, torch.bfloat16), (33, 2560, torch.bfloat16), (130, 256, torch.float16)):
            norm, x, residual = self.norm(width), self.rows(count, width, dtype), self.rows(count, width, dtype)
            stock, found = self.both(norm, x.clone(), residual.clone())
            self.assertTrue(torch.equal(stock[0], found[0]))
            self.assertTrue(torch.equal(stock[1], found[1]))
            self.assertEqual((found[0].dtype, found[1].dtype), (dtype, dtype))
            stock, found = self.both(norm, x)
            self.assertTrue(torch.equal(stock, found))
        wide = self.rows(64, 2048)[:, ::2]
        stock, found = self.both(self.norm(1024), wide)
        self.assertTrue(torch.equal(stock, found))

    def test_what_was_given_stays_as_it_was(self) -> None:
        """Inputs are read, never written."""
        norm, x, residual = self.norm(1024), self.rows(64, 1024), self.rows(64, 1024)
        before = x.clone(), residual.clone()
        self.both(norm, x, residual)
        self.assertTrue(torch.equal(x, before[0]) and torch.equal(residual, before[1]))

    def test_not_a_number_stays_in_its_row(self) -> None:
        """As in the stock norm."""
        x = self.rows(64, 1024)
        x[7, 3] = float("nan")
        stock, found = self.both(self.norm(1024), x)
        self.assertEqual(stock.isnan().any(dim=1).nonzero().tolist(), [[7]])
        self.assertTrue(torch.equal(stock.nan_to_num(9), found.nan_to_num(9)))

    def test_the_unusual_goes_to_the_stock_norm(self) -> None:
        """A small batch, three dimensions, float32, another width, a further addend, another rounding."""
        plain, x = self.norm(1024), self.rows(64, 1024)
        cases = [
            (plain, x[:4], None, None),
            (plain, x.view(2, 32, 1024), None, None),
            (plain, x.float(), None, None),
            (plain, x, x, x),
            (self.norm(512), x, None, None),
            (self.norm(1024, fp32_residual=True), x, x, None),
            (self.norm(1024, cast_x_before_out_mul=True), x, None, None),
            (self.norm(1024, variance_size_override=512), x, None, None),
            (self.norm(1024, override_orig_dtype=torch.float32), x, None, None),
        ]
        for norm, *tensors in cases:
            with mock.patch.object(cpu_pass, "BLOCK", 4096):
                found = cpu_pass._forward(lambda *_: "stock", norm, *tensors)
            self.assertEqual(found, "stock")

    def test_a_freed_tensor_is_not_faulted_in_again(self) -> None:
        """The kernel is asked for its pages once, not for each tensor anew; a person's own setting stays."""

        def faults() -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                _ = [torch.ones(4 << 20) for _ in range(3)]
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        with mock.patch.dict(os.environ, {"MALLOC_TRIM_THRESHOLD_": "131072"}):
            self.assertEqual(cpu_pass.heap(), switches.NOT_NEEDED)
        stock = faults()
        self.assertGreater(stock, 20)
        self.assertIsNone(cpu_pass.heap())
        faults()
        self.assertLess(faults(), stock / 2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
