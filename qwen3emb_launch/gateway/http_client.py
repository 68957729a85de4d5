"""HTTP/1.1 towards an engine: keep-alive connections, one request at a time on each, the answer parsed by llhttp."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import httptools
import orjson

from qwen3emb_launch.addresses import unknown_host, web_address
from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.vectors_in import BadAnswerError

CONNECT_TIMEOUT = 5.0
MAX_ANSWER = 16 << 20  # bytes, where the caller expects no more


class EngineGoneError(Exception):
    """The connection could not be made, or broke. `sent` when the request had left."""

    def __init__(self, message: str, *, sent: bool, stale: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.stale = stale


@dataclass(frozen=True)
class Address:
    """An engine's base URL as the OpenAI client takes it (ending in /v1), taken apart once."""

    url: str
    host: str
    port: int
    prefix: str
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises InvalidInputError (`bad_upstream`)."""
        parts = web_address(url)
        if parts is None or parts.query or parts.fragment or parts.username is not None:
            raise InvalidInputError(
                "bad_upstream",
                f"{url!r} is no upstream: wanted http[s]://host[:port]/v1, without user, query or fragment",
                "qwen3emb gateway --upstream http://127.0.0.1:30000/v1",
            )
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/") or "/v1"
        clean = f"{parts.scheme}://{parts.netloc}{prefix}"
        return cls(clean, str(parts.hostname), parts.port or (443 if tls else 80), prefix, tls)

    @property
    def authority(self) -> str:
        """The Host header's value."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


