"""``selfloop doctor --verify``: is everything in a data directory what was written?"""

import json
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfloop.cli import local
from selfloop.control.data_dir.verify import Report
from selfloop.control.gateway import verify

_WIDTH = 80
_COLUMNS = ("sound", "no digest", "damaged", "missing", "unknown")
_MAX_TOLD = 200


def run_verify(data_dir: Path | None, store: str | None, *, as_json: bool) -> int:
    """Print what was found; 1 when something is damaged or missing, else 0."""
    folder = local.resolve(data_dir)
    report = local.run(lambda: verify(folder, local.given("database_url"), store or local.given("store")))
    if as_json:
        print(json.dumps(_facts(folder, report), indent=2))
        return int(not report.is_sound)
    console = Console(width=_WIDTH, highlight=False)
    console.print(Text(f"{folder}"))
    console.print(_counts(report))
    if report.troubles:
        console.print(_troubles(report))
    if len(report.troubles) > _MAX_TOLD:
        console.print(Text(f"and {len(report.troubles) - _MAX_TOLD} more"))
    if report.is_sound:
        console.print(Text("Everything that has a digest is what was written."))
        return 0
    console.print(Text("Restore what is damaged or missing from a backup, or delete it: docs/recovery.md", style="red"))
    return 1


def _facts(folder: Path, report: Report) -> dict[str, object]:
    counts = [{"kind": kind, "verdict": verdict, "count": count} for (kind, verdict), count in report.counts.items()]
    troubles = [asdict(trouble) for trouble in report.troubles]
    return {"data_dir": str(folder), "is_sound": report.is_sound, "counts": counts, "troubles": troubles}


def _counts(report: Report) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    for column in _COLUMNS:
        made.add_column(column, justify="right")
    for kind in dict.fromkeys(kind for kind, _ in report.counts):
        made.add_row(kind, *(_number(report.counts[kind, verdict]) for verdict in _COLUMNS))
    return made


def _number(count: int) -> str:
    return f"{count:,}" if count else ""


def _troubles(report: Report) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("")
    made.add_column("what", overflow="fold")
    for trouble in report.troubles[:_MAX_TOLD]:
        made.add_row(trouble.verdict, Text(f"{trouble.what}: {trouble.how}"))
    return made
