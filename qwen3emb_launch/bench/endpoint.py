"""Single questions to an endpoint before it is loaded: is it there, which model, does it take what the load will send.

Standard library only, so that calibration runs on a bare host too. Proxy variables are ignored: the load itself goes
straight to the endpoint.
"""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from dataclasses import replace
from functools import cache
from typing import Any
from urllib.parse import SplitResult

from qwen3emb_launch.addresses import unknown_host, web_address
from qwen3emb_launch.bench.answers import AnswerChecker
from qwen3emb_launch.bench.spec import LoadSpec
from qwen3emb_launch.errors import CheckFailedError, InvalidInputError, LaunchError, NetworkError


def checked(url: str) -> SplitResult:
    """An address, taken apart. Raises InvalidInputError (`bad_url`)."""
    parts = web_address(url)
    if parts is None:
        hint = "give it as the OpenAI client takes it: http://HOST:PORT/v1"
        raise InvalidInputError("bad_url", f"no http(s) URL: {url!r}", hint)
    return parts


def ask(spec: LoadSpec, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    """(status, answer) of one request to `spec.url` + `path`: POST with a body, GET without.

    Raises NetworkError (`endpoint_down`) when nothing answers, InvalidInputError (`bad_url`).
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", **spec.headers}
    if spec.api_key:
        headers["Authorization"] = f"Bearer {spec.api_key}"
    url = checked(spec.url).geturl().rstrip("/") + path
    https = urllib.request.HTTPSHandler(context=_tls(spec.verify_tls))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data=data, headers=headers)  # noqa: S310 - http(s) checked above
        with opener.open(request, timeout=spec.timeout) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read()
    except ValueError as exc:
        raise InvalidInputError("bad_url", f"{spec.url!r}: {exc}", "give it as http://HOST:PORT/v1") from exc
    except OSError as exc:
        reason = getattr(exc, "reason", exc)
        raise unknown_host(exc, url, proxies=False) or NetworkError(
            "endpoint_down", f"nothing answers at {url}: {reason}", "is it up? `qwen3emb status` lists local instances"
        ) from exc


@cache
def _tls(verify: bool) -> ssl.SSLContext:
    """Made once: reading the machine's certificates takes longer than a short request."""
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def served_model(spec: LoadSpec) -> str:
    """The only model that the endpoint lists. Raises InvalidInputError when there is a choice or no list.

    Our gateway serves one under several names, with its tasks: the first is the model's own.
    """
    status, body = ask(spec, "/models")
    names: list[str] = []
    ours = False
    if status == 200:
        try:
            listed = json.loads(body)["data"]
            names = [str(m["id"]) for m in listed]
            ours = bool(listed) and all(m.get("owned_by") == "qwen3emb" for m in listed)
        except (ValueError, KeyError, TypeError, AttributeError):
            names = []
    if len(names) == 1 or (names and ours):
        return names[0]
    if status in (401, 403):
        raise _refused_key(spec, status, body)
    listed = f"it lists {', '.join(names[:8])}" if names else f"GET /models answered {status}"
    raise InvalidInputError("model_needed", f"which model of {spec.url}? {listed}", "name it with --model")


def embed(spec: LoadSpec, texts: list[str]) -> int | None:
    """Embed once as the load will, check the answer, return its prompt tokens (None when not counted).

    Raises the LaunchError that says what is wrong: key, model, dimensions, a text too long, a wrong answer.
    """
    body: dict[str, Any] = {"model": spec.model, "input": texts, "encoding_format": spec.encoding}
    if spec.dims is not None:
        body["dimensions"] = spec.dims
    status, answer = ask(spec, "/embeddings", body)
    kind, tokens, detail = AnswerChecker(len(texts), spec.dims, spec.unit_norm).check(status, answer)
    if kind:
        raise _refusal(spec, status, kind, detail, answer)
    return tokens if tokens >= 0 else None


def count_tokens(spec: LoadSpec, text: str) -> int | None:
    """How many tokens the endpoint says a text has, or None when it does not say."""
    return embed(replace(spec, dims=None), [text])


def message_of(answer: bytes) -> str:
    """The human part of an error answer, OpenAI's nested form or SGLang's flat one."""
    try:
        data = json.loads(answer)
        error = data.get("error", data)
        return str(error["message"] if isinstance(error, dict) else error)[:500]
    except (ValueError, KeyError, TypeError, AttributeError):
        return answer[:200].decode("utf-8", "replace").strip()


def _refused_key(spec: LoadSpec, status: int, body: bytes) -> LaunchError:
    return NetworkError(
        "unauthorized",
        f"{spec.url} answered {status}: {message_of(body)}",
        "give the key in the environment variable OPENAI_API_KEY, or name another with --api-key-env",
    )


def _refusal(spec: LoadSpec, status: int, kind: str, detail: str, answer: bytes) -> LaunchError:
    """The error for an answer that the load could not use."""
    if status in (401, 403):
        return _refused_key(spec, status, answer)
    if status == 200:
        hint = "prove the endpoint first: qwen3emb verify --base-url " + spec.url
        if kind == "norm":
            hint = "a model that does not normalise needs --any-norm"
        elif kind == "dims":
            hint = "the endpoint ignores `dimensions`: leave --dims out, or serve with the matryoshka override"
        return CheckFailedError("wrong_answer", f"{spec.url} answered wrongly ({kind}): {detail}", hint)
    said = message_of(answer)
    low = said.lower()
    if "dimension" in low or "matryoshka" in low:
        return InvalidInputError(
            "dims_refused", f"{spec.url} refuses {spec.dims} dimensions: {said}", "choose others with --dims"
        )
    if status == 404 or ("model" in low and ("not exist" in low or "not found" in low or "unknown" in low)):
        return InvalidInputError(
            "wrong_model", f"{spec.url} does not serve {spec.model!r}: {said}", "see `/v1/models`, then --model NAME"
        )
    if "length" in low or "token" in low or "too long" in low:
        return InvalidInputError(
            "text_refused", f"{spec.url} refuses a text of this load: {said}", "shorten it with --tokens"
        )
    return NetworkError("endpoint_error", f"{spec.url} answered {status}: {said}", "see the endpoint's log")


# Seconds that requests waited for the engine, in Prometheus histograms: our gateway's, vLLM's, and SGLang's, which has
# no such series for embeddings (0.5.15.post1 and 0.5.23 observe it for generation only).
_QUEUE = re.compile(
    rb"^(?:sglang:queue_time_seconds|vllm:request_queue_time_seconds"
    rb'|qwen3emb_request_seconds(?=_(?:sum|count)\{[^}]*part="queue"))'
    rb"_(sum|count)(?:\{[^}]*\})?\s+([0-9.eE+-]+)",
    re.MULTILINE,
)


def queue_seconds(spec: LoadSpec) -> tuple[float, float] | None:
    """(sum, count) of the queue times so far; None where nobody tells."""
    root = spec.url.removesuffix("/v1")
    try:
        status, body = ask(replace(spec, url=root, timeout=5.0), "/metrics")
    except LaunchError:
        return None
    totals = {b"sum": 0.0, b"count": 0.0}
    found = _QUEUE.findall(body) if status == 200 else []
    for name, value in found:
        totals[name] += float(value)
    return (totals[b"sum"], totals[b"count"]) if found else None
