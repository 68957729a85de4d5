"""Texts to vectors through any OpenAI-compatible endpoint, in batches, order kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from qwen3emb_launch.addresses import unknown_host, web_address
from qwen3emb_launch.catalog import MIN_DIMS
from qwen3emb_launch.errors import EngineFailedError, InvalidInputError, LaunchError, NetworkError, UnfitError, nearest
from qwen3emb_launch.instructions import TASKS, instruct
from qwen3emb_launch.vectors import finite

if TYPE_CHECKING:
    from openai import OpenAI, OpenAIError

TIMEOUT = 600.0  # seconds for one batch: long texts on a CPU take minutes


@dataclass(frozen=True)
class Embedded:
    """One text and its vector; `index` counts from 0 over all texts given."""

    index: int
    text: str
    embedding: list[float]


def check_dims(dims: int | None, width: int | None) -> None:
    """Raise InvalidInputError `bad_dims` unless dims are within 32..width, where known."""
    if dims is None or (dims >= MIN_DIMS and (width is None or dims <= width)):
        return
    most = f"..{width}" if width else " or more"
    raise InvalidInputError(
        "bad_dims",
        f"--dims {dims} is out of range: this model gives {MIN_DIMS}{most}",
        f"leave --dims out for {f'all {width}' if width else 'the full width'}",
    )


def check_task(task: str | None) -> str | None:
    """The task, if it is a known name or an instruction of several words. InvalidInputError `unknown_task` if not."""
    if task is None or task in TASKS or len(task.split()) > 1:
        return task
    guess = nearest(task, set(TASKS))
    raise InvalidInputError(
        "unknown_task",
        f"no task {task!r}: not one of {', '.join(TASKS)}, and too short for an instruction",
        f"did you mean {guess}?"
        if guess
        else 'an instruction is a sentence: --task "Given a question, find its answer"',
    )


def base_url(url: str) -> str:
    """An address as the OpenAI client takes it: a bare host gets its /v1. InvalidInputError `bad_url`."""
    parts = web_address(url)
    if parts is None:
        raise InvalidInputError("bad_url", f"{url!r} is no http address", "--base-url http://127.0.0.1:30000/v1")
    if "@" in parts.netloc:
        raise InvalidInputError(
            "bad_url",
            f"the address of {parts.hostname} holds a name or password, which the process list shows",
            "give the key by --api-key-file FILE or OPENAI_API_KEY",
        )
    url = url.strip()
    return url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


class Embedder:
    """One endpoint. `model` None asks the endpoint which one it serves. Raises only LaunchError.

    `loopback` keeps the environment's proxies out of it, which have no business between two processes of one machine.
    """

    def __init__(self, url: str, *, model: str | None, key: str | None, loopback: bool) -> None:
        from openai import DefaultHttpxClient, OpenAI

        try:
            http = DefaultHttpxClient(trust_env=not loopback)
        except Exception as error:  # the HTTP library's own kinds, which change with it
            raise NetworkError(
                "bad_proxy", f"the proxy variables cannot be used: {error}", "HTTPS_PROXY, HTTP_PROXY, ALL_PROXY"
            ) from error
        self.url = url
        self._proxies = not loopback
        self._client: OpenAI = OpenAI(base_url=url, api_key=key or "none", http_client=http, timeout=TIMEOUT)
        self._model = model

    @property
    def model(self) -> str:
        """The model's name at the endpoint."""
        if self._model is None:
            from openai import OpenAIError

            try:
                models = self._client.models.list().data
            except OpenAIError as error:
                raise translate(error, self.url, proxies=self._proxies) from error
            if not models:
                raise NetworkError("no_model", f"{self.url} lists no model", "name it with --model")
            self._model = models[0].id
        return self._model

    def embed(
        self, texts: Iterable[str], *, dims: int | None = None, task: str | None = None, batch: int = 32
    ) -> Iterator[Embedded]:
        """The vectors, in order, as each batch comes back. Texts are read only as far as they are embedded."""
        first = 0
        source = iter(texts)
        while chunk := list(islice(source, batch)):
            for number, text in enumerate(chunk, first):
                if not text.strip():
                    raise InvalidInputError(
                        "blank_text", f"text {number} is blank: it has no embedding", "leave blank lines out"
                    )
            for offset, vector in enumerate(self._request([instruct(text, task) for text in chunk], dims)):
                yield Embedded(first + offset, chunk[offset], vector)
            first += len(chunk)

    def _request(self, texts: list[str], dims: int | None) -> list[list[float]]:
        from openai import OpenAIError, omit

        try:
            answer = self._client.embeddings.create(
                model=self.model, input=texts, dimensions=omit if dims is None else dims, encoding_format="float"
            )
        except OpenAIError as error:
            raise translate(error, self.url, proxies=self._proxies) from error
        items = list(answer.data)
        if len(items) != len(texts):
            raise EngineFailedError(
                "wrong_answer", f"{len(items)} vectors came back for {len(texts)} texts", "qwen3emb verify"
            )
        if {repr(item.index) for item in items} != {*map(repr, range(len(items)))}:
            raise EngineFailedError(
                "wrong_answer", "the answer's index fields do not tell which vector is whose", "qwen3emb verify"
            )
        vectors = [item.embedding for item in sorted(items, key=lambda item: item.index)]
        if not all(map(_is_vector, vectors)):
            raise EngineFailedError(
                "wrong_answer", "a vector came back that is not all numbers: NaN, null or text", "qwen3emb verify"
            )
        if dims is not None and any(len(vector) != dims for vector in vectors):
            raise EngineFailedError(
                "dims_ignored",
                f"{len(vectors[0])} numbers came back, {dims} were asked for: the server ignores `dimensions`",
                "qwen3emb verify",
            )
        return vectors


def _is_vector(value: Any) -> bool:
    """Whether it is what a client must be able to rely on: numbers, all of them finite."""
    return isinstance(value, list) and bool(value) and {*map(type, value)} <= {float, int} and finite(value)


def translate(error: OpenAIError, url: str, *, proxies: bool = True) -> LaunchError:
    """An error of the OpenAI client in our words. `proxies`: it asks those of the environment."""
    import openai

    if isinstance(error, openai.APITimeoutError):
        return NetworkError("endpoint_slow", f"{url} did not answer within {TIMEOUT:g} s", "qwen3emb status")
    if isinstance(error, openai.APIConnectionError):
        cause = f": {error.__cause__}" if error.__cause__ else ""
        return unknown_host(error, url, proxies=proxies) or NetworkError(
            "endpoint_down", f"{url} cannot be reached{cause}", "qwen3emb status, or qwen3emb up"
        )
    if isinstance(error, openai.APIStatusError):
        said = _message(error)
        if error.status_code in (401, 403):
            return UnfitError("unauthorized", f"{url} wants another API key: {said}", "set OPENAI_API_KEY")
        if error.status_code < 500:
            return InvalidInputError(
                "rejected",
                f"the endpoint refuses it ({error.status_code}): {said}",
                "texts, --dims and --model must be what it serves: qwen3emb status",
            )
        return EngineFailedError("endpoint_failed", f"{url} failed ({error.status_code}): {said}", "qwen3emb logs")
    return NetworkError("bad_answer", f"{url}: {type(error).__name__}: {error}", "is it an OpenAI-compatible address?")


def _message(error: object) -> str:
    """The message alone, of OpenAI's nested form as well as of SGLang's flat one."""
    body = getattr(error, "body", None)
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, dict) and inner.get("message"):
            return str(inner["message"])
    return str(error)
