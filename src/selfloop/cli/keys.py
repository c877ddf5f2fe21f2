"""``selfloop keys``: API keys of a data directory."""

from datetime import datetime
from typing import Annotated

import typer
from rich.table import Table

from selfloop.cli import local
from selfloop.control.data_dir import signed_urls
from selfloop.types.roles import parse_role

app = typer.Typer(no_args_is_help=True)


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    team: Annotated[str | None, typer.Option(help="Team of the key; created if new. Default: the first team.")] = None,
    role: Annotated[
        str,
        typer.Option(help="admin (also manages keys), member, or read-only (lists, downloads, watches)."),
    ] = "member",
    expires_in: Annotated[
        str | None, typer.Option(help="How long it is valid: 45m, 12h, 30d. Default: until it is revoked.")
    ] = None,
    data_dir: local.DataDir = None,
) -> None:
    """Create a key; it is shown only once."""

    async def work() -> str:
        async with local.opened(data_dir) as data:
            seconds = None if expires_in is None else local.duration_s("--expires-in", expires_in)
            return await data.access.create_key(name, team, parse_role(role, "--role"), seconds)

    typer.echo(local.run(work))


@app.command("list")
def list_keys(data_dir: local.DataDir = None) -> None:
    """List the keys, by their first characters."""

    async def work() -> Table:
        async with local.opened(data_dir) as data:
            teams = {team.id: team.name for team in await data.access.teams()}
            table = local.table("id", "name", "team", "role", "key", "created", "expires", "revoked")
            for row in await data.access.keys():
                times = [_day(at) for at in (row.created_at, row.expires_at, row.revoked_at)]
                table.add_row(row.id, row.name, teams[row.team_id], row.role, row.prefix + "…", *times)
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


@app.command("rotate-links")
def rotate_links(data_dir: local.DataDir = None) -> None:
    """Invalidate every download link at once, also in a running server."""
    folder = local.resolve(data_dir)
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no data directory", param_hint="--data-dir")
    signed_urls.rotate(folder)
    typer.echo("the secret that signs links is a new one")


def _day(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
