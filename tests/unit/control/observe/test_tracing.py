"""One trace from the client's request to the execution of what it asked for."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fake_house import RUN_ID, FakeHouse
from selfloop.control.observe import tracing
from selfloop.types.operation import ForwardBackward

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = 0x0AF7651916CD43DD8448EB211C80319C


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def test_one_trace_from_the_request_to_the_execution(tmp_path: Path, exported: InMemorySpanExporter):
    house = await FakeHouse.open(tmp_path)
    with tracing.request_span("POST", [(b"traceparent", PARENT.encode()), (b"baggage", b"step=7")]):
        assert tracing.trace_id() == f"{TRACE:032x}"
        await house.submit(ForwardBackward([], "cross_entropy", {"value": 1}), 1, "op1")
        await house.submit(ForwardBackward([], "fails", {"value": 1}), 2, "op2")
    for id in ("op1", "op2"):
        await house.operations.wait(RUN_ID, id, 10)
    await house.crash()
    spans = exported.get_finished_spans()
    assert {span.context.trace_id for span in spans} == {TRACE}
    (request,) = (span for span in spans if span.name == "POST")
    assert request.parent is not None
    assert request.parent.span_id == 0xB7AD6B7169203331
    below = [span for span in spans if span is not request]
    assert all(span.parent is not None and span.parent.span_id == request.context.span_id for span in below)
    named = {(span.name, span.attributes["selfloop.operation_id"]) for span in below if span.attributes}
    assert named == {(name, id) for name in ("queue wait", "execute forward_backward") for id in ("op1", "op2")}
    failed = [span for span in below if not span.status.is_ok and span.status.description == "Asked"]
    assert [span.attributes["selfloop.operation_id"] for span in failed if span.attributes] == ["op2"]
    assert all(span.end_time >= span.start_time for span in below)


def test_without_an_sdk_the_context_is_carried_and_nothing_is_recorded():
    with tracing.request_span("POST", [(b"traceparent", PARENT.encode())]) as span:
        assert not span.is_recording()
        assert tracing.trace_id() == f"{TRACE:032x}"
        assert tracing.context() is not None
    with tracing.request_span("POST", []):
        assert tracing.trace_id() == ""
        assert tracing.context() is None
    with tracing.request_span("POST", [(b"traceparent", b"nonsense"), (b"baggage", b"=,;")]):
        assert tracing.context() is None


def test_the_sdk_is_not_imported_unless_spans_are_exported():
    code = (
        "import os, sys\nimport selfloop.server.serve, selfloop.server.telemetry as t\n"
        "with t.exporting_spans():\n    assert not [m for m in sys.modules if m.startswith('opentelemetry.sdk')]\n"
        "os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:9'\n"
        "with t.exporting_spans():\n    assert 'opentelemetry.sdk.trace' in sys.modules\n"
        "print('light')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "light", done.stderr
