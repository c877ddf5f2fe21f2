"""``selfloop``: the command line. Heavy imports happen inside the commands, so that help is instant."""

import logging
from pathlib import Path
from typing import Annotated

import typer

import selfloop
from selfloop.cli import (
    adapters,
    backup,
    chat,
    checkpoints,
    cluster,
    database,
    execute,
    keys,
    local,
    logs,
    models,
    prune,
    remote,
    runs,
    samplers,
    usage,
)
from selfloop.cli.serve import serve_command

app = typer.Typer(
    name="selfloop",
    help="Open, self-hosted training API for the official Loops and Tinker clients.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys", help="API keys: create, list, revoke.")
app.add_typer(models.app, name="models", help="The model catalogue: list, add, fit.")
app.command("export")(adapters.export)
app.command("import")(adapters.import_adapter)
app.add_typer(runs.app, name="runs", help="Runs: list, show, watch, compare, timeline, track, deactivate.")
app.add_typer(samplers.app, name="samplers", help="Samplers: list, show, deactivate, wake.")
app.add_typer(checkpoints.app, name="checkpoints", help="Checkpoints: list, delete, deploy, download.")
app.add_typer(cluster.app, name="cluster", help="Worker groups: status, drain, move.")
# What follows the script is the script's.
app.command("exec", context_settings={"allow_interspersed_args": False})(execute.execute)
app.command("migrate-database")(database.migrate_database)
app.command("backup")(backup.make)
app.command("restore")(backup.restore)
app.command("prune")(prune.prune)
app.command("logs")(logs.logs)
app.command("chat")(chat.chat)
app.command("usage")(usage.usage)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"selfloop {selfloop.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    """Open, self-hosted training API for the official Loops and Tinker clients."""


app.command("serve")(serve_command)


@app.command()
def doctor(
    data_dir: Annotated[Path | None, typer.Option(help="The data directory to look at.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port that serve would use.")] = 8000,
    bench: Annotated[bool, typer.Option("--bench", help="Measure the machine and the engine on it instead.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="With --bench: a Hugging Face model folder, not a small model's shape.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare a data directory (and bucket) with its digests instead.")
    ] = False,
    store: Annotated[str | None, typer.Option(help="With --verify: s3://bucket/prefix of its checkpoints.")] = None,
    as_json: remote.AsJson = False,
) -> None:
    """Explain what is missing on this machine, or what is damaged in a data directory."""
    from selfloop.cli.doctor import run_bench, run_doctor

    if verify:
        from selfloop.cli.verify import run_verify

        raise typer.Exit(run_verify(data_dir, store, as_json=as_json))
    if bench:
        raise typer.Exit(run_bench(model, as_json=as_json))
    raise typer.Exit(run_doctor(data_dir, port, as_json=as_json))


@app.command()
def demo(
    data_dir: Annotated[Path | None, typer.Option(help="Where the demo keeps its server's data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; the script's default if not given.")] = None,
) -> None:
    """Fine-tune the embedded model through the official client, on this machine."""
    from selfloop.cli.demo import run_demo

    raise typer.Exit(run_demo(data_dir or local.resolve(None) / "demo", steps=steps))


if __name__ == "__main__":
    logging.captureWarnings(True)
    app()
