import json

from selfloop.control.observe.traces import Span, span_of, timeline
from selfloop.types.logline import LogLine


def test_what_took_time_is_a_slice_with_its_computing_inside():
    details = {"kind": "optim_step", "seconds": 2.0, "compute_seconds": 0.5}
    line = LogLine(10 * 10**9, "INFO", "x", "done", run_id="r", operation_id="o", details=details)
    events = json.loads(timeline({"session_id": "s"}, [line]))["traceEvents"]
    named = [(e["ph"], e["name"], e.get("ts")) for e in events]
    assert named == [
        ("M", "process_name", None),
        ("b", "optim_step", 8e6),
        ("b", "compute optim_step", 9.5e6),
        ("e", "compute optim_step", 10e6),
        ("e", "optim_step", 10e6),
    ]
    assert len({e["id"] for e in events[1:]}) == 1


def test_anything_else_is_an_instant_on_the_track_of_what_it_is_about():
    lines = [LogLine(at, "WARNING", "x", f"m{at}", sampler_id=id) for at, id in ((1000, "a"), (2000, "b"), (3000, "a"))]
    trace = json.loads(timeline({"session_id": "s"}, lines))
    tracks = {e["args"]["name"]: e["pid"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert [(e["name"], e["pid"], e["ts"]) for e in trace["traceEvents"] if e["ph"] == "i"] == [
        ("m1000", tracks["a"], 1.0),
        ("m2000", tracks["b"], 2.0),
        ("m3000", tracks["a"], 3.0),
    ]
    assert trace["otherData"] == {"session_id": "s", "is_truncated": "false"}


def test_a_line_that_says_how_long_something_took_is_a_span():
    details = {"kind": "forward", "seconds": 2.0, "compute_seconds": 0.5, "tokens": 12}
    line = LogLine(10 * 10**9, "INFO", "x", "done", run_id="r", operation_id="o", details=details)
    assert span_of(line) == Span("r", "forward", "o", 8.0, 9.5, 10.0, 12)


def test_what_failed_is_a_span_with_its_error_that_was_never_computed():
    details = {"seconds": 2.0, "error_class": "BadRequest"}
    line = LogLine(10 * 10**9, "WARNING", "x", "too long", sampler_id="s", details=details)
    assert span_of(line) == Span("s", "sample", "", 8.0, 10.0, 10.0, None, "too long")


def test_what_says_nothing_of_time_is_no_span():
    assert span_of(LogLine(10**9, "INFO", "x", "hello", run_id="r")) is None
