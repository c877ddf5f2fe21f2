"""Figures with their spread, target and verdict: a plain table for people, JSON for programs."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured quantity.

    Args:
        case: what was done.
        what: what was measured of it.
        unit: e.g. ``tokens/s``; ``x`` for ratios.
        values: one a round.
        at_least, at_most: the target that the median is held against; neither for a figure without one.
    """

    case: str
    what: str
    unit: str
    values: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median is within the target; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        return not (
            (self.at_least is not None and self.median < self.at_least)
            or (self.at_most is not None and self.median > self.at_most)
        )

    @property
    def target(self) -> str:
        bounds = ((">=", self.at_least), ("<=", self.at_most))
        return " ".join(f"{sign} {number(bound)}" for sign, bound in bounds if bound is not None)

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "what": self.what,
            "unit": self.unit,
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "values": list(self.values),
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": self.met,
        }


def number(value: float) -> str:
    """Three significant digits, whole numbers from 100 on: 0.0123, 1.50, 12.3, 1,234."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.995 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    """Aligned columns; the case is named once, above its figures."""
    header = ("", "median", "lowest to highest", "unit", "target", "verdict")
    rows: list[tuple[str, ...]] = [header]
    case = None
    for figure in figures:
        if figure.case != case:
            case = figure.case
            rows.append((case,))
        low, high = number(min(figure.values)), number(max(figure.values))
        spread = f"{low} to {high}" if len(figure.values) > 1 else ""
        verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
        rows.append((f"  {figure.what}", number(figure.median), spread, figure.unit, figure.target, verdict))
    full = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in full) for i in range(len(header))]
    lines: list[str] = []
    for row in rows:
        cells = [
            cell.ljust(width) if i in (0, 3) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@dataclass
class Report:
    """What a program measured, printed as it is measured.

    Args:
        judged: whether targets are held against the figures; not when these mean nothing.
    """

    program: str
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    figures: list[Figure] = field(default_factory=list[Figure])
    notes: list[str] = field(default_factory=list[str])
    judged: bool = True

    def add(
        self,
        case: str,
        what: str,
        unit: str,
        values: Sequence[float] | float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> Figure:
        several = tuple(values) if isinstance(values, Sequence) else (values,)
        assert several, (case, what)
        bounds = (at_least, at_most) if self.judged else (None, None)
        figure = Figure(case, what, unit, several, *bounds)
        self.figures.append(figure)
        print(f"{case}: {what} {number(figure.median)} {unit}", file=sys.stderr, flush=True)
        return figure

    def note(self, text: str) -> None:
        """Something that a reader of the figures must know, e.g. a case that could not be run, and why."""
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def render(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.about.items())
        return "\n".join([f"{self.program}: {about}", "", table(self.figures), *self.notes])

    def as_json(self) -> dict[str, Any]:
        return {
            "program": self.program,
            "about": self.about,
            "figures": [figure.as_json() for figure in self.figures],
            "notes": self.notes,
        }

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.as_json(), indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the figures depend on, besides us."""
    import torch

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "CPU": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load average at the start": round(os.getloadavg()[0], 1),
    }


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
