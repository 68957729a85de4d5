"""The endpoint under test over HTTP, and what it says of itself. The only file here that talks to it.

Nothing is retried: a request that fails one time in five is what a verification looks for. Every well-formed
request is counted with its outcome.
"""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from qwen3emb_launch.addresses import is_loopback, unknown_host, web_address
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, NetworkError
from qwen3emb_launch.vectors import from_base64
from qwen3emb_launch.verify.tally import LONG, Shape, Tally

NUMBERS = {float, int, type(None)}  # of JSON, in a vector; null stands for NaN
LARGEST = 64 << 20  # bytes of an answer: a hundred vectors of 4096 numbers are 9 MB
REFRESH = {"x-qwen3emb-cache": "refresh"}
ENDLESS = "the answer does not end: this is no embeddings route, or a broken proxy"
Inputs = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


class Misanswer(CheckFailedError):  # noqa: N818 - what the endpoint did, not an error of ours
    """A well-formed request that was not answered as the API says. `cause` names the likely fault."""

    def __init__(self, message: str, cause: str, refused: bool = False) -> None:
        super().__init__("misanswer", message)
        self.cause = cause
        self.refused = refused  # with 400, 413 or 422, as for a text that is too long


@dataclass(frozen=True)
class Reply:
    """One HTTP answer. `data` is its JSON (NaN allowed, as Python reads it) or None; `seconds` until the last byte."""

    status: int
    data: Any
    text: str
    headers: Mapping[str, str]
    seconds: float

    @property
    def message(self) -> str:
        """The error's own words, in OpenAI's nested form or flat, else the start of the body."""
        body = self.data if isinstance(self.data, dict) else {}
        nested = body.get("error")
        found = nested.get("message") if isinstance(nested, dict) else nested or body.get("message")
        return printable(str(found or self.text).strip()[:200])


