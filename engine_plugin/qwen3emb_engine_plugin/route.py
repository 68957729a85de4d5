"""POST /v1/embeddings ahead of FastAPI's own route, inside the same application.

It sits in the application's router, so every middleware (keys, CORS, metrics, decompression) applies as before. What
is not plain goes to the stock route with the body read once.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from starlette.requests import Request
from starlette.routing import BaseRoute, Match

from qwen3emb_engine_plugin.answer import AnswerWriter
from qwen3emb_engine_plugin.asked import read
from qwen3emb_engine_plugin.engine_calls import EngineCalls, NotPlainError

PATH = "/v1/embeddings"
# A header that the stock path turns into scheduling.
ROUTING_HEADER = b"x-smg-routing-key"

logger = logging.getLogger("qwen3emb_engine_plugin")
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class EmbeddingsRoute(BaseRoute):
    """Answers plain requests itself and hands the others to `stock`."""

    def __init__(self, stock: Any, serving: Any, calls: EngineCalls, writer: AnswerWriter) -> None:
        self.path = self.path_format = PATH
        self.endpoint = stock.endpoint
        self.name = "qwen3emb_embeddings"
        self.include_in_schema = False
        self._stock = stock
        self._serving = serving
        self._calls = calls
        self._writer = writer

    def matches(self, scope: Any) -> tuple[Match, Any]:
        """Exactly POST on the path; anything else is left to the routes behind."""
        ours = scope.get("path") == PATH and not scope.get("root_path")
        if ours and scope["type"] == "http" and scope["method"] == "POST":
            return Match.FULL, {"endpoint": self.endpoint, "path_params": {}}
        return Match.NONE, {}

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """Links are the stock route's business."""
        return self._stock.url_path_for(name, **path_params)

    async def handle(self, scope: Any, receive: Receive, send: Send) -> None:
        """Read the body; answer, or replay it to the stock route."""
        messages: list[Any] = []
        chunks: list[bytes] = []
        while True:
            message = await receive()
            messages.append(message)
            if message["type"] != "http.request":
                break
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                break
        whole = messages[-1]["type"] == "http.request"
        asked = None
        if whole and _plain_headers(scope["headers"]) and self._calls.accepts():
            asked = read(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if asked is not None:
            request = Request(scope, receive)
            try:
                vectors, prompt_tokens = await self._calls.vectors(asked, request.is_disconnected)
                model = self._calls.manager.model_path
                body = self._writer.write(vectors, prompt_tokens, model, asked.encoding_format)
            except NotPlainError:
                pass
            except (ValueError, HTTPException) as error:
                await self._refuse(error)(scope, receive, send)
                return
            except Exception as error:  # an abort leaves no vector: a KeyError here as in the stock handler
                logger.exception("Error in request: %s", error)
                await self._failed(error)(scope, receive, send)
                return
            else:
                await send(
                    {
                        "type": "http.response.start",
                        "status": 200,
                        "headers": [
                            (b"content-length", b"%d" % len(body)),
                            (b"content-type", b"application/json"),
                        ],
                    }
                )
                await send({"type": "http.response.body", "body": body})
                return
        await self._to_stock(scope, messages, receive, send)

    def _refuse(self, error: ValueError | HTTPException) -> Any:
        """The stock handler's answer to the same exception."""
        if isinstance(error, HTTPException):
            return self._serving.create_error_response(
                message=error.detail, err_type=str(error.status_code), status_code=error.status_code
            )
        return self._serving.create_error_response(str(error))

    def _failed(self, error: Exception) -> Any:
        """The stock handler's answer to any other."""
        return self._serving.create_error_response(
            message=f"Internal server error: {error}", err_type="InternalServerError", status_code=500
        )

    async def _to_stock(self, scope: Any, messages: list[Any], receive: Receive, send: Send) -> None:
        replay = iter(messages)

        async def replayed() -> Any:
            message = next(replay, None)
            return message if message is not None else await receive()

        _, child = self._stock.matches(scope)
        scope.update(child)
        await self._stock.handle(scope, replayed, send)


def _plain_headers(headers: list[tuple[bytes, bytes]]) -> bool:
    kind = b""
    for name, value in headers:
        if name == b"content-type":
            kind = value
        elif name == ROUTING_HEADER:
            return False
    return kind.split(b";", 1)[0].lower() == b"application/json"
