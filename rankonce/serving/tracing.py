"""Traces for an OpenTelemetry collector: a span for each question, one for each of its stages.

Spans say how long and how much, never what a question holds.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from rankonce.errors import MissingDependencyError, OperationsError
from rankonce.serving.exchanges import Exchange

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_NS = 1_000_000_000


class Tracing:
    """Sends spans in the background; what a collector does not take is dropped.

    Args:
        exporter: takes the spans.
        version: of this package.
    """

    def __init__(self, exporter: "SpanExporter", *, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": "rankonce", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rankonce.serving", version)

    def record(self, exchange: Exchange, headers: Mapping[str, str], *, status: int) -> None:
        """Make the spans of a question that has just been answered.

        Args:
            headers: of the question; ``traceparent`` makes its span a child of the caller's.
        """
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=trace.SpanKind.SERVER,
            start_time=int(exchange.began * _NS),
            attributes={
                "http.request.method": exchange.method,
                "http.route": exchange.route,
                "http.response.status_code": status,
                "rankonce.request_id": exchange.id,
                **({"rankonce.key": exchange.owner} if exchange.owner else {}),
                **({"rankonce.tokens": exchange.num_tokens} if exchange.num_tokens else {}),
                **({"error.type": exchange.code} if exchange.code else {}),
            },
        )
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        inside = trace.set_span_in_context(span)
        end = time.time()
        span_end = int(end * _NS)
        # Some stages are told of together, when the last of them is over: each ends where the
        # next begins.
        for one in reversed(exchange.stages):
            end = min(end, one.end)
            begin = end - one.seconds
            child = self._tracer.start_span(
                one.stage.value, context=inside, start_time=int(begin * _NS)
            )
            child.end(int(end * _NS))
            end = begin
        span.end(span_end)

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def open_tracing(endpoint: str, *, version: str) -> Tracing:
    """Send traces to a collector by OTLP over HTTP.

    Args:
        endpoint: such as ``http://localhost:4318``; ``/v1/traces`` is added where it has no path.

    Raises:
        OperationsError: it is no address.
        MissingDependencyError: the extra ``otel`` is not installed.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OperationsError(
            f"otlp_endpoint: should be an address such as http://localhost:4318, is {endpoint!r}"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingDependencyError("opentelemetry-exporter-otlp", extra="otel") from error
    path = parts.path.rstrip("/") or "/v1/traces"
    address = urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
    return Tracing(OTLPSpanExporter(endpoint=address), version=version)
