"""``selfloop models``: the base models that scripts may name."""

from typing import Annotated

import typer
from rich.table import Table

from selfloop.cli import local

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_models(data_dir: local.DataDir = None) -> None:
    """List the catalogue."""

    async def work() -> Table:
        async with local.opened(data_dir) as data:
            models, aliases = await data.catalogue.entries()
            table = local.table("name", "source", "also served as", "computed by", "files")
            for row in models:
                names = ", ".join(a.alias for a in aliases if a.model_name == row.name)
                own = (data.catalogue.computed_by(row), data.catalogue.files_of(row))
                table.add_row(row.name, row.source, names, *own)
            return table

    local.show(local.run(work))


@app.command()
def add(
    source: Annotated[str, typer.Argument(help="A local Hugging Face folder, a hub id, or a model listed already.")],
    name: Annotated[
        str | None, typer.Option(help="Name to serve it under. Default: the folder's name or hub id.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="A further name; may be given several times.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    data_dir: local.DataDir = None,
) -> None:
    """Put a model in the catalogue, or serve one under further names."""

    async def work() -> str:
        with local.progress() as report:
            async with local.opened(data_dir) as data:
                model = await data.catalogue.add(
                    source,
                    name=name,
                    revision=revision,
                    aliases=alias or [],
                    on_progress=report,
                )
        return model.name

    added = local.run(work)
    typer.echo(f"{added} is served as: {', '.join([added, *(alias or [])])}")
