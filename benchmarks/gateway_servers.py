"""Which HTTP server and which HTTP client the gateway should stand on: one small embedding answer, several libraries.

    python benchmarks/gateway_servers.py            # a Markdown table; needs wrk, and
    pip install uvloop httptools uvicorn granian aiohttp httpx orjson

Every server parses a JSON body and answers the same 256-number embedding; it runs on core 0, the load on core 1.
Every client sends the same body, one request after another, to the raw server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BODY = b'{"model": "m", "input": "how do I return a parcel that never arrived?", "dimensions": 256}'
ANSWER = json.dumps(
    {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [round(i / 7919 - 0.01, 9) for i in range(256)]}],
        "model": "m",
        "usage": {"prompt_tokens": 9, "total_tokens": 9},
    }
).encode()
LUA = f"""wrk.method = "POST"
wrk.body = '{BODY.decode()}'
wrk.headers["Content-Type"] = "application/json"
"""
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: " + str(len(ANSWER)).encode() + b"\r\n\r\n"
)


async def asgi(scope, receive, send):  # noqa: ANN001, ANN201
    """A bare ASGI application, without a framework."""
    import orjson

    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    orjson.loads(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


class Raw(asyncio.Protocol):
    """httptools (llhttp) under an asyncio.Protocol: nothing between the parser and the handler."""

    def connection_made(self, transport):  # noqa: ANN001, ANN201
        import httptools
        import orjson

        self.transport, self.parser, self.loads, self.body = (
            transport,
            httptools.HttpRequestParser(self),
            orjson.loads,
            b"",
        )

    def data_received(self, data):  # noqa: ANN001, ANN201
        self.parser.feed_data(data)

    def on_body(self, body):  # noqa: ANN001, ANN201
        self.body += body

    def on_message_complete(self):  # noqa: ANN201
        self.loads(self.body)
        self.body = b""
        self.transport.write(HEAD + ANSWER)


def serve_raw(port: int) -> None:
    import uvloop

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Raw, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(main())


def serve_aiohttp(port: int) -> None:
    import orjson
    import uvloop
    from aiohttp import web

    async def handle(request):  # noqa: ANN001, ANN202
        orjson.loads(await request.read())
        return web.Response(body=ANSWER, content_type="application/json")

    app = web.Application()
    app.router.add_post("/v1/embeddings", handle)
    uvloop.install()
    web.run_app(app, host="127.0.0.1", port=port, access_log=None, print=None, loop=uvloop.new_event_loop())


def serve_uvicorn(port: int) -> None:
    import uvicorn

    uvicorn.run(
        asgi, host="127.0.0.1", port=port, log_level="critical", access_log=False, http="httptools", loop="uvloop"
    )


SERVERS = {"asyncio.Protocol + httptools": "raw", "uvicorn + httptools, bare ASGI": "uvicorn",
           "granian, bare ASGI": "granian", "aiohttp": "aiohttp"}  # fmt: skip


def start(kind: str, port: int) -> subprocess.Popen:
    here = Path(__file__)
    if kind == "granian":
        granian = str(Path(sys.executable).with_name("granian"))
        argv = [
            granian, "--interface", "asginl", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-ws",
            "--loop", "uvloop", "--log-level", "critical", f"{here.stem}:asgi",
        ]  # fmt: skip
    else:
        argv = [sys.executable, str(here), "--serve", kind, "--port", str(port)]
    process = subprocess.Popen(["taskset", "-c", "0", *argv], cwd=here.parent, stderr=subprocess.DEVNULL)
    import socket

    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise SystemExit(f"{kind} did not start")


def wrk(port: int, connections: int, seconds: int) -> tuple[float, float]:
    """Requests a second, and the median latency in milliseconds."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        script.write(LUA)
        script.flush()
        out = subprocess.run(
            ["taskset", "-c", "1", "wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", script.name,
             f"http://127.0.0.1:{port}/v1/embeddings"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    value, unit = re.search(r"50%\s+([\d.]+)(us|ms|s)", out).groups()
    return float(re.search(r"Requests/sec:\s+([\d.]+)", out)[1]), float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]


class RawClient(asyncio.Protocol):
    """A keep-alive connection: one request at a time, the answer parsed by httptools."""

    def connection_made(self, transport):  # noqa: ANN001, ANN201
        import httptools

        self.transport, self.parser, self.parts = transport, httptools.HttpResponseParser(self), []

    def data_received(self, data):  # noqa: ANN001, ANN201
        self.parser.feed_data(data)

    def on_body(self, body):  # noqa: ANN001, ANN201
        self.parts.append(body)

    def on_message_complete(self):  # noqa: ANN201
        self.done.set_result(b"".join(self.parts))
        self.parts = []

    async def post(self, head: bytes, body: bytes) -> bytes:
        self.done = asyncio.get_running_loop().create_future()
        self.transport.write(head + body)
        return await self.done


async def client(kind: str, port: int, count: int) -> list[float]:
    """Seconds of each of `count` requests."""
    url, headers = f"http://127.0.0.1:{port}/v1/embeddings", {"content-type": "application/json"}
    if kind == "raw":
        _, link = await asyncio.get_running_loop().create_connection(RawClient, "127.0.0.1", port)
        head = (f"POST /v1/embeddings HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
                f"content-length: {len(BODY)}\r\n\r\n").encode()  # fmt: skip
        return await timed(lambda: link.post(head, BODY), count)
    if kind == "aiohttp":
        import aiohttp

        async with aiohttp.ClientSession(skip_auto_headers=["User-Agent"]) as session:

            async def send() -> bytes:
                async with session.post(url, data=BODY, headers=headers) as answer:
                    return await answer.read()

            return await timed(send, count)
    import httpx

    async with httpx.AsyncClient(trust_env=False) as session:

        async def send() -> bytes:
            return (await session.post(url, content=BODY, headers=headers)).content

        return await timed(send, count)


async def timed(send, count: int) -> list[float]:  # noqa: ANN001
    out = []
    for i in range(count + 200):
        began = time.perf_counter()
        assert await send() == ANSWER
        if i >= 200:
            out.append(time.perf_counter() - began)
    return out


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--serve")
    options.add_argument("--client")
    options.add_argument("--port", type=int, default=18431)
    options.add_argument("--seconds", type=int, default=3)
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    if args.serve:
        globals()[f"serve_{args.serve}"](args.port)
        return
    if args.client:
        import uvloop

        print(statistics.median(uvloop.run(client(args.client, args.port, 3000))))
        return
    if not shutil.which("wrk"):
        raise SystemExit("wrk is missing: apt-get install wrk")
    servers, clients = {}, {}
    for offset, (name, kind) in enumerate(SERVERS.items()):
        process = start(kind, args.port + offset)
        try:
            wrk(args.port + offset, 8, 1)
            many, _ = wrk(args.port + offset, 32, args.seconds)
            _, alone = wrk(args.port + offset, 1, args.seconds)
            servers[name] = {"requests_per_s": round(many), "p50_ms_alone": round(alone, 3)}
            if kind == "raw":
                for which in ("raw", "aiohttp", "httpx"):
                    argv = ["taskset", "-c", "1", sys.executable, __file__, "--client", which, "--port", str(args.port)]
                    clients[which] = round(
                        1e3 * float(subprocess.run(argv, capture_output=True, text=True, check=True).stdout), 3
                    )
        finally:
            process.terminate()
            process.wait(10)
    if args.json:
        print(json.dumps({"servers": servers, "clients_p50_ms": clients, "cores": os.cpu_count()}))
        return
    print("| server, one process | requests/s, 32 connections | p50 alone, ms |\n|---|---|---|")
    for name, row in servers.items():
        print(f"| {name} | {row['requests_per_s']:,} | {row['p50_ms_alone']} |")
    print("\n| client | p50 of one request to the first server, ms |\n|---|---|")
    for name, value in clients.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
