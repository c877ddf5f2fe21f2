"""``selfloop keys``: API keys of a data directory."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated

import typer

from selfloop.cli import local, remote
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
    as_json: remote.AsJson = False,
) -> None:
    """Create a key; it is shown only once."""

    async def work() -> str:
        async with local.opened(data_dir) as data:
            seconds = None if expires_in is None else local.duration_s("--expires-in", expires_in)
            return await data.access.create_key(name, team, parse_role(role, "--role"), seconds)

    key = local.run(work)
    remote.report(key, {"name": name, "role": role, "key": key}, as_json)


@app.command("list")
def list_keys(data_dir: local.DataDir = None, as_json: remote.AsJson = False) -> None:
    """List the keys, by their first characters."""

    async def work() -> Sequence[remote.Json]:
        async with local.opened(data_dir) as data:
            teams = {team.id: team.name for team in await data.access.teams()}
            return [
                {
                    "id": row.id,
                    "name": row.name,
                    "team": teams[row.team_id],
                    "role": row.role,
                    "prefix": row.prefix,
                    "created_at": _iso(row.created_at),
                    "expires_at": _iso(row.expires_at),
                    "revoked_at": _iso(row.revoked_at),
                }
                for row in await data.access.keys()
            ]

    rows = local.run(work)
    cells = (
        (
            *(row[name] for name in ("id", "name", "team", "role")),
            row["prefix"] + "…",
            *(_minute(row[name]) for name in ("created_at", "expires_at", "revoked_at")),
        )
        for row in rows
    )
    remote.show(rows, ("id", "name", "team", "role", "key", "created", "expires", "revoked"), cells, as_json)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, from `selfloop keys list`.")],
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Revoke a key, at once and for good."""

    async def work() -> None:
        async with local.opened(data_dir) as data:
            await data.access.revoke_key(key_id)

    local.run(work)
    remote.report(f"revoked {key_id}", {"id": key_id, "revoked": True}, as_json)


@app.command("rotate-links")
def rotate_links(data_dir: local.DataDir = None) -> None:
    """Invalidate every download link at once, also in a running server."""
    folder = local.resolve(data_dir)
    if not folder.is_dir():
        raise typer.BadParameter(f"{folder} is no data directory", param_hint="--data-dir")
    signed_urls.rotate(folder)
    typer.echo("the secret that signs links is a new one")


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat()


def _minute(stamp: str | None) -> str:
    """With its year: a key lives long."""
    return "" if stamp is None else stamp[:16].replace("T", " ")