def printable(text: str) -> str:
    """On one line, without what a terminal takes as a command: the words of a server that nobody has proven yet."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass(frozen=True)
class Embeddings:
    """A well-formed answer: one vector an input, in the order of the answer; a null component is NaN."""

    vectors: tuple[tuple[float, ...], ...]
    indices: tuple[Any, ...]
    tokens: int | None
    seconds: float
    base64: bool
    headers: Mapping[str, str]
    total: int | None = None
    model: Any = None


def normalised_url(url: str) -> str:
    """The base URL as the OpenAI client takes it, without a trailing slash.

    Raises InvalidInputError (`bad_url`) for what is no http(s) address.
    """
    url = url.strip().rstrip("/")
    parts = web_address(url)
    if parts is None:
        raise InvalidInputError(
            "bad_url", f"{url!r} is no http(s) address", "give it as the OpenAI client takes it: http://HOST:PORT/v1"
        )
    if "@" in parts.netloc:
        raise InvalidInputError(
            "bad_url",
            f"the address of {parts.hostname} holds a name or password, which reports and process lists would show",
            "give the key by --api-key-file FILE or OPENAI_API_KEY",
        )
    return url.removesuffix("/embeddings")


def tls(url: str) -> ssl.SSLContext | bool:
    """What a client checks certificates by. Reading the authorities takes 30 ms: not done for http on this machine.

    The context of such an address trusts nobody, so a redirect to https fails instead of going unchecked.
    """
    plain = urlsplit(url).scheme == "http" and is_loopback(url)  # elsewhere a proxy may be asked by https
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else True


class Contact:
    """An OpenAI-compatible endpoint. Safe to use from several threads."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 60.0) -> None:
        import httpx

        self.base_url = normalised_url(base_url)
        self.timeout = timeout
        self.tally = Tally()
        self.model = ""
        self.unanswered = 0  # embedding requests in a row without any HTTP answer
        self._key = api_key
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
            trust_env=not is_loopback(self.base_url),
            verify=tls(self.base_url),
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=64),
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @property
    def root(self) -> str:
        """The server's own address, where SGLang's and vLLM's information routes are."""
        return self.base_url.removesuffix("/v1")

    def get(self, url: str) -> Reply:
        """A GET of an absolute URL. Raises NetworkError when there is no HTTP answer."""
        return self._send("GET", url, None, None)

    def post(self, route: str, body: Any, timeout: float | None = None, *, cached: bool = True) -> Reply:
        """A POST below the base URL: `body` as JSON, or bytes sent as they are. Not `cached`: see `embed`."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._send("POST", f"{self.base_url}/{route}", raw, timeout, {} if cached else REFRESH)

    def tokenize(self, text: str) -> Reply:
        """The token ids of a text by SGLang's or vLLM's own route, beside the base URL."""
        raw = json.dumps({"model": self.model, "prompt": text}).encode()
        return self._send("POST", f"{self.root}/tokenize", raw, None)

    def _send(
        self, method: str, url: str, body: bytes | None, timeout: float | None, more: Mapping[str, str] | None = None
    ) -> Reply:
        import httpx

        headers = {"content-type": "application/json", **(more or {})} if body is not None else {}
        limit: Any = timeout if timeout is not None else httpx.USE_CLIENT_DEFAULT
        began = time.perf_counter()
        content = bytearray()
        try:
            with self._client.stream(method, url, content=body, headers=headers, timeout=limit) as answer:
                for piece in answer.iter_bytes():
                    content += piece
                    if len(content) > LARGEST:
                        raise NetworkError("endpoint_endless", f"{url} answers more than {LARGEST >> 20} MiB", ENDLESS)
                    if time.perf_counter() - began > (timeout or self.timeout):  # httpx's own is for each piece
                        raise httpx.ReadTimeout("a byte now and then")
        except httpx.TimeoutException as exc:
            waited = time.perf_counter() - began
            raise NetworkError(
                "endpoint_timeout",
                f"{url} did not answer within {waited:.1f} s ({type(exc).__name__})",
                "is the engine loaded and idle? `qwen3emb status`; --timeout gives it longer",
            ) from exc
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as exc:  # UnicodeError: a name that IDNA refuses
            raise unknown_host(exc, url, proxies=not is_loopback(url)) or NetworkError(
                "endpoint_unreachable",
                f"{url} does not answer: {exc}",
                "is the address right and the engine up? `qwen3emb status`, `qwen3emb up`",
            ) from exc
        seconds = time.perf_counter() - began
        text = content[:8000].decode(errors="replace")[:2000]
        return Reply(answer.status_code, _json(content), text, dict(answer.headers), seconds)

    def embed(
        self,
        inputs: Inputs,
        *,
        dims: int | None = None,
        encoding: str | None = None,
        timeout: float | None = None,
        may_refuse: bool = False,
        cached: bool = False,
    ) -> Embeddings:
        """A well-formed embedding request. Raises Misanswer when it is not answered as the API says.

        Unless it may be `cached`, qwen3emb's gateway computes it anew: out of its cache a text asked alone and the
        same in a batch are one vector, whatever the engine makes of batches. Others do not know that header.
        `may_refuse`: the text may be too long for this endpoint, so a refusal is not counted as a failure.
        """
        body: dict[str, Any] = {"model": self.model, "input": inputs}
        if dims is not None:
            body["dimensions"] = dims
        if encoding is not None:
            body["encoding_format"] = encoding
        many = not isinstance(inputs, str) and bool(inputs) and not isinstance(inputs[0], int)
        texts = list(inputs) if many else [inputs]
        busy = self.tally.begin()
        try:
            reply = self.post("embeddings", body, timeout, cached=cached)
        except NetworkError as exc:
            self.unanswered += 1
            self.tally.count(f"{exc.code}: {exc.message}")
            raise Misanswer(exc.message, _no_answer(exc)) from exc
        finally:
            busy |= self.tally.end()
        self.unanswered = 0
        refused = reply.status in (400, 413, 422)
        failed = reply.status != 200 and not (refused and may_refuse)
        self.tally.count(f"{reply.status}: {reply.message}" if failed else None)
        if reply.status != 200:
            cause = _refusal(reply) if self.model else "the endpoint lists no model to ask for: --model ID"
            raise Misanswer(f"{reply.status}: {reply.message}", cause, refused)
        found = _parsed(reply, len(texts))
        if found.base64 and encoding != "base64":
            raise Misanswer(
                "base64 strings, although numbers were asked",
                "base64 is answered unasked: clients without a decoder cannot read it",
            )
        long = any(isinstance(t, str) and len(t.encode()) > LONG for t in texts)
        shape = Shape(batch=len(texts) > 1, dims=dims is not None, base64=found.base64, long=long, busy=busy)
        self.tally.look_at(shape, texts, found.vectors, found.indices, found.model)
        return found

    def openai_vector(self, text: str) -> tuple[float, ...]:
        """One vector through the official client with its own defaults (it asks for base64)."""
        import openai

        with openai.OpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",
            max_retries=0,
            timeout=self.timeout,
            http_client=openai.DefaultHttpxClient(trust_env=not is_loopback(self.base_url), verify=tls(self.base_url)),
        ) as client:
            try:
                answer = client.embeddings.create(model=self.model, input=text)
                vector = _vector(answer.data[0].embedding) if answer.data else ()
            except (openai.OpenAIError, AttributeError, TypeError, ValueError) as exc:  # of what it takes unlooked at
                self.tally.count(f"through openai: {exc}")
                raise Misanswer(f"the OpenAI client raises {type(exc).__name__}: {exc}", "not OpenAI's form") from exc
            self.tally.count(None)
            return vector


def _json(body: bytes | bytearray) -> Any:
    """The body's JSON, None when it is none. 2,560 numbers take orjson 0.06 ms, json 0.5; json alone reads NaN."""
    import orjson

    for read in (orjson.loads, json.loads):
        try:
            return read(body)
        except (ValueError, RecursionError):
            continue
    return None


