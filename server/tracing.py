"""Traces by OpenTelemetry: a request, and the attempts of workers at the job that it asked for, in one trace.

They are made and sent (OTLP over HTTP) where ``OTEL_EXPORTER_OTLP_ENDPOINT`` is set; else nothing of OpenTelemetry is
imported, and every function here does nothing. The context goes with the row of the job (``traceparent``), not with the
message of the queue: whoever claims the job finds it.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import medsora
from server.settings import trace_service

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span

__all__ = ["RequestSpan", "record", "request_span", "start_tracing", "stop_tracing", "trace_id", "traceparent"]

Value = str | int | float | bool

_EXPORT_TIMEOUT_S = 5
_provider: "TracerProvider | None" = None

logger = logging.getLogger(__name__)


def start_tracing(part: str, *, processor: "SpanProcessor | None" = None) -> None:
    """Make traces in this process, if the environment asks for them.

    Args:
        part: Of the server: api, reaper or worker.
        processor: Where spans go; None: to the endpoint.
    """
    global _provider
    service = trace_service()
    if service is None or _provider is not None:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces need: pip install 'medsora[otel]'")
        return
    about = {"service.name": service, "service.version": medsora.__version__, "medsora.part": part}
    provider = TracerProvider(resource=Resource.create(about))
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_TIMEOUT_S)))
    _provider = provider


def stop_tracing() -> None:
    """Send what was not sent yet, and make no more."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
        _provider = None


class RequestSpan:
    """The span of a request, whose outcome is told at its end."""

    def __init__(self, span: "Span | None") -> None:
        self._span = span

    def answered(self, method: str, route: str, status: int) -> None:
        """Name it, and tell what was answered."""
        if self._span is None:
            return
        from opentelemetry.trace import StatusCode

        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        )
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)


@contextmanager
def request_span(headers: Mapping[str, str], **attributes: Value) -> Iterator[RequestSpan]:
    """A span around a request, within the caller's trace if it names one."""
    if _provider is None:
        yield RequestSpan(None)
        return
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract(headers)
    tracer = _provider.get_tracer("medsora")
    with tracer.start_as_current_span(
        "request", context=parent, kind=SpanKind.SERVER, attributes=attributes, record_exception=False
    ) as span:
        yield RequestSpan(span)


def traceparent() -> str | None:
    """The span that this code runs in, as W3C Trace Context writes it; None: there is none."""
    if _provider is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


def trace_id(traceparent: str | None) -> str | None:
    """The trace that a ``traceparent`` names."""
    return None if traceparent is None else traceparent.split("-")[1]


def record(
    name: str,
    *,
    parent: str | None,
    began_s: float,
    ended_s: float,
    error: str | None = None,
    attributes: Mapping[str, Value | None] | None = None,
) -> str | None:
    """Make a span of something that is over.

    Args:
        parent: ``traceparent`` of the span that it belongs to; None: it begins a trace.
        began_s: Unix seconds.
        ended_s: Unix seconds.
        error: Code of the error that it ended with.
        attributes: None is left out.

    Returns:
        Its own ``traceparent``, for its parts; None: no traces are made.
    """
    if _provider is None:
        return None
    from opentelemetry.context import Context
    from opentelemetry.trace import Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    context = Context() if parent is None else propagator.extract({"traceparent": parent}, context=Context())
    span = _provider.get_tracer("medsora").start_span(
        name,
        context=context,
        start_time=int(began_s * 1e9),
        attributes={key: value for key, value in (attributes or {}).items() if value is not None},
    )
    if error is not None:
        span.set_status(Status(StatusCode.ERROR, error))
    span.end(int(max(began_s, ended_s) * 1e9))
    carrier: dict[str, str] = {}
    propagator.inject(carrier, context=set_span_in_context(span, Context()))
    return carrier.get("traceparent")
