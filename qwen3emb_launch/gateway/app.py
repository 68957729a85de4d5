"""The routes: who may call what, and what is counted and logged of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import unquote

from qwen3emb_launch import __version__
from qwen3emb_launch.gateway import browsers, openapi
from qwen3emb_launch.gateway import metrics as prometheus
from qwen3emb_launch.gateway.access_log import AccessLog
from qwen3emb_launch.gateway.api_errors import ApiError
from qwen3emb_launch.gateway.embeddings import Embeddings, Served
from qwen3emb_launch.gateway.http_messages import Request, Response, error_response, json_response
from qwen3emb_launch.gateway.http_server import HttpServer
from qwen3emb_launch.gateway.keys import Client, Keyring
from qwen3emb_launch.gateway.metrics import Metrics
from qwen3emb_launch.gateway.peers import Peers
from qwen3emb_launch.gateway.tracing import Tracing
from qwen3emb_launch.gateway.upstream import UpstreamPool, described_by_all

log = logging.getLogger(__name__)

ANYBODY = Client("")
UI = Path(__file__).with_name("data") / "ui.html"
SMALL_BODY = 64 << 10  # bytes that routes without use for a body take and drop
GETS = frozenset({"GET", "HEAD"})
Route = Callable[[Request], "Response | Awaitable[Response]"]


class App:
    """One worker's requests."""

    def __init__(
        self,
        endpoint: Embeddings,
        pool: UpstreamPool,
        counted: Metrics,
        *,
        keys: Keyring,
        loopback: bool,
        access_log: AccessLog | None = None,
        price: tuple[str, float, str] | None = None,
        worker: int = 0,
        peers: Peers | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.pool = pool
        self.metrics = counted
        self.keys = keys
        self.loopback = loopback
        self.access_log = access_log
        self.price = price
        self.server: HttpServer | None = None
        self.tracing = tracing
        self.created = int(time.time())
        self.worker = worker
        self.stopping = False
        self.allow_hosts: tuple[str, ...] = ()
        self.peers = peers or Peers()
        self._routes: dict[str, tuple[frozenset[str], Route]] = {
            "/v1/models": (GETS, self._models),
            "/health": (GETS, self._health),
            "/ready": (GETS, self._ready),
            "/openapi.json": (GETS, self._openapi),
            "/metrics": (GETS, self._operators(self._metrics)),
            "/ui": (GETS, self._operators(self._ui)),
            "/ui/state": (GETS, self._operators(self._state)),
        }

    # -- in

    def early(self, request: Request) -> None:
        """Before a body is read: strangers and other people's web pages get no further. Raises ApiError."""
        embeds = request.path == "/v1/embeddings" and request.method == "POST"  # a preflight brings no key
        try:
            if len(self.keys):
                if embeds:
                    self._who(request)
            else:
                origins = self.server.cors_origins if self.server else ()
                browsers.check(request, loopback=self.loopback, hosts=self.allow_hosts, origins=origins)
        except ApiError as error:
            if embeds:
                self._failed(request, ANYBODY, self._served(request), error)
            raise
        if not embeds:
            request.body_limit = SMALL_BODY

    def early_operator(self, request: Request) -> None:
        """The same on the operators' own port, which is on loopback and wants no key."""
        browsers.check(request, loopback=True, hosts=self.allow_hosts, origins=())

    def handle(self, request: Request) -> Response | Awaitable[Response]:
        """The public handler. Raises nothing: errors are answers."""
        if request.path == "/v1/embeddings" and request.method == "POST":
            return self._embeddings(request)
        try:
            return self._other(request)
        except ApiError as error:
            return error_response(error)

    def operator(self, request: Request) -> Response | Awaitable[Response]:
        """The handler of the operators' own port: the same without the need for a key, without embeddings."""
        routes: dict[str, Route] = {
            "/metrics": self._metrics, "/ui": self._ui, "/ui/state": self._state,
            "/health": self._health, "/ready": self._ready,
        }  # fmt: skip
        route = routes.get(request.path)
        if route is None or request.method not in GETS:
            return error_response(ApiError(404, "not_found", "this port has /metrics, /ui, /health and /ready"))
        return route(request)

    def _other(self, request: Request) -> Response | Awaitable[Response]:
        if request.method == "OPTIONS" and self.server is not None and self.server.cors_origins:
            allowed = {"access-control-allow-methods": "GET, POST", "access-control-max-age": "600"}
            # Any that the page asks for: OpenAI's client for browsers sends a dozen of its own.
            asked = request.headers.get("access-control-request-headers", "authorization, content-type")
            allowed["access-control-allow-headers"] = asked
            return Response(204, b"", headers=allowed)
        if request.path == "/v1/embeddings":
            raise ApiError(405, "method_not_allowed", f"{request.method[:20]} is not for /v1/embeddings: POST is")
        route = self._routes.get(request.path)
        if route is None and request.path.startswith("/v1/models/"):
            route = (GETS, self._one_model)
        if route is None:
            raise ApiError(404, "not_found", f"there is nothing at {request.path[:100]!r}")
        methods, handler = route
        if request.method not in methods:
            raise ApiError(405, "method_not_allowed", f"{request.method[:20]} is not for {request.path[:100]}: GET is")
        return handler(request)

    def _who(self, request: Request) -> Client:
        return self.keys.who(request.headers.get("authorization")) if len(self.keys) else ANYBODY

    def _operators(self, handler: Route) -> Route:
        """On the public port: for an admin key, or for anybody on loopback when there are no keys at all."""

        def guarded(request: Request) -> Response | Awaitable[Response]:
            if len(self.keys):
                if not self._who(request).admin:
                    raise ApiError(403, "admin_key_needed", "this needs a key marked `admin`, or the admin port")
            elif not self.loopback:
                raise ApiError(
                    403, "admin_key_needed", "this is served on the admin port, or with API keys to an admin"
                )
            return handler(request)

        return guarded

    # -- embeddings

    def _served(self, request: Request) -> Served:
        return Served(span=self.tracing.request(request.headers) if self.tracing is not None else None)

    def _embeddings(self, request: Request) -> Response | Awaitable[Response]:
        served = self._served(request)
        client = ANYBODY
        try:
            client = self._who(request)
            if self.stopping:
                raise ApiError(503, "shutting_down", "the gateway is stopping", retry_after=1)
            answer = self.endpoint.handle(request, client, served)
        except ApiError as error:
            return self._failed(request, client, served, error)
        if isinstance(answer, Response):
            self._count(request, client, served, 200, "")
            return answer
        return self._embeddings_later(request, client, served, answer)

    async def _embeddings_later(
        self, request: Request, client: Client, served: Served, answer: Awaitable[Response]
    ) -> Response:
        try:
            response = await answer
        except ApiError as error:
            return self._failed(request, client, served, error)
        except asyncio.CancelledError:
            self._count(request, client, served, 499, "client")
            raise
        except Exception:
            log.exception("an embedding request failed inside the gateway")
            failure = ApiError(500, "internal_error", "the gateway failed; its log says why")
            return self._failed(request, client, served, failure)
        self._count(request, client, served, 200, "")
        return response

    def _failed(self, request: Request, client: Client, served: Served, error: ApiError) -> Response:
        self._count(request, client, served, error.status, error.source, error.code)
        return error_response(error)

    def _count(
        self, request: Request, client: Client, served: Served, status: int, source: str, code: str = ""
    ) -> None:
        self.metrics.requests[status, source] += 1
        if self.tracing is not None:
            about = {"items": served.items, "cache_hits": served.hits, "task": served.task, "client": client.name}
            spoken = {f"qwen3emb.{name}": value for name, value in about.items()}
            spoken["gen_ai.usage.input_tokens"] = served.tokens
            self.tracing.answered(served.span, status, code, spoken)
        if self.access_log is None:
            return
        row: dict[str, Any] = {
            "peer": request.peer, "key": client.name, "status": status,
            "ms": round(1e3 * (monotonic() - request.received), 3), "items": served.items, "hits": served.hits,
            "tokens": served.tokens, "task": served.task, "body_bytes": len(request.body),
        }  # fmt: skip
        if code:
            row["error"], row["source"] = code, source
        self.access_log.write(row)

    # -- the rest of the API

    def _models(self, request: Request) -> Response:
        self._who(request)
        names = list(self.endpoint.names)
        aliases = [f"{name}:{task}" for name in names[:1] for task in self.endpoint.tasks.tasks]
        return json_response({"object": "list", "data": [self._model_row(n) for n in (*names, *aliases)]})

    def _one_model(self, request: Request) -> Response:
        self._who(request)
        name = unquote(request.path.removeprefix("/v1/models/"))
        if name.partition(":")[0] not in self.endpoint.names:
            raise ApiError(404, "model_not_found", f"no model {name[:80]!r} here", param="model")
        self.endpoint.tasks.choose(name)  # refuses a task or role that there is not
        return json_response(self._model_row(name))

    def _model_row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"id": name, "object": "model", "created": self.created, "owned_by": "qwen3emb"}
        if self.endpoint.model is not None:
            task = self.endpoint.tasks.choose(name).task
            row["dimensions"] = task.dims if task is not None and task.dims else self.endpoint.model.width
            if self.endpoint.rules.max_tokens is not None:  # the engine's own, which may be less than the model's
                row["max_input_tokens"] = self.endpoint.rules.max_tokens
            said = self.pool.arithmetic
            row |= {k: v for k, v in (("dtype", said.dtype), ("quantization", said.quantization)) if v}
        return row

    def _openapi(self, _: Request) -> Response:
        endpoint = self.endpoint
        width = endpoint.model.width if endpoint.model else 0
        dims = (min(endpoint.min_dims, width), width) if width else None
        return json_response(openapi.document(dims, endpoint.max_items, endpoint.rules.highest_id))

    def _health(self, _: Request) -> Response:
        """The gateway itself lives."""
        return json_response({"status": "ok"})

    def _ready(self, _: Request) -> Response:
        """Whether an embedding would be answered now: an engine is up. No addresses: this needs no key."""
        up = len(self.pool.up)
        body = {"ready": bool(up) and not self.stopping, "upstreams_up": up, "upstreams": len(self.pool.upstreams)}
        return json_response(body, 200 if body["ready"] else 503, {} if body["ready"] else {"retry-after": "1"})

    # -- for operators

    def snapshot(self) -> dict[str, float]:
        """This worker's series, gauges included."""
        out = self.metrics.snapshot()
        model = self.endpoint.model
        if model is not None:
            cache = model.cache
            out["qwen3emb_cache_entries"] = len(cache)
            out["qwen3emb_cache_bytes"] = cache.used_bytes
            out["qwen3emb_cache_evictions_total"] = cache.counts.evicted
            out["qwen3emb_queue_items"] = model.batcher.queued
            out["qwen3emb_in_air_items"] = model.batcher.in_air
        out["qwen3emb_connections"] = len(self.server.connections) if self.server else 0
        for upstream in self.pool.upstreams.values():
            url = prometheus.label(upstream.url)
            out[f'qwen3emb_upstream_up{{url="{url}"}}'] = int(upstream.state == "up")
            out[f'qwen3emb_upstream_calls_total{{url="{url}",result="answered"}}'] = upstream.answered_calls
            out[f'qwen3emb_upstream_calls_total{{url="{url}",result="failed"}}'] = upstream.failed_calls
        if self.price is not None:
            name, per_million, currency = self.price
            labels = f'api="{prometheus.label(name)}",currency="{prometheus.label(currency)}"'
            out[f"qwen3emb_saved_money_total{{{labels}}}"] = self.metrics.tokens * per_million / 1e6
        return out

    def numbers(self) -> dict[str, Any]:
        """What the other workers are told for /metrics and /ui."""
        return {
            "worker": self.worker,
            "series": self.snapshot(),
            "recent_s": self.metrics.recent_seconds(60.0),
            "upstreams": [u.describe() for u in self.pool.upstreams.values()],
        }

    async def _workers(self) -> list[dict[str, Any]]:
        """The numbers of all workers that answer, this one's first."""
        return [self.numbers(), *(await self.peers.all("GET", "/metrics"))]

    async def _metrics(self, _: Request) -> Response:
        """Of several workers each for itself: of one that is started again, or does not answer for once, their sum
        would fall, which Prometheus takes for a restart of all."""
        if self.peers.sockets:
            series = prometheus.by_worker({w["worker"]: w["series"] for w in await self._workers()})
        else:
            series = self.snapshot()
        return Response(200, prometheus.render(series).encode(), "text/plain; version=0.0.4; charset=utf-8")

    def _ui(self, _: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"content-security-policy": policy, "x-frame-options": "DENY", "cache-control": "no-store"}
        return Response(200, UI.read_bytes(), "text/html; charset=utf-8", headers)

    async def _state(self, _: Request) -> Response:
        """What the status page shows."""
        workers = await self._workers()
        recent = sorted(seconds for w in workers for seconds in w["recent_s"])
        body = {
            "version": __version__,
            "uptime_s": round(monotonic() - self.metrics.started, 1),
            "models": self.endpoint.names,
            "p50_ms": _percentile(recent, 0.50),
            "p95_ms": _percentile(recent, 0.95),
            "upstreams": described_by_all([w["upstreams"] for w in workers]),
            "price": self.price and {"api": self.price[0], "per_million": self.price[1], "currency": self.price[2]},
            "series": prometheus.add_up(w["series"] for w in workers),
        }
        return json_response(body, headers={"cache-control": "no-store"})


def _percentile(ordered: list[float], share: float) -> float | None:
    """In milliseconds; None when nothing was answered lately."""
    return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