def _no_answer(exc: NetworkError) -> str:
    if exc.code == "endpoint_endless":
        return ENDLESS
    if exc.code == "endpoint_timeout":
        return "the request was queued for ever or the engine hangs: an input longer than the KV pool does that"
    return "the server closed the connection or is gone: it may have died on an earlier request"


def _refusal(reply: Reply) -> str:
    words = reply.message.lower()
    if reply.status in (401, 403):
        return "the endpoint wants another API key: --api-key-file FILE or OPENAI_API_KEY"
    if "matryoshka" in words:
        override = "--json-model-override-args '{\"is_matryoshka\": true}'"
        return f"the engine was started without the matryoshka override: {override}"
    if "dimension" in words:
        return "the endpoint refuses these `dimensions`, which the model has"
    if reply.status == 400 and "embedding" in words:
        return "the engine does not serve this checkpoint as an embedding model: start it with --is-embedding"
    if "not json compliant" in words or "out of range float" in words:
        return "the vector holds NaN or infinities, which JSON cannot carry"
    if reply.status == 429 or reply.status == 503:
        return "the endpoint sheds load; ask again when it is idle"
    return "the endpoint fails well-formed requests" if reply.status >= 500 else "the endpoint refuses a right request"


def _vector(values: Sequence[Any]) -> tuple[float, ...]:
    """JSON's numbers; null is NaN, and an int of hundreds of digits infinite."""
    try:
        return tuple(map(float, values))
    except (TypeError, OverflowError):
        return tuple(float("nan") if x is None else float("inf") if abs(x) > 1e308 else float(x) for x in values)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parsed(reply: Reply, count: int) -> Embeddings:
    body = reply.data
    if not isinstance(body, dict) or not isinstance(body.get("data"), list):
        raise Misanswer(
            f"200 without a data list: {printable(reply.text[:120])}", "this is no OpenAI-compatible embeddings route"
        )
    items = body["data"]
    if len(items) != count:
        cause = "items of a batch are dropped" if len(items) < count else "more vectors than inputs are answered"
        raise Misanswer(f"{len(items)} vectors for {count} inputs", cause)
    vectors, coded = [], False
    for item in items:
        value = item.get("embedding") if isinstance(item, dict) else None
        if isinstance(value, str):
            coded = True
            try:
                vectors.append(tuple(from_base64(value)))
            except ValueError as exc:
                raise Misanswer(f"an embedding is a string that is {exc}", "broken base64") from exc
        elif isinstance(value, list) and value and {*map(type, value)} <= NUMBERS:
            vectors.append(_vector(value))
        else:
            raise Misanswer(f"an embedding is {str(value)[:60]!r}", "an embedding must be a list of numbers or base64")
    usage = body.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    return Embeddings(
        vectors=tuple(vectors),
        indices=tuple(item.get("index") for item in items),
        tokens=_whole(counted.get("prompt_tokens")),
        total=_whole(counted.get("total_tokens")),
        seconds=reply.seconds,
        base64=coded,
        headers=reply.headers,
        model=body.get("model"),
    )
