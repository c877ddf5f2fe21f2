"""What a run of the tests says of the backends that it has tried."""

import pytest

import backend_counts


def report(outcome: str, backend: str | None, reason: str = "") -> pytest.TestReport:
    longrepr = ("test_x.py", 1, f"Skipped: {reason}") if reason else None
    properties = [] if backend is None else [("backend", backend)]
    return pytest.TestReport("x", ("x", 1, "x"), {}, outcome, longrepr, "call", user_properties=properties)


def test_each_backend_is_counted_with_the_reasons_of_its_skips():
    stats = {
        "passed": [report("passed", "torch"), report("passed", "torch"), report("passed", None)],
        "failed": [report("failed", "torch")],
        "skipped": [report("skipped", "cpu_native", "no kernels"), report("skipped", "cpu_native", "no kernels")],
        "warnings": [object()],
    }
    said = backend_counts.line(stats)
    assert said == "backends: cpu_native 2 skipped (no kernels); torch 2 passed, 1 failed"


def test_nothing_is_said_where_no_test_was_about_a_backend():
    assert backend_counts.line({"passed": [report("passed", None)]}) is None


def test_a_backend_of_which_all_was_skipped_is_untried():
    skipped = {"passed": [report("passed", "torch")], "skipped": [report("skipped", "cpu_native", "no kernels")]}
    assert backend_counts.is_untried(skipped, "cpu_native")
    assert not backend_counts.is_untried(skipped, "torch")
    skipped["passed"].append(report("passed", "cpu_native on AVX2"))
    assert not backend_counts.is_untried(skipped, "cpu_native")
    assert not backend_counts.is_untried({"passed": [report("passed", None)]}, "cpu_native")
