"""`embed(text, task=...)` for those who prefer Python to HTTP. Thin over the `openai` package.

    from qwen3emb_launch.client import Client
    client = Client("http://127.0.0.1:8000/v1")
    query = client.embed("how do I return a parcel?", task="query")
    passages = client.embed(["Parcels can be returned within ...", "..."], task="document")

A task that the gateway knows is the gateway's (instruction and dims); before a bare engine the built-in instruction of
that name is put before the text here. Either way the same words reach the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from qwen3emb_launch.addresses import is_loopback, unknown_host
from qwen3emb_launch.errors import InvalidInputError, NetworkError, nearest
from qwen3emb_launch.instructions import TASKS, instruct

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

DEFAULT_URL = "http://127.0.0.1:8000/v1"
Texts: TypeAlias = list[str] | tuple[str, ...]
BATCH = 256  # texts a request; the gateway forms the engine's batches


@dataclass(frozen=True)
class _Call:
    """What goes to the endpoint."""

    model: str
    texts: list[str]
    dims: int | None

    def arguments(self, start: int) -> dict[str, Any]:
        more = {} if self.dims is None else {"dimensions": self.dims}
        return {"model": self.model, "input": self.texts[start : start + BATCH], **more}

    @property
    def starts(self) -> Iterable[int]:
        return range(0, len(self.texts), BATCH)


def _plan(texts: Sequence[str], task: str | None, dims: int | None, model: str | None, served: list[str]) -> _Call:
    """Decide who applies the task. Raises InvalidInputError (`unknown_task`)."""
    if model is None:
        if not served:
            raise NetworkError("no_model", "the endpoint serves no model yet", "wait for its engine: qwen3emb status")
        model = served[0]
    if task is None:
        return _Call(model, list(texts), dims)
    if any(one.partition(":")[2] == task for one in served):  # a gateway lists its tasks with its first name only
        return _Call(f"{model}:{task}", list(texts), dims)
    if task not in TASKS and " " not in task.strip():
        known = sorted({*TASKS, *(m.removeprefix(f"{model}:") for m in served if m.startswith(f"{model}:"))})
        guess = nearest(task, known)
        raise InvalidInputError(
            "unknown_task",
            f"no task {task!r}: there are {', '.join(known)}" + (f"; did you mean {guess!r}?" if guess else ""),
            "give one of these, or an instruction in English",
        )
    return _Call(model, [instruct(text, task) for text in texts], dims)


def _settings(base_url: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    """Arguments of the OpenAI clients. Loopback addresses never go through a proxy."""
    url = base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    return {"base_url": url, "api_key": key, "timeout": timeout}


def _translate(exc: Exception, url: str) -> Exception:
    """The package's own error for what the OpenAI client raised."""
    import openai

    if isinstance(exc, openai.APIStatusError):
        body = exc.body if isinstance(exc.body, dict) else {}
        message = str(body.get("message") or exc.message)
        if exc.status_code < 500 and exc.status_code != 429:
            return InvalidInputError(
                str(body.get("code") or "refused"), message, "qwen3emb embed --help says what is accepted"
            )
        return NetworkError(str(body.get("code") or "endpoint_failed"), message, "try again; `qwen3emb status`")
    return unknown_host(exc, url, proxies=not is_loopback(url)) or NetworkError(
        "endpoint_silent", f"{url} does not answer: {exc.__cause__ or exc}", "is it running? `qwen3emb status`"
    )


class Client:
    """Synchronous. `model` None is the first one that the endpoint lists."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        from openai import DefaultHttpxClient, OpenAI

        settings = _settings(base_url, api_key, timeout)
        self._url = settings["base_url"]
        http = DefaultHttpxClient(trust_env=False) if is_loopback(self._url) else None
        self.openai: OpenAI = OpenAI(**settings, http_client=http)
        self._model = model
        self._served: list[str] | None = None

    @overload
    def embed(self, text: str, *, task: str | None = None, dims: int | None = None) -> list[float]: ...
    @overload
    def embed(self, text: Texts, *, task: str | None = None, dims: int | None = None) -> list[list[float]]: ...
    def embed(
        self, text: str | Texts, *, task: str | None = None, dims: int | None = None
    ) -> list[float] | list[list[float]]:
        """One vector for a text, a list of them for a list. Raises InvalidInputError, NetworkError."""
        from openai import OpenAIError

        try:
            if not self._served:
                self._served = [m.id for m in self.openai.models.list()]
            call = _plan([text] if isinstance(text, str) else text, task, dims, self._model, self._served)
            out: list[list[float]] = []
            for start in call.starts:
                answer = self.openai.embeddings.create(**call.arguments(start))
                out += [row.embedding for row in answer.data]
        except OpenAIError as exc:
            raise _translate(exc, self._url) from exc
        return out[0] if isinstance(text, str) else out

    def close(self) -> None:
        """Close its connections."""
        self.openai.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient:
    """The same for asyncio."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout: float = 120.0,
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        settings = _settings(base_url, api_key, timeout)
        self._url = settings["base_url"]
        http = DefaultAsyncHttpxClient(trust_env=False) if is_loopback(self._url) else None
        self.openai: AsyncOpenAI = AsyncOpenAI(**settings, http_client=http)
        self._model = model
        self._served: list[str] | None = None

    @overload
    async def embed(self, text: str, *, task: str | None = None, dims: int | None = None) -> list[float]: ...
    @overload
    async def embed(self, text: Texts, *, task: str | None = None, dims: int | None = None) -> list[list[float]]: ...
    async def embed(
        self, text: str | Texts, *, task: str | None = None, dims: int | None = None
    ) -> list[float] | list[list[float]]:
        """One vector for a text, a list of them for a list. Raises InvalidInputError, NetworkError."""
        from openai import OpenAIError

        try:
            if not self._served:
                self._served = [m.id async for m in self.openai.models.list()]
            call = _plan([text] if isinstance(text, str) else text, task, dims, self._model, self._served)
            out: list[list[float]] = []
            for start in call.starts:
                answer = await self.openai.embeddings.create(**call.arguments(start))
                out += [row.embedding for row in answer.data]
        except OpenAIError as exc:
            raise _translate(exc, self._url) from exc
        return out[0] if isinstance(text, str) else out

    async def close(self) -> None:
        """Close its connections."""
        await self.openai.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def embed(text: str, *, task: str | None = None, dims: int | None = None) -> list[float]:
    """One vector from the default endpoint (OPENAI_BASE_URL, or 127.0.0.1:8000)."""
    with Client() as client:
        return client.embed(text, task=task, dims=dims)
