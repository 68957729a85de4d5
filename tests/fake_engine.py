"""An engine that misbehaves on order: SGLang's flags and routes, no model, the standard library only.

What it does wrong comes as JSON in FAKE_ENGINE (see Behaviour). Run by tests in the place of
`python -m sglang.launch_server`.
"""

# ruff: noqa: T201 - an engine speaks by printing
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

STUBBORN = """
import os, signal, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
with open(sys.argv[1], "a") as file: print(os.getpid(), file=file)
while True: time.sleep(60)
"""


@dataclass
class Behaviour:
    """Each field is one fault; the defaults are a good engine. Delays in seconds.

    `faulty_starts` limits the faults to the first so many starts, counted in the file `starts`.
    """

    width: int = 64
    start_delay: float = 0.0
    never_listen: bool = False
    refuse: int = 0  # every embedding gets this HTTP status
    ignore_term: bool = False
    drain: float = 0.0  # seconds between SIGTERM and the end
    die_after: int = 0  # end with status 3 at that embedding request
    hang_after: int = 0  # from that embedding request on, answer none; /health stays 200
    doomed: bool = False  # when it hangs, it says as SGLang does that one of its processes died
    busy: bool = False  # while hanging, log batches as a working engine does
    wrong_dims: int = 0
    nan: bool = False
    norm: float = 1.0
    shuffle: bool = False  # a batch's order is lost
    noise: float = 0.0  # 1 - cosine between a text's vector in a batch and alone
    ignore_dimensions: bool = False
    salt: str = ""  # the vectors are another model's
    stubborn: str = ""  # grandchildren that leave the session and ignore SIGTERM write their pids here
    last_words: str = ""  # print this and end with `status` at once
    status: int = 1
    room: int = 0  # tokens that it says it has room for
    says: str = ""  # more lines of its start
    flood: int = 0  # bytes of log written at the start
    want_key: bool = False  # 401 without the api-key of --config
    print_args: bool = False  # as SGLang does, keys included
    starts: str = ""
    faulty_starts: int = 0


class Engine:
    """The state that all requests share."""

    def __init__(self, behaviour: Behaviour, key: str = "") -> None:
        self.behaviour = behaviour
        self.key = key
        self.requests = 0
        self.lock = threading.Lock()

    def count(self) -> int:
        with self.lock:
            self.requests += 1
            return self.requests

    def vector(self, text: str, dims: int | None) -> list[float]:
        b = self.behaviour
        source = random.Random(hashlib.sha256((b.salt + str(text)).encode()).digest())
        full = [source.gauss(0, 1) for _ in range(b.wrong_dims or b.width)]
        cut = full if dims is None or b.ignore_dimensions else full[:dims]
        norm = math.sqrt(sum(v * v for v in cut)) / b.norm
        values = [v / norm for v in cut]
        if b.nan:
            values[0] = math.nan
        return values


def moved(vector: list[float], far: float) -> list[float]:
    """A vector of the same length that lies 1 - cosine `far` away, in a direction of its own."""
    source = random.Random(vector[0])
    aside = [source.gauss(0, 1) for _ in vector]
    along = sum(a * b for a, b in zip(vector, aside, strict=True)) / sum(v * v for v in vector)
    aside = [a - along * v for a, v in zip(aside, vector, strict=True)]
    turn = math.sqrt(1 - (1 - far) ** 2) * math.hypot(*vector) / math.hypot(*aside)
    return [(1 - far) * v + turn * a for v, a in zip(vector, aside, strict=True)]


def handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    behaviour = engine.behaviour

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes: 40 ms an answer otherwise

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "fake"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.path.endswith("/embeddings"):
                self.answer(404, {"detail": "Not Found"})
                return
            number = engine.count()
            if behaviour.die_after and number >= behaviour.die_after:
                os._exit(3)
            if behaviour.hang_after and number >= behaviour.hang_after:
                if behaviour.doomed:
                    print("[now] Subprocess scheduler_0 (pid=7) crashed with exit code -9. Cleanup...", flush=True)
                    print("[now] SIGQUIT received. signum=None, frame=None. One child failed.", flush=True)
                while True:
                    if behaviour.busy:
                        print("[now] Prefill batch, #new-seq: 1, #new-token: 8192", flush=True)
                    time.sleep(0.02)
            if behaviour.want_key and self.headers["authorization"] != f"Bearer {engine.key}":
                self.answer(401, {"error": "Unauthorized"})
                return
            if behaviour.refuse:
                self.answer(behaviour.refuse, {"object": "error", "message": "no"})
                return
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            vectors = [engine.vector(text, body.get("dimensions")) for text in texts]
            if behaviour.noise and len(texts) > 1:
                vectors = [moved(v, behaviour.noise) for v in vectors]
            if behaviour.shuffle:
                vectors = vectors[1:] + vectors[:1]
            data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
            tokens = sum(len(str(text).encode()) + 1 for text in texts)
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            self.answer(200, {"object": "list", "model": "fake", "data": data, "usage": usage})

        def answer(self, status: int, body: object) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config")
    args, _ = parser.parse_known_args()
    behaviour = Behaviour(**json.loads(os.environ.get("FAKE_ENGINE", "{}")))
    if behaviour.starts:
        with Path(behaviour.starts).open("a") as file:
            print(os.getpid(), file=file)
        if behaviour.faulty_starts and len(Path(behaviour.starts).read_text().split()) > behaviour.faulty_starts:
            behaviour = Behaviour(width=behaviour.width)

    print("server_args=ServerArgs(fake)", flush=True)
    if behaviour.print_args:
        print(f"server_args=ServerArgs({Path(args.config).read_text()})", flush=True)
    if behaviour.flood:
        line = "x" * 199
        for _ in range(behaviour.flood // 200):
            print(line)
    if behaviour.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif behaviour.drain:
        signal.signal(signal.SIGTERM, lambda *_: threading.Timer(behaviour.drain, os._exit, (0,)).start())
    if behaviour.stubborn:
        subprocess.run([sys.executable, "-c", STUBBORN, behaviour.stubborn], check=True)
    if behaviour.last_words:
        print(behaviour.last_words, flush=True)
        sys.exit(behaviour.status)
    print("Load weight begin. avail mem=1 GB", flush=True)
    if behaviour.room:
        print(f"max_total_num_tokens={behaviour.room}, chunked_prefill_size=-1, context_len=8192", flush=True)
    if behaviour.says:
        print(behaviour.says, flush=True)
    time.sleep(behaviour.start_delay)
    if behaviour.never_listen:
        signal.pause()
    key = json.loads(Path(args.config).read_text()).get("api-key", "") if args.config else ""
    server = ThreadingHTTPServer((args.host, args.port), handler(Engine(behaviour, key)))
    print("The server is fired up and ready to roll!", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
