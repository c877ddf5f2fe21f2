"""``selfloop keys``: API keys of a data directory."""

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from selfloop.cli import local

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    team: Annotated[str | None, typer.Option(help="Team of the key; made if new. Default: the first team.")] = None,
    data_dir: local.DataDir = None,
) -> None:
    """Make a key; it is shown this once."""

    async def work() -> str:
        async with local.opened(data_dir) as data:
            return await data.access.create_key(name, team)

    typer.echo(local.run(work))


@app.command("list")
def list_keys(data_dir: local.DataDir = None) -> None:
    """List the keys, by their first characters."""

    async def work() -> Table:
        async with local.opened(data_dir) as data:
            teams = {team.id: team.name for team in await data.access.teams()}
            table = local.table("id", "name", "team", "key", "created", "revoked")
            for row in await data.access.keys():
                revoked = "" if row.revoked_at is None else _day(row.revoked_at)
                table.add_row(row.id, row.name, teams[row.team_id], row.prefix + "…", _day(row.created_at), revoked)
            return table

    local.show(local.run(work))


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `selfloop keys list`.")],
    data_dir: local.DataDir = None,
) -> None:
    """Revoke a key, at once and for good."""

    async def work() -> None:
        async with local.opened(data_dir) as data:
            await data.access.revoke_key(key_id)

    local.run(work)
    typer.echo(f"revoked {key_id}")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
