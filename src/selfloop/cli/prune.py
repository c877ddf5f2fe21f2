"""``selfloop prune``: rows of what ended long ago."""

from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local, remote
from selfloop.control.resources.checkpoints.prune import Pruned


def prune(
    older_than: Annotated[str, typer.Option(help="Only what ended at least so long ago, e.g. 30d; 1d or more.")],
    archive: Annotated[
        Path | None, typer.Option(help="A new file for the removed rows: JSON lines, compressed with zstd.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove the rows; without this option only report what would be removed.")
    ] = False,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Remove runs, samplers and sessions that ended long ago and whose checkpoints are gone, and old results and logs.

    What is live, kept or pinned stays, with all that it needs. So do usage and the audit log.
    A server may run beside it.
    """
    age_s = local.duration_s("--older-than", older_than)

    async def work() -> Pruned:
        async with local.opened(data_dir) as data:
            with local.progress() as report:
                return await data.prune.run(age_s, archive=archive, dry_run=not yes, on_part=report)

    pruned = local.run(work)
    rows: list[remote.Json] = [
        {"kind": name, "count": kind.num, "size_bytes": kind.size_bytes} for name, kind in sorted(pruned.kinds.items())
    ]
    cells = ((row["kind"], f"{row['count']:,}", local.megabytes(row["size_bytes"])) for row in rows)
    remote.show(rows, ("kind", "count", "size"), cells, as_json)
    if as_json:
        return
    total = local.megabytes(sum(row["size_bytes"] for row in rows))
    if yes:
        typer.echo(f"removed {total}" + (f"; {archive} has it" if archive is not None else ""))
    else:
        typer.echo(f"nothing was removed: with --yes {total} would go")
