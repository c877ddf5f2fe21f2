"""``selfloop``: the command line. Heavy imports happen inside the commands, so that help is instant."""

import logging
from pathlib import Path
from typing import Annotated

import typer

import selfloop
from selfloop.cli import adapters, backup, chat, checkpoints, database, keys, logs, models, prune, runs, samplers, usage

app = typer.Typer(
    name="selfloop",
    help="Open, self-hosted training API for the official Loops client.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(keys.app, name="keys", help="API keys: create, list, revoke.")
app.add_typer(models.app, name="models", help="The model catalogue: list, add.")
app.command("export")(adapters.export)
app.command("import")(adapters.import_adapter)
app.add_typer(runs.app, name="runs", help="Runs: list, show, deactivate.")
app.add_typer(samplers.app, name="samplers", help="Samplers: list, show, deactivate, wake.")
app.add_typer(checkpoints.app, name="checkpoints", help="Checkpoints: list, delete, deploy, download.")
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
    """Open, self-hosted training API for the official Loops client."""


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where everything is kept. Default: $SELFLOOP_DATA_DIR or ~/.selfloop.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Compute type: auto, float32 or bfloat16.")] = "auto",
    public_url: Annotated[
        str | None, typer.Option(help="Base of the URLs in answers, behind a proxy that hides it.")
    ] = None,
    serve_weights: Annotated[bool, typer.Option(help="Let /hf give out weight files too.")] = False,
    hub_url: Annotated[
        str | None,
        typer.Option(
            envvar="SELFLOOP_HUB_URL",
            show_envvar=False,
            help="The hub that /hf asks for what is not served here, so that data sets load; off asks none. "
            "Default: $SELFLOOP_HUB_URL, or https://huggingface.co unless $HF_HUB_OFFLINE is set.",
        ),
    ] = None,
    prepare: Annotated[bool, typer.Option(help="Prepare the embedded model at start, once.")] = True,
    capacity: Annotated[
        str,
        typer.Option(
            envvar="SELFLOOP_CAPACITY",
            help="Kinds of capacity for runs and samplers: dedicated; both (serverless, by their scope); serverless "
            "(the default of those that can have it). Serverless has no ids, and its samples are queued.",
        ),
    ] = "dedicated",
    serverless_max_rank: Annotated[
        int | None, typer.Option(min=1, help="Largest LoRA rank on serverless capacity; any if not given.")
    ] = None,
    serverless_max_seq_len: Annotated[
        int | None, typer.Option(min=1, help="Longest sequences there, in tokens; the model's own if not given.")
    ] = None,
    log_format: Annotated[str, typer.Option(help="Of standard error: text or json.")] = "text",
    metrics_public: Annotated[
        bool, typer.Option("--metrics-public", help="Let /metrics be read without a key.")
    ] = False,
    session_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that a Tinker session lives without a heartbeat of its client.")
    ] = 600.0,
    snapshot_every: Annotated[
        float,
        typer.Option(min=0, help="Seconds of a run's work between two snapshots of it; what a recovery does again."),
    ] = 1.0,
    operation_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a worker that is still at one operation is replaced.")
    ] = 3600.0,
    heartbeat_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a sign of life after which a worker is replaced.")
    ] = 60.0,
    training_share: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.99, help="Part of a device's time that training gets while there is sampling to do, too."
        ),
    ] = 0.5,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Training gives the same bits whatever other runs do meanwhile.")
    ] = False,
    activation_memory: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GiB that one pass of training may take for its activations; longer sequences than fit are refused. "
            "A quarter of what the base weights leave of the device, or of this process's limit, unless set.",
        ),
    ] = None,
    kept_memory: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB that forwards of custom losses may take until their backward; 0 computes them twice. An eighth "
            "of what the base weights leave, unless set.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What a model's worker may take in all, such as 2.6GiB: runs that do not fit at a time take turns. "
            "All of the machine, or of this process's control group, unless set.",
        ),
    ] = None,
    stop_grace: Annotated[
        float, typer.Option(min=1, help="Seconds that SIGTERM leaves to what is running, to be finished and stored.")
    ] = 25.0,
    keep_loaded: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds that base models stay in memory when this server dies, for the one started after it."
        ),
    ] = 60.0,
    usd_per_million_tokens: Annotated[
        float, typer.Option(min=0, help="Price of tokens in the usage reports of Tinker's client; nobody is charged.")
    ] = 0.0,
    usd_per_gigabyte_month: Annotated[float, typer.Option(min=0, help="The same of stored checkpoints.")] = 0.0,
    stable_reinforce: Annotated[
        str,
        typer.Option(
            envvar="SELFLOOP_STABLE_REINFORCE",
            help="What Tinker's unpublished loss of that name is here: stand-in, or refuse.",
        ),
    ] = "stand-in",
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="SELFLOOP_DATABASE_URL",
            show_envvar=False,
            help="Keep the rows in PostgreSQL: postgresql://user@host/database. "
            "Default: $SELFLOOP_DATABASE_URL, or a file in the data directory.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file of a certificate chain: serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its private key.")] = None,
    body_memory: Annotated[
        float | None,
        typer.Option(
            min=0.2,
            help="GiB that the bodies of all requests may take at a time while they are read, decoded and stored; more "
            "are asked to come again. An eighth of the machine's memory, and half a GiB at least, unless set.",
        ),
    ] = None,
    key_requests_per_second: Annotated[
        float, typer.Option(min=0, help="Requests a second of each key, long polls apart; faster ones wait. 0: any.")
    ] = 0.0,
    key_mib_per_second: Annotated[
        float, typer.Option(min=0, help="MiB a second that each key may send in bodies; more has to wait. 0: any.")
    ] = 0.0,
    key_open_requests: Annotated[
        int, typer.Option(min=0, help="Requests, polls and streams of each key at a time. 0: any.")
    ] = 0,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="SELFLOOP_STORE",
            show_envvar=False,
            help="Keep checkpoints in an S3-compatible bucket: s3://bucket/prefix. "
            "Default: $SELFLOOP_STORE, or folders in the data directory.",
        ),
    ] = None,
) -> None:
    """Run the server."""
    from selfloop.cli.serve import serve_command
    from selfloop.server.middleware.key_limits import Limits

    serve_command(
        host,
        port,
        data_dir,
        device,
        dtype,
        public_url,
        serve_weights,
        hub_url,
        prepare,
        capacity,
        serverless_max_rank,
        serverless_max_seq_len,
        log_format,
        metrics_public,
        session_timeout,
        snapshot_every,
        operation_timeout,
        heartbeat_timeout,
        training_share,
        deterministic,
        activation_memory,
        kept_memory,
        memory,
        stop_grace,
        keep_loaded,
        usd_per_million_tokens,
        usd_per_gigabyte_month,
        stable_reinforce,
        database_url,
        tls_cert,
        tls_key,
        body_memory,
        Limits(key_requests_per_second, key_mib_per_second * 2**20, key_open_requests),
        store,
    )


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
) -> None:
    """Explain what is missing on this machine, or what is damaged in a data directory."""
    from selfloop.cli.doctor import run_bench, run_doctor

    if verify:
        from selfloop.cli.verify import run_verify

        raise typer.Exit(run_verify(data_dir, store))
    if bench:
        raise typer.Exit(run_bench(model))
    raise typer.Exit(run_doctor(data_dir, port))


@app.command()
def demo(
    data_dir: Annotated[Path | None, typer.Option(help="Where the demo keeps its server's data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; the script's default if not given.")] = None,
) -> None:
    """Fine-tune the embedded model through the official client, on this machine."""
    from selfloop.cli.demo import run_demo
    from selfloop.server.settings import default_data_dir

    raise typer.Exit(run_demo(data_dir or default_data_dir() / "demo", steps=steps))


if __name__ == "__main__":
    logging.captureWarnings(True)
    app()