@dataclass(frozen=True)
class Answer:
    """Status, lower-case headers, whole body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any] | None:
        """The body as a JSON object; None when it is something else."""
        try:
            data = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            return None
        return data if isinstance(data, dict) else None

    def retry_after(self) -> float:
        """Seconds to leave an overloaded engine alone: what it says, a tenth of a second otherwise."""
        said = self.headers.get("retry-after", "")
        return min(5.0, float(said)) if said.isascii() and said.isdigit() and int(said) > 0 else 0.1


class _Link(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.used = False
        self.watch: Watch | None = None
        self._future: asyncio.Future[Answer] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._most = 0
        self._fresh()

    def _fresh(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0
        self._started = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def send(self, data: bytes, timeout: float, most: int) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        future = self._future = loop.create_future()
        self._most = most
        if self.transport is None:
            self._fail(EngineGoneError("the engine closed the connection", sent=False, stale=True))
        else:
            self._timer = loop.call_later(timeout, self._fail, TimeoutError())
            self.transport.write(data)
        return future

    def data_received(self, data: bytes) -> None:
        if self._future is None:  # an answer that nobody asked for must not be the next request's
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self._fail(BadAnswerError(f"the engine answered something that is not HTTP: {exc}"))
            self.close()

    def on_message_begin(self) -> None:
        self._started = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._size += len(body)
        if self._size > self._most:
            self._fail(BadAnswerError(f"the engine's answer is larger than {self._most} bytes"))
            self.close()

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        keep = self._parser.should_keep_alive()
        if 100 <= status < 200:  # an interim answer: the real one follows
            self._headers, self._body = {}, []
            return
        if self._future is None:
            self.close()  # a second answer
            return
        answer = Answer(status, self._headers, self._body[0] if len(self._body) == 1 else b"".join(self._body))
        self._fresh()
        self.used = True
        if not self._future.done():
            self._future.set_result(answer)
        self._asked_no_more()
        if not keep:
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.watch is not None and self.watch.lost is not None:
            self.watch.lost()
        stale = self.used and not self._started
        self._fail(
            EngineGoneError(f"the engine closed the connection{f': {exc}' if exc else ''}", sent=True, stale=stale)
        )

    def _fail(self, error: EngineGoneError | BadAnswerError | TimeoutError) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)
        self._asked_no_more()

    def _asked_no_more(self) -> None:
        self._future = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self) -> None:
        self._asked_no_more()
        if self.transport is not None:
            self.transport.abort()
            self.transport = None


class Watch:
    """An idle connection and what to do when the other side ends it."""

    def __init__(self, link: _Link, lost: Callable[[], None]) -> None:
        self._link = link
        self.lost: Callable[[], None] | None = lost

    @property
    def alive(self) -> bool:
        """Whether the process it was opened to still holds it."""
        return self._link.transport is not None

    def close(self) -> None:
        """Watch no more."""
        self.lost = None
        self._link.close()


class HttpClient:
    """Connections to one engine."""

    def __init__(self, address: Address, api_key: str | None = None, verify_tls: bool = True) -> None:
        self.address = address
        self.api_key = api_key
        self._idle: deque[_Link] = deque()
        self._links: WeakSet[_Link] = WeakSet()  # made for requests
        self._doubt: asyncio.Event | None = None
        self._tls: ssl.SSLContext | None = None
        if address.tls:
            self._tls = ssl.create_default_context()
            if not verify_tls:
                self._tls.check_hostname = False
                self._tls.verify_mode = ssl.CERT_NONE
        auth = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        self._common = (
            f"host: {address.authority}\r\nuser-agent: qwen3emb-gateway\r\naccept: application/json\r\n{auth}"
        )

    async def request(
        self,
        method: str,
        path: str,
        body: bytes,
        timeout: float,
        more: str = "",
        most: int = MAX_ANSWER,
        *,
        root: bool = False,
    ) -> Answer:
        """Send and wait, for so long once there is a connection. `path` is below the base URL's prefix (`root`: beside
        its `/v1`), `more` whole header lines; an answer of more than `most` bytes is none.

        Raises EngineGoneError (a kept connection that the engine had closed meanwhile is replaced first), TimeoutError,
        BadAnswerError for what is not HTTP or too long.
        """
        content = "content-type: application/json\r\n" if body else ""
        prefix = self.address.prefix.removesuffix("/v1") if root else self.address.prefix
        head = (
            f"{method} {prefix}{path} HTTP/1.1\r\n{self._common}{content}{more}content-length: {len(body)}\r\n\r\n"
        ).encode("latin-1")
        taken = False  # by an engine that may have ended because of it
        while True:
            link = self._take()
            kept = link is not None
            try:
                if link is None:
                    link = await self._new()
                answer = await link.send(head + body, timeout, most)
            except EngineGoneError as error:
                if kept and error.stale:
                    taken = taken or error.sent
                    continue
                error.sent = error.sent or taken
                raise
            except BaseException:
                if link is not None:
                    link.close()  # its answer, when it comes, belongs to nobody
                raise
            if link.transport is not None:
                self._idle.append(link)
            return answer

    def _take(self) -> _Link | None:
        while self._idle:
            link = self._idle.pop()
            if link.transport is not None and not link.transport.is_closing():
                return link
        return None

    async def _new(self) -> _Link:
        if self._doubt is not None:
            await self._doubt.wait()
        link = await self._connect()
        self._links.add(link)
        return link

    async def same_process(self, within: float) -> bool:
        """Whether a connection for requests outlives these seconds, in which none is made: then the process lives that
        has answered so far."""
        if not self._linked:
            return False
        doubt = self._doubt = asyncio.Event()
        try:
            await asyncio.sleep(within)
            return self._linked
        finally:
            self._doubt = None
            doubt.set()

    @property
    def _linked(self) -> bool:
        return any(link.transport is not None for link in self._links)

    async def _connect(self) -> _Link:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                _, link = await loop.create_connection(_Link, self.address.host, self.address.port, ssl=self._tls)
        except TimeoutError:
            raise EngineGoneError(
                f"no connection to {self.address.url} within {CONNECT_TIMEOUT:g} s", sent=False
            ) from None
        except (OSError, ssl.SSLError) as exc:
            unknown = unknown_host(exc, self.address.url, proxies=False)
            says = unknown.message if unknown else f"no connection to {self.address.url}: {exc}"
            raise EngineGoneError(says, sent=False) from exc
        return link

    async def watch(self, lost: Callable[[], None]) -> Watch:
        """A connection that asks nothing: it ends when the engine's process does, which is how its death is seen at
        once, and its replacement by another process not missed. Raises EngineGoneError."""
        link = await self._connect()
        link.watch = Watch(link, lost)
        return link.watch

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            with contextlib.suppress(OSError):
                self._idle.pop().close()
