"""``selfloop models``: the base models that scripts may name."""

from collections.abc import Sequence
from typing import Annotated

import typer

from selfloop.cli import local, remote
from selfloop.cli.fit import Question, show_fits
from selfloop.types.lora import MAX_LORA_RANK
from selfloop.types.settings import BaseDtype, Device, Dtype

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_models(data_dir: local.DataDir = None, as_json: remote.AsJson = False) -> None:
    """List the catalogue."""

    async def work() -> Sequence[remote.Json]:
        async with local.opened(data_dir) as data:
            models, aliases = await data.catalogue.entries()
            return [
                {
                    "name": row.name,
                    "source": row.source,
                    "revision": row.revision,
                    "aliases": [a.alias for a in aliases if a.model_name == row.name],
                    "computed_by": data.catalogue.computed_by(row),
                    "files": str(data.catalogue.files_of(row)),
                }
                for row in models
            ]

    rows = local.run(work)
    cells = (
        (
            row["name"],
            row["source"] if row["revision"] is None else f"{row['source']}@{row['revision']}",
            ", ".join(row["aliases"]),
            row["computed_by"],
            row["files"],
        )
        for row in rows
    )
    remote.show(rows, ("name", "source", "also served as", "computed by", "files"), cells, as_json)


@app.command()
def add(
    source: Annotated[
        str,
        typer.Argument(help="A local folder, a GGUF file, a hub id, modelscope:ORG/NAME, or a model listed already."),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name to serve it under. Default: the folder's or file's name, or the hub id.")
    ] = None,
    alias: Annotated[list[str] | None, typer.Option(help="A further name; may be given several times.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    hub_url: Annotated[
        str | None, typer.Option(help="The hub to download from. Default: $HF_ENDPOINT or the id's own hub.")
    ] = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Put a model in the catalogue, or serve one under further names."""

    async def work() -> str:
        with local.progress() as report:
            async with local.opened(data_dir) as data:
                model = await data.catalogue.add(
                    source,
                    name=name,
                    revision=revision,
                    hub_url=hub_url,
                    aliases=alias or [],
                    on_progress=report,
                )
        return model.name

    added = local.run(work)
    named = [added, *(alias or [])]
    remote.report(f"{added} is served as: {', '.join(named)}", {"name": added, "aliases": named[1:]}, as_json)


@app.command()
def fit(
    model: Annotated[
        str | None,
        typer.Argument(help="A listed model, a folder, or a config.json. Default: all that are listed."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=MAX_LORA_RANK, help="LoRA rank of the run to plan.")] = 32,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the sequence to train on. Default: as many as fit.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the device, such as 24GiB. Default: this machine's.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Where to compute: auto takes a GPU if there is one. A GPU elsewhere needs --memory.")
    ] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(help="Compute type: auto is bfloat16 where the device computes in it, or loses nothing by it."),
    ] = "auto",
    base_dtype: Annotated[
        BaseDtype, typer.Option(help="What base weights are kept in, as of serve: auto is the compute type.")
    ] = "auto",
    activation_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What one pass of training may take, as of serve.")
    ] = None,
    max_kv_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the KV cache, as of serve.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each model.")] = False,
    data_dir: local.DataDir = None,
) -> None:
    """Say what a model takes of a device's memory, before it is loaded."""
    sizes = (local.size_bytes("--memory", memory), local.size_bytes("--activation-memory", activation_memory))
    asked = Question(device, dtype, base_dtype, sizes[0], rank, context, sizes[1], max_kv_tokens)
    with local.failing_in_one_line():
        if not show_fits(model, asked, data_dir, as_json=as_json):
            raise typer.Exit(1)
