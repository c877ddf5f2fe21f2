"""``selfloop usage``: what was used, as a server reports it or in a data directory."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, get_args

import typer

from selfloop.cli import local, remote
from selfloop.control.observe.usage import GroupBy, UsageLine, as_rows

_SINCE = re.compile(r"([1-9][0-9]{0,5})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def usage(
    by: Annotated[str, typer.Option(help="run, key or team.")] = "run",
    since: Annotated[str | None, typer.Option(help="How far back, e.g. 12h or 7d; by whole hours.")] = None,
    team: Annotated[bool, typer.Option("--team", help="With a server: the whole team's, not only this key's.")] = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Show tokens, compute seconds and checkpoint bytes, the most computing first.

    Of the server at --url or $SELFLOOP_URL, else of the data directory.
    """
    group_by = _group(by)
    start = None if since is None else time.time() - _seconds(since)
    if remote.named_url(url) is None:
        rows = _of_directory(data_dir, group_by, start)
    else:
        rows = _of_server(url, data_dir, group_by, start, team)
    cells = (
        (
            row[f"{group_by}_id"] or "(no run)",
            row["name"],
            *(f"{row[name]:,}" for name in _COUNTS),
            f"{row['compute_s']:,.1f}",
            f"{row['checkpoint_bytes'] / 2**20:,.1f} MiB",
        )
        for row in rows
    )
    columns = (group_by, "name", "operations", "samples", "trained", "forwarded", "prefilled", "sampled")
    remote.show(rows, (*columns, "compute s", "stored"), cells, as_json)


_COUNTS = ("operations", "samples", "tokens_trained", "tokens_forwarded", "tokens_prefilled", "tokens_sampled")


def _of_directory(data_dir: Path | None, group_by: GroupBy, start: float | None) -> list[remote.Json]:
    async def work() -> list[remote.Json]:
        async with local.opened(data_dir) as data:
            lines: list[UsageLine] = list(await data.usage.report(None, group_by, start=start))
            return as_rows(lines, group_by)

    return local.run(work)


def _of_server(
    url: str | None, data_dir: Path | None, group_by: GroupBy, start: float | None, team: bool
) -> list[remote.Json]:
    with remote.server(url, data_dir) as server:
        rows: list[remote.Json] = server.rows(
            "/v1/loops/usage",
            "usage",
            group_by=group_by,
            scope="org" if team else None,
            start=None if start is None else datetime.fromtimestamp(start, UTC).isoformat(),
        )
    same = ("name", *_COUNTS, "checkpoint_bytes")
    return [
        {f"{group_by}_id": row["id"], "compute_s": row["compute_seconds"]} | {name: row[name] for name in same}
        for row in rows
    ]


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
