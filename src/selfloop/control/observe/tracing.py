"""OpenTelemetry spans as children of the client's. Without an SDK the API's spans only carry the context."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

Context = otel.Context

_tracer = trace.get_tracer("selfloop")
_HEADERS = {b"traceparent", b"tracestate", b"baggage"}
_PROPAGATORS = (TraceContextTextMapPropagator(), W3CBaggagePropagator())


def is_traced() -> bool:
    """Whether there is a trace to go on with or an SDK to begin one."""
    return trace.get_current_span().get_span_context().is_valid


@contextmanager
def request_span(name: str, headers: Iterable[tuple[bytes, bytes]]) -> Generator[trace.Span]:
    """The span of one request, below the ``traceparent`` and with the ``baggage`` it came with."""
    known = {key.decode("latin-1"): value.decode("latin-1") for key, value in headers if key in _HEADERS}
    if not known and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        yield trace.INVALID_SPAN
        return
    context = otel.get_current()
    for propagator in _PROPAGATORS:
        context = propagator.extract(known, context)
    with span(name, context, trace.SpanKind.SERVER) as made:
        yield made


@contextmanager
def span(
    name: str, context: Context | None = None, kind: trace.SpanKind = trace.SpanKind.INTERNAL, **ids: str
) -> Generator[trace.Span]:
    """The current span inside the block; an exception that leaves it is recorded by its type only."""
    made = _tracer.start_span(name, context, kind, attributes=_attributes(ids))
    token = otel.attach(trace.set_span_in_context(made, context))
    try:
        yield made
    except BaseException as error:
        made.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        otel.detach(token)
        made.end()


@contextmanager
def loose_span(name: str) -> Generator[None]:
    """A span below the current one that does not become current; for generators, which end in any context."""
    made = _tracer.start_span(name)
    try:
        yield
    except BaseException as error:
        made.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        made.end()


def past_span(name: str, context: Context, start_s: float, end_s: float, error: str = "", **ids: str) -> None:
    """A span of something that is over, from ``start_s`` to ``end_s`` (UNIX seconds)."""
    made = _tracer.start_span(name, context, attributes=_attributes(ids), start_time=int(start_s * 1e9))
    if error:
        made.set_status(trace.StatusCode.ERROR, error)
    made.end(int(end_s * 1e9))


def context() -> Context | None:
    """The present context, for spans that are made later; None when nobody traces."""
    return otel.get_current() if is_traced() else None


def trace_id() -> str:
    """The present trace's id in hex, empty without one."""
    known = trace.get_current_span().get_span_context()
    return trace.format_trace_id(known.trace_id) if known.is_valid else ""


def _attributes(ids: dict[str, str]) -> dict[str, str]:
    return {f"selfloop.{name}": value for name, value in ids.items() if value}
