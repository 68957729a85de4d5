"""The admin socket: upstreams added, drained and removed while requests run, the model changed on purpose.

HTTP on a Unix socket that only its owner may open:

    GET    /state
    POST   /upstreams   {"url": ..., "api_key": ...}     add, or bring back from draining
    POST   /drain       {"url": ..., "timeout": 30}      nothing new for it; answers when nothing is in the air
    DELETE /upstreams   {"url": ..., "timeout": 30}      drain and forget
    POST   /new-model   {"fingerprint": ..., "upstreams": [URL, ...]}
                                                         forget all vectors, prove the upstreams again; the list, when
                                                         given, replaces the old ones; nothing in work is lost
    POST   /reload                                       tasks and keys
    GET    /metrics                                      this worker's series as JSON
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import orjson

from qwen3emb_launch.errors import InvalidInputError
from qwen3emb_launch.gateway.api_errors import ApiError, invalid
from qwen3emb_launch.gateway.config import UpstreamConfig
from qwen3emb_launch.gateway.http_client import Address
from qwen3emb_launch.gateway.http_messages import Request, Response, json_response

if TYPE_CHECKING:
    from qwen3emb_launch.gateway.service import Service


class Admin:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def handle(self, request: Request) -> Response | Awaitable[Response]:
        """Raises ApiError."""
        service = self._service
        match request.method, request.path:
            case "GET", "/state":
                return json_response(service.state())
            case "GET", "/metrics":
                return json_response(service.app.snapshot())
            case "POST", "/reload":
                service.reload()
                return json_response(service.state())
            case "POST", "/upstreams":
                return self._add(_body(request))
            case "POST", "/drain":
                return self._drain(_body(request))
            case "DELETE", "/upstreams":
                return self._remove(_body(request))
            case "POST", "/new-model":
                return self._new_model(_body(request))
        raise ApiError(404, "not_found", f"the admin socket has no {request.method} {request.path}")

    def _add(self, body: dict[str, Any]) -> Response:
        key = body.get("api_key")
        if key is not None and not isinstance(key, str):
            raise invalid("'api_key' must be a string", "api_key")
        upstream = self._service.add_upstream(UpstreamConfig(_address(body).url, key))
        return json_response(upstream.describe())

    async def _drain(self, body: dict[str, Any]) -> Response:
        url = _address(body).url
        drained = await self._service.pool.drain(url, _timeout(body, self._service.config.drain))
        return json_response({"url": url, "drained": drained})

    async def _remove(self, body: dict[str, Any]) -> Response:
        url = _address(body).url
        drained = await self._service.pool.remove(url, _timeout(body, self._service.config.drain))
        return json_response({"url": url, "drained": drained})

    async def _new_model(self, body: dict[str, Any]) -> Response:
        fingerprint = body.get("fingerprint", "")
        if not isinstance(fingerprint, str):
            raise invalid("'fingerprint' must be a string", "fingerprint")
        urls = body.get("upstreams")
        if urls is not None and not isinstance(urls, list):
            raise invalid("'upstreams' must be a list of addresses", "upstreams")
        new = None if urls is None else [UpstreamConfig(_address({"url": url}).url) for url in urls]
        await self._service.new_model(fingerprint, new)
        return json_response(self._service.state())


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
