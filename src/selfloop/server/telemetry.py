"""Where log records and spans go, set up once at the edge of the process."""

import importlib
import logging
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opentelemetry import trace

import selfloop
from selfloop.control.observe import logs
from selfloop.types.logline import JsonFormatter
from selfloop.types.settings import LogFormat

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


@contextmanager
def logging_to(data_dir: Path, log_format: LogFormat) -> Generator[None]:
    """Records to standard error and, as JSON lines, to the data directory; whole on disk at the end."""
    people = logging.StreamHandler()
    if log_format == "json":
        people.setFormatter(JsonFormatter())
    else:
        people.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        people.addFilter(_is_for_people)
    people.setLevel(logging.INFO)
    file = logs.LogFile(data_dir / "logs")
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    logging.getLogger("selfloop.events").setLevel(logging.DEBUG)
    for handler in (people, file):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (people, file):
            root.removeHandler(handler)
            handler.close()


def finish() -> None:
    """Write out what is still in memory: log lines, spans."""
    logs.flush()
    flush: Any = getattr(trace.get_tracer_provider(), "force_flush", None)
    if flush is not None:
        flush()


def _is_for_people(record: logging.LogRecord) -> bool:
    """The file has each operation and sample; the screen only what went wrong."""
    return record.name != "selfloop.events" or record.levelno >= logging.WARNING


@contextmanager
def exporting_spans() -> Generator[None]:
    """Send spans to the collector that OpenTelemetry's own variables name; nothing is imported without one."""
    if not any(os.environ.get(name) for name in _ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED") == "true":
        yield
        return
    stop = _start_exporter()
    try:
        yield
    finally:
        stop()


def _start_exporter() -> Callable[[], None]:
    try:
        sdk: Any = importlib.import_module("opentelemetry.sdk.trace")
        export: Any = importlib.import_module("opentelemetry.sdk.trace.export")
        resources: Any = importlib.import_module("opentelemetry.sdk.resources")
        otlp: Any = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        log.warning("spans are not exported: %s; install selfloop[telemetry]", error)
        return lambda: None
    facts = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "selfloop"), "service.version": selfloop.__version__}
    provider: Any = sdk.TracerProvider(resource=resources.Resource.create(facts))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown
