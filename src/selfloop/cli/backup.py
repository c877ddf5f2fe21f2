"""``selfloop backup`` and ``selfloop restore``."""

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local
from selfloop.control.data_dir import backup
from selfloop.control.gateway import database_url, store_address
from selfloop.types.errors import BadRequest

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the backup.")]


def make(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of a backup that is there.")] = False,
    data_dir: local.DataDir = None,
) -> None:
    """Copy a data directory to a new folder, consistently, also while its server runs."""
    target = folder.expanduser().absolute()
    with local.failing_in_one_line():
        if verify:
            backup.check_backup(target)
            typer.echo(f"{target} is what was written.")
            return
        os.umask(0o077)
        source = local.resolve(data_dir)
        if not source.is_dir():
            raise BadRequest("--data-dir", f"a data directory; {source} is none")
        store = store_address(local.given("store"))
        with local.progress() as report:
            made = backup.make_backup(source, database_url(source, local.given("database_url")), store, target, report)
    typer.echo(f"{target}: {made.num_files} files, {local.megabytes(made.size_bytes)}, checked.")
    for name, path in made.facts.models_outside.items():
        typer.echo(f"Not in it: the model {name} in {path}.", err=True)
    if made.facts.store != "local":
        typer.echo(f"Not in it: the checkpoints in {made.facts.store} (see docs/deploy.md).", err=True)
    for problem in [*(f"{key} was gone" for key in made.facts.missing), *made.damaged]:
        local.complain(f"in the data directory: {problem}")


def restore(
    folder: Folder,
    data_dir: local.DataDir = None,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="SELFLOOP_STORE",
            show_envvar=False,
            help="Where the checkpoints were copied to, if they are in a bucket: s3://bucket/prefix. "
            "Default: $SELFLOOP_STORE.",
        ),
    ] = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over", help="Use the bucket of the server that was backed up, which will never start again."
        ),
    ] = False,
) -> None:
    """Make a new data directory of a backup; with SELFLOOP_DATABASE_URL its rows go to PostgreSQL."""
    with local.failing_in_one_line():
        os.umask(0o077)
        target = local.resolve(data_dir)
        with local.progress() as report:
            facts = asyncio.run(
                backup.restore(
                    folder.expanduser().absolute(),
                    target,
                    report,
                    database=local.given("database_url"),
                    store=None if store is None else store_address(store),
                    take_over=take_over,
                )
            )
    typer.echo(f"{target} is what {facts.data_dir} was. `selfloop serve` on it goes on from there.")
    for name, path in facts.models_outside.items():
        if not Path(path).is_dir():
            local.complain(f"the folder {path} of the model {name} is not on this machine")
