"""The admin socket: upstreams added, drained and removed while requests run, the model changed on purpose.

HTTP on a Unix socket that only its owner may open:

    GET    /state                                        of all workers: an upstream is up when all have it up
    POST   /upstreams   {"url": ..., "api_key": ...}     add, or bring back from draining
    POST   /drain       {"url": ..., "timeout": 30}      nothing new for it; answers when nothing is in the air
    DELETE /upstreams   {"url": ..., "timeout": 30}      drain and forget
    POST   /new-model   {"fingerprint": ..., "upstreams": [URL, ...]}
                                                         forget all vectors, prove the upstreams again; the list, when
                                                         given, replaces the old ones; nothing in work is lost
    POST   /reload                                       tasks and keys
    GET    /metrics, /settings                           of this worker: numbers; what a restarted worker takes over

Any worker may be told: it tells the others, and its answer speaks for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import orjson

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.admin_client import OWN
from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.gateway.config import UpstreamConfig
from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.http_messages import Request, Response, json_response
from qwen3emb_launch.gateway.upstream import described_by_all

if TYPE_CHECKING:
    from qwen3emb_launch.gateway.service import Service

LONGEST = 7_200.0  # seconds another worker may take over a change: each change has a bound of its own
Change = dict[str, Any] | Awaitable[dict[str, Any]]


class Admin:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._changes: dict[tuple[str, str], Callable[[dict[str, Any]], Change]] = {
            ("POST", "/upstreams"): self._add,
            ("DELETE", "/upstreams"): self._remove,
            ("POST", "/drain"): self._drain,
            ("POST", "/new-model"): self._new_model,
        }

    def handle(self, request: Request) -> Response | Awaitable[Response]:
        """Raises ApiError."""
        service = self._service
        alone = OWN in request.headers or not service.peers.sockets
        match request.method, request.path:
            case "GET", "/metrics":
                return json_response(service.app.numbers())
            case "GET", "/settings":
                return json_response(service.settings())
            case "GET", "/state":
                return json_response(service.state()) if alone else self._state_of_all()
            case "POST", "/reload":
                return self._answer(self._reload()) if alone else self._everywhere(request, {}, self._reload())
        change = self._changes.get((request.method, request.path))
        if change is None:
            raise ApiError(404, "not_found", f"the admin socket has no {request.method} {request.path}")
        body = _body(request)
        answer = change(body)
        return self._answer(answer) if alone else self._everywhere(request, body, answer)

    async def _reload(self) -> dict[str, Any]:
        await self._service.reload()
        return self._service.state()

    async def _answer(self, answer: Change) -> Response:
        return json_response(answer if isinstance(answer, dict) else await answer)

    async def _everywhere(self, request: Request, body: dict[str, Any], answer: Change) -> Response:
        """The same in all workers at once; drained when it is drained in all."""
        others = self._service.peers.all(request.method, request.path, body, LONGEST)

        async def here() -> dict[str, Any]:
            return answer if isinstance(answer, dict) else await answer

        mine, theirs = await asyncio.gather(here(), others)
        if "drained" in mine:
            mine["drained"] = mine["drained"] and all(t["drained"] for t in theirs)
        return json_response(mine)

    async def _state_of_all(self) -> Response:
        theirs = await self._service.peers.all("GET", "/state")
        return json_response(state_of_all([self._service.state(), *theirs]))

    def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        key = body.get("api_key")
        if key is not None and not isinstance(key, str):
            raise invalid("'api_key' must be a string", "api_key")
        return self._service.add_upstream(UpstreamConfig(_address(body).url, key)).describe()

    def _drain(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        url, timeout = _address(body).url, _timeout(body, self._service.config.drain)
        return self._drained(url, self._service.pool.drain(url, timeout))

    def _remove(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        url, timeout = _address(body).url, _timeout(body, self._service.config.drain)
        return self._drained(url, self._service.pool.remove(url, timeout))

    async def _drained(self, url: str, draining: Awaitable[bool]) -> dict[str, Any]:
        return {"url": url, "drained": await draining}

    def _new_model(self, body: dict[str, Any]) -> Awaitable[dict[str, Any]]:
        fingerprint = body.get("fingerprint", "")
        if not isinstance(fingerprint, str):
            raise invalid("'fingerprint' must be a string", "fingerprint")
        urls = body.get("upstreams")
        if urls is not None and not isinstance(urls, list):
            raise invalid("'upstreams' must be a list of addresses", "upstreams")
        new = None if urls is None else [UpstreamConfig(_address({"url": url}).url) for url in urls]
        return self._changed_model(fingerprint, new)

    async def _changed_model(self, fingerprint: str, upstreams: list[UpstreamConfig] | None) -> dict[str, Any]:
        await self._service.new_model(fingerprint, upstreams)
        return self._service.state()


def state_of_all(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several workers' states as one: counts added up, an upstream as far as the last of them."""
    out = dict(states[0])
    for name in ("workers", "queued", "in_air"):
        out[name] = sum(s[name] for s in states)
    out["ready"] = all(s["ready"] for s in states)
    out["upstreams"] = described_by_all([s["upstreams"] for s in states])
    return out


def _body(request: Request) -> dict[str, Any]:
    try:
        data = orjson.loads(request.body)
    except orjson.JSONDecodeError as exc:
        raise invalid(f"the body is not JSON: {exc}") from None
    if not isinstance(data, dict):
        raise invalid("the body must be a JSON object")
    return data


def _address(body: dict[str, Any]) -> Address:
    try:
        return Address.parse(str(body.get("url", "")))
    except InvalidInputError as error:
        raise invalid(error.message, "url", error.code) from None


def _timeout(body: dict[str, Any], default: float) -> float:
    value = body.get("timeout", default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 3600:
        raise invalid("'timeout' must be seconds between 0 and 3600", "timeout")
    return float(value)
