"""OpenTelemetry spans, when asked for: one a request, one an engine call, joined by the caller's `traceparent`.

Off unless configured; the packages are an extra (`pip install 'qwen3emb-launch[otel]'`). Where spans go is said by
OpenTelemetry's own environment variables (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME,
OTEL_TRACES_SAMPLER, ...). No text, vector or key is in a span.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qwen3emb_launch import __version__
from qwen3emb_launch.errors import InvalidInputError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from qwen3emb_launch.gateway.http_client import Answer, HttpClient
    from qwen3emb_launch.gateway.work import Item

SERVICE = "qwen3emb-gateway"
MAX_LINKS = 128  # requests a call's span names; OpenTelemetry's own bound


class Tracing:
    """Makes spans. `provider` is OpenTelemetry's own, made from its environment variables when not given.

    Raises InvalidInputError (`no_opentelemetry`) when the packages are missing.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._provider = provider or _provider()
        except ImportError as exc:
            raise InvalidInputError(
                "no_opentelemetry",
                f"tracing needs OpenTelemetry's packages: {exc}",
                "pip install 'qwen3emb-launch[otel]', or start without --otel",
            ) from exc
        self._trace = trace
        self._context = TraceContextTextMapPropagator()
        self._tracer = self._provider.get_tracer("qwen3emb_launch.gateway", __version__)

    def request(self, headers: dict[str, str]) -> Span:
        """A request's span, below its caller's; `answered` ends it."""
        return self._tracer.start_span(
            "POST /v1/embeddings",
            self._context.extract(headers),
            self._trace.SpanKind.SERVER,
            {
                "http.request.method": "POST",
                "url.path": "/v1/embeddings",
                "http.route": "/v1/embeddings",
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": "qwen3emb",
            },
        )

    def answered(self, span: Span, status: int, code: str, attributes: dict[str, Any]) -> None:
        """End a request's span. `code` is the error's, empty for a good answer."""
        span.set_attribute("http.response.status_code", status)
        for name, value in attributes.items():
            span.set_attribute(name, value)
        self._end(span, code if status >= 400 else "", failed=status >= 500)

    def call(self, url: str, model: str, items: int, tokens: int, causes: Iterable[Span | None]) -> Span:
        """An engine call's span: a child of the first request in it, linked to all of them. `call_ended` ends it."""
        known = list(dict.fromkeys(span for span in causes if span is not None))
        host, _, port = url.partition("://")[2].partition("/")[0].rpartition(":")
        return self._tracer.start_span(
            f"embeddings {model}",
            self._trace.set_span_in_context(known[0]) if known else None,
            self._trace.SpanKind.CLIENT,
            {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": tokens,
                "server.address": host,
                **({"server.port": int(port)} if port.isdigit() else {}),
                "qwen3emb.items": items,
            },
            [self._trace.Link(span.get_span_context()) for span in known[:MAX_LINKS]],
        )

    async def traced(
        self, client: HttpClient, model: str, body: bytes, timeout: float, most: int, batch: Sequence[Item]
    ) -> Answer:
        """An engine call in a span of its own. Raises what the client raises."""
        causes = [wait.span for item in batch for wait, _ in item.waiters]
        tokens = sum(item.prepared.tokens for item in batch)
        span = self.call(client.address.url, model, len(batch), tokens, causes)
        error = ""
        try:
            answer = await client.request("POST", "/embeddings", body, timeout, self.header(span), most)
            error = "" if answer.status == 200 else str(answer.status)
        except BaseException as exc:
            error = type(exc).__name__
            raise
        finally:
            self.call_ended(span, error)
        return answer

    def header(self, span: Span) -> str:
        """The header line that carries an engine call's span on to the engine."""
        carrier: dict[str, str] = {}
        self._context.inject(carrier, self._trace.set_span_in_context(span))
        return "".join(f"{name}: {value}\r\n" for name, value in carrier.items())

    def call_ended(self, span: Span, error: str = "") -> None:
        """End an engine call's span; `error` is what went wrong."""
        self._end(span, error, failed=bool(error))

    def _end(self, span: Span, error: str, *, failed: bool) -> None:
        if error:
            span.set_attribute("error.type", error)
        if failed:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end()

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def _provider() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {"service.version": __version__, "service.name": os.environ.get("OTEL_SERVICE_NAME", SERVICE)}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
