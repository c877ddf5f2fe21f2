"""``selfloop migrate-database``."""

from typing import Annotated

import typer

from selfloop.cli import local
from selfloop.control.data_dir.migrate_database import Moved, move_rows


def migrate_database(
    database_url: Annotated[
        str,
        typer.Option(
            envvar="SELFLOOP_DATABASE_URL",
            show_envvar=False,
            help="The empty PostgreSQL database: postgresql://user@host/database. Default: $SELFLOOP_DATABASE_URL.",
        ),
    ],
    data_dir: local.DataDir = None,
) -> None:
    """Move the rows of a data directory's file to PostgreSQL, all or none, while no server runs."""

    async def work() -> Moved:
        with local.progress() as report:
            return await move_rows(local.resolve(data_dir), database_url, report)

    moved = local.run(work)
    typer.echo(f"{moved.num_rows} rows moved to {moved.address}; {moved.left} is a copy that nothing reads any more.")
    typer.echo("From now on the server and every command need --database-url or SELFLOOP_DATABASE_URL.", err=True)
