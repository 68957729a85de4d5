"""What the gateway answers when it cannot answer with vectors: OpenAI's nested error form, marked whose error it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Source = Literal["gateway", "engine"]

_PATH = re.compile(r"(?:file://|(?<![\w.:/]))(?:/[\w.+@-]+){2,}/?|[A-Za-z]:\\[^\s'\"]+")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_ENGINE_MESSAGE = 600


class ApiError(Exception):
    """An answer that is an error. `index` is the offending item of the request, when there is one; `final` tells
    OpenAI's clients, which repeat requests after a 5xx, that this one is not worth repeating."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        source: Source = "gateway",
        index: int | None = None,
        retry_after: float | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.source: Source = source
        self.index = index
        self.retry_after = retry_after
        self.final = final

    def at(self, index: int, count: int) -> ApiError:
        """The same error, naming the item of the request that caused it."""
        where = f"input[{index}]: " if count > 1 and not self.message.startswith("input[") else ""
        return ApiError(
            self.status,
            self.code,
            where + self.message,
            param=self.param or "input",
            source=self.source,
            index=index,
            retry_after=self.retry_after,
            final=self.final,
        )

    def again(self) -> ApiError:
        """An equal one that was never raised: it has no traceback, and nobody else holds it."""
        fresh = ApiError(self.status, self.code, self.message)
        vars(fresh).update(vars(self))
        return fresh

    def body(self) -> dict[str, Any]:
        """The JSON that the OpenAI clients turn into their exceptions; `source` and `index` are ours."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
            "source": self.source,
        }
        if self.index is not None:
            error["index"] = self.index
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The headers that go with it."""
        out: dict[str, str] = {"x-qwen3emb-error-source": self.source}
        if self.retry_after is not None:
            out["retry-after"] = str(max(1, round(self.retry_after)))
        if self.final:
            out["x-should-retry"] = "false"
        return out


def invalid(
    message: str, param: str | None = None, code: str = "invalid_request", index: int | None = None
) -> ApiError:
    """A 400 of the gateway's own."""
    return ApiError(400, code, message, param=param, index=index)


def from_engine(status: int, body: Mapping[str, Any] | None) -> ApiError:
    """An engine's refusal in OpenAI's form: SGLang's is flat, others nest; the paths of its files are taken out."""
    nested = (body or {}).get("error")
    inner: Mapping[str, Any] = nested if isinstance(nested, Mapping) else (body or {})
    message = inner.get("message") or inner.get("detail") or (nested if isinstance(nested, str) else None)
    text = clean(str(message)) if message else f"the engine answered {status} without a reason"
    param = inner.get("param")
    return ApiError(status, "engine_refused", text, param=param if isinstance(param, str) else None, source="engine")


def clean(message: str) -> str:
    """An engine's message fit for strangers: one paragraph, no paths of the server, no endless dump."""
    text = " ".join(_PATH.sub("<path>", message[: 10 * MAX_ENGINE_MESSAGE]).split())
    return text if len(text) <= MAX_ENGINE_MESSAGE else text[:MAX_ENGINE_MESSAGE] + " ..."
