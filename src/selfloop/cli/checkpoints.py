"""``selfloop checkpoints``: what was saved, on a running server."""

import json
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local, names, remote
from selfloop.control.capacity.hardware import INSTANCE_TYPE_ID

app = typer.Typer(invoke_without_command=True)


class Purpose(StrEnum):
    trainer = "trainer"
    sampler = "sampler"


CheckpointRef = Annotated[str, typer.Argument(help=f"A checkpoint: {names.FORMS_OF_A_CHECKPOINT}.")]
OfRun = Annotated[
    str | None,
    typer.Option("--run", help=f"Only those of this run: {names.FORMS_OF_A_RUN}.", parser=names.run_id, metavar="RUN"),
]
Target = Annotated[Purpose | None, typer.Option(help="Only those to go on training from, or those to sample from.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Only those of this base model.")]

_CHUNK_BYTES = 1 << 20
_DELETE = "/v1/loops/checkpoints/delete"


@app.callback()
def checkpoints(
    context: typer.Context,
    run: OfRun = None,
    model: OfModel = None,
    target: Target = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List checkpoints, newest first: of all runs of this key, or those that a filter names."""
    if remote.is_alone(context):
        list_checkpoints(run, model, target, url, data_dir, as_json)


@app.command("list")
def list_checkpoints(
    run: OfRun = None,
    model: OfModel = None,
    target: Target = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List checkpoints, newest first: of all runs of this key, or those that a filter names."""
    with remote.server(url, data_dir) as server:
        rows = [row for row in _listed(server, run, model) if target in (None, Purpose(row["target"]))]
    rows.sort(key=lambda row: row["created_at"], reverse=True)
    cells = (
        (
            row["id"],
            row["path"],
            row["step"],
            local.megabytes(row["size_bytes"]),
            remote.moment(row["created_at"]),
            remote.moment(row["expires_at"]),
        )
        for row in rows
    )
    remote.show(rows, ("id", "path", "step", "size", "created", "expires"), cells, as_json)


def _listed(server: remote.Server, run: str | None, model: str | None) -> list[remote.Json]:
    """Those of a run or of a model (or of both), or of every model that a run of the caller has."""
    if run is not None:
        rows = server.rows("/v1/loops/checkpoints", "checkpoints", run_id=run)
        return [row for row in rows if model in (None, row["base_model"])]
    models = [model] if model else sorted({row["base_model"] for row in server.rows("/v1/loops/runs", "runs")})
    return [row for name in models for row in server.rows("/v1/loops/checkpoints", "checkpoints", base_model=name)]


@app.command()
def delete(
    run: OfRun = None,
    model: OfModel = None,
    target: Target = None,
    name: Annotated[str | None, typer.Option(help="Only names of this pattern, e.g. 'step-*'.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Only those saved that long ago: 30s, 45m, 12h, 7d.")] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Spare the newest so many of each run and target.", min=0)
    ] = None,
    team: Annotated[bool, typer.Option("--team", help="The whole team's, not only those of this key's runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be deleted.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Delete the checkpoints that all the filters match; what a live sampler or a queued operation needs stays."""
    wanted = {
        "run_id": run,
        "base_model": model,
        "target": target and target.value,
        "name": name,
        "keep_last": keep_last,
    }
    wanted |= {
        "older_than_seconds": None if older_than is None else local.duration_s("--older-than", older_than),
        "scope": "org" if team else None,
    }
    body: remote.Json = {field: value for field, value in wanted.items() if value is not None}
    with remote.server(url, data_dir) as server:
        if not (dry_run or yes):
            if not sys.stdin.isatty():
                raise remote.CommandFailed("nobody is here to ask: pass --yes to delete, or --dry-run to look")
            _print_deleted(server.post(_DELETE, body | {"dry_run": True}), as_json=False)
            typer.confirm("Delete them?", abort=True)
        _print_deleted(server.post(_DELETE, body | {"dry_run": dry_run}), as_json)


def _print_deleted(answer: remote.Json, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
        return
    for row in answer["deleted"]:
        typer.echo(f"{row['id']}  {row['path']}  {local.megabytes(row['size_bytes'])}")
    for kept in answer["kept"]:
        typer.echo(f"{kept['checkpoint']['id']}  {kept['checkpoint']['path']}  stays: {kept['reason']}")
    did = "would delete" if answer["dry_run"] else "deleted"
    typer.echo(f"{did} {len(answer['deleted'])} checkpoints, {local.megabytes(answer['size_bytes'])}")


@app.command()
def deploy(
    checkpoint: Annotated[
        list[str],
        typer.Argument(help="Checkpoints of one base model, each by its id or its path (bt:// or tinker://)."),
    ],
    name: Annotated[str, typer.Option(help="Name of the deployed model.")],
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Make checkpoints a sampler that stays up and answers chat, each by its own name."""
    with remote.server(url, data_dir) as server:
        rows = [resolved(server, ref) for ref in checkpoint]
        made = server.post(
            "/v1/loops/checkpoints/deploy",
            {
                "checkpoint_ids": [row["id"] for row in rows],
                "model_name": name,
                "instance_type_id": INSTANCE_TYPE_ID,
                "hf_secret_name": "none",
            },
        )
        deployment = server.get(f"/v1/models/{made['model_id']}/deployments/{made['deployment_id']}")
        sampler = server.get(f"/v1/loops/samplers/{deployment['sampler_id']}")["sampler"]
        logs_path = f"/v1/models/{made['model_id']}/deployments/{made['deployment_id']}/logs"
        said = server.post(logs_path, {"min_level": "WARNING", "includes": ["equals the base model"]})["logs"]
    for line in said:
        typer.echo(f"warning: {line['message']}", err=True)
    if as_json:
        typer.echo(json.dumps(made | {"sampler": sampler}, indent=2))
        return
    typer.echo(f"sampler {sampler['id']} serves {name}: {sampler['base_url']}/v1")
    typer.echo(f"talk to it: selfloop chat {sampler['id']}")


@app.command()
def download(
    checkpoint: CheckpointRef,
    folder: Annotated[Path, typer.Argument(help="Where its files go; those that are whole there already are kept.")],
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Download a checkpoint's files. After an interruption, the same command continues where it stopped."""
    with remote.server(url, data_dir) as server:
        row = resolved(server, checkpoint)
        files = list(_files(server, row["id"]))
        total, done = sum(file["size_bytes"] for file in files), 0
        with local.progress() as report:
            for file in files:
                target = _inside(folder, file["relative_file_name"])
                for taken in _fetch(file, target):
                    done += taken
                    report(file["relative_file_name"], done / max(total, 1))
    facts = {
        "folder": str(folder),
        "files": [file["relative_file_name"] for file in files],
        "size_bytes": total,
    }
    remote.report(f"{folder}: {len(files)} files, {local.megabytes(total)}", facts, as_json)


def resolved(server: remote.Server, ref: str) -> remote.Json:
    """A checkpoint by id or path. Raises :class:`CommandFailed` when there is none."""
    found = names.find_checkpoint(server, ref)
    if found is None:
        raise remote.CommandFailed(f"checkpoint {ref!r} not found; `selfloop checkpoints` lists them")
    return found


def _files(server: remote.Server, id: str) -> Iterator[remote.Json]:
    token: int | None = 0
    while token is not None:
        page = server.get(f"/v1/loops/checkpoints/{id}/files", page_token=token)
        yield from page["presigned_urls"]
        token = page["next_page_token"]


def _inside(folder: Path, name: str) -> Path:
    target = (folder / name).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise remote.CommandFailed(f"the server names a file outside of the folder: {name}")
    return target


def _fetch(file: remote.Json, target: Path) -> Iterator[int]:
    """Bring one file here whole; yields the bytes of it that are here, in portions."""
    import httpx

    size: int = file["size_bytes"]
    if target.is_file() and target.stat().st_size == size:
        yield size
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.is_file() else 0
    if have > size:
        have = 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with httpx.stream("GET", file["url"], headers=headers, timeout=60, trust_env=False) as answer:
        if have and answer.status_code == 416:
            have = 0
        elif answer.status_code not in (200, 206):
            answer.read()
            raise remote.CommandFailed(remote.refusal(answer))
        else:
            if answer.status_code == 200:
                have = 0
            yield have
            with open(part, "ab" if have else "wb") as out:
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    out.write(chunk)
                    yield len(chunk)
    if part.stat().st_size != size:
        raise remote.CommandFailed(f"{target.name}: {part.stat().st_size} of {size} bytes came; run the command again")
    part.rename(target)
