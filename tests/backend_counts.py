"""Which backends a run of the tests has tried on this machine, and how often; from the reports, so of every process."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pytest

PROPERTY = "backend"
"""Noted by a test that is about one backend, as ``record_property`` does, before it may be skipped."""

_OUTCOMES = ("passed", "failed", "error", "skipped")


def line(stats: Mapping[str, Sequence[object]]) -> str | None:
    """E.g. ``backends: torch 60 passed; cpu_native 60 skipped (no kernels)``; None where no test was about one.

    Args:
        stats: reports by their outcome, as the terminal's reporter counts them.
    """
    counts: dict[str, Counter[str]] = {}
    reasons: dict[str, dict[str, None]] = {}
    for outcome in _OUTCOMES:
        for backend, report in _about_backends(stats.get(outcome, ())):
            counts.setdefault(backend, Counter())[outcome] += 1
            if outcome == "skipped" and isinstance(report.longrepr, tuple):
                reasons.setdefault(backend, {})[report.longrepr[2].removeprefix("Skipped: ")] = None
    if not counts:
        return None
    parts: list[str] = []
    for backend in sorted(counts):
        said = ", ".join(f"{counts[backend][outcome]} {outcome}" for outcome in _OUTCOMES if counts[backend][outcome])
        why = f" ({'; '.join(reasons[backend])})" if backend in reasons else ""
        parts.append(f"{backend} {said}{why}")
    return f"backends: {'; '.join(parts)}"


def is_untried(stats: Mapping[str, Sequence[object]], prefix: str) -> bool:
    """Whether tests were about a backend whose name begins so, and none of them has passed."""
    outcomes = {
        outcome
        for outcome in _OUTCOMES
        for backend, _ in _about_backends(stats.get(outcome, ()))
        if backend.startswith(prefix)
    }
    return bool(outcomes) and "passed" not in outcomes


def _about_backends(reports: Iterable[object]) -> Iterable[tuple[str, pytest.TestReport]]:
    for report in reports:
        if isinstance(report, pytest.TestReport):
            for name, value in report.user_properties:
                if name == PROPERTY:
                    yield str(value), report
