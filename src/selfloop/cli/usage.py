"""``selfloop usage``: what was used in a data directory."""

import re
import time
from collections.abc import Sequence
from typing import Annotated, get_args

import typer

from selfloop.cli import local
from selfloop.control.observe.usage import GroupBy, UsageLine, as_json

_SINCE = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def usage(
    by: Annotated[str, typer.Option(help="run, key or team.")] = "run",
    since: Annotated[str | None, typer.Option(help="How far back, e.g. 12h or 7d; by whole hours.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    data_dir: local.DataDir = None,
) -> None:
    """Show tokens, compute seconds and checkpoint bytes, the most computing first."""
    group_by = _group(by)
    start = None if since is None else time.time() - _seconds(since)

    async def work() -> Sequence[UsageLine]:
        async with local.opened(data_dir) as data:
            return await data.usage.report(None, group_by, start=start)

    lines = local.run(work)
    if json:
        typer.echo(as_json(lines, group_by).decode())
        return
    table = local.table(
        group_by, "name", "operations", "samples", "trained", "forwarded", "prefilled", "sampled", "compute s", "stored"
    )
    for line in lines:
        counts = line.counts
        tokens = (counts.tokens_trained, counts.tokens_forwarded, counts.tokens_prefilled, counts.tokens_sampled)
        table.add_row(
            line.id or "(no run)",
            line.label,
            f"{counts.operations:,}",
            f"{counts.samples:,}",
            *(f"{n:,}" for n in tokens),
            f"{counts.compute_s:,.1f}",
            f"{line.checkpoint_bytes / 2**20:,.1f} MiB",
        )
    local.show(table)


def _group(by: str) -> GroupBy:
    for name in get_args(GroupBy):
        if by == name:
            return name
    raise typer.BadParameter(f"one of {', '.join(get_args(GroupBy))}, got {by}", param_hint="--by")


def _seconds(since: str) -> int:
    known = _SINCE.fullmatch(since)
    if known is None:
        raise typer.BadParameter(f"a number and s, m, h or d, e.g. 12h; got {since}", param_hint="--since")
    return int(known[1]) * _UNITS[known[2]]
