"""``selfloop samplers``: what can be sampled from, on a running server."""

from typing import Annotated

import typer

from selfloop.cli import local, names, remote

app = typer.Typer(invoke_without_command=True)

SamplerId = Annotated[
    str, typer.Argument(help="The sampler: its id (also abc1234:sample:0), or that of its model or deployment.")
]


@app.callback()
def samplers(
    context: typer.Context,
    team: Annotated[bool, typer.Option("--team", help="The whole team's, not only this key's.")] = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List the samplers, newest first."""
    if remote.is_alone(context):
        list_samplers(team, url, data_dir, as_json)


@app.command("list")
def list_samplers(
    team: Annotated[bool, typer.Option("--team", help="The whole team's, not only this key's.")] = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List the samplers, newest first."""
    with remote.server(url, data_dir) as server:
        rows: list[remote.Json] = server.rows("/v1/loops/samplers", "samplers", scope="org" if team else None)
    rows.sort(key=lambda row: row["created_at"], reverse=True)
    cells = (
        (row["id"], row["run_id"], row["base_model"], row["status"]["name"], remote.moment(row["created_at"]))
        for row in rows
    )
    remote.show(rows, ("sampler", "run", "base model", "status", "created"), cells, as_json)


@app.command("show")
def show_sampler(
    sampler_id: SamplerId, url: remote.Url = None, data_dir: local.DataDir = None, as_json: remote.AsJson = False
) -> None:
    """Show one sampler, with the models that it answers for."""
    with remote.server(url, data_dir) as server:
        row = names.sampler(server, sampler_id)
        if row["status"]["name"] != "INACTIVE":
            row["models"] = [entry["id"] for entry in server.get(f"/loops/samplers/{row['id']}/v1/models")["data"]]
        remote.show_one(row, as_json)


@app.command()
def deactivate(
    sampler_id: SamplerId, url: remote.Url = None, data_dir: local.DataDir = None, as_json: remote.AsJson = False
) -> None:
    """End a sampler; what it served stays."""
    with remote.server(url, data_dir) as server:
        row = names.sampler(server, sampler_id)
        ended = server.post(f"/v1/loops/samplers/{row['id']}/deactivate")
    remote.report(f"deactivated {row['id']}", ended, as_json)


@app.command()
def wake(
    sampler_id: SamplerId, url: remote.Url = None, data_dir: local.DataDir = None, as_json: remote.AsJson = False
) -> None:
    """Wake a sleeping sampler, and wait until it serves."""
    with remote.server(url, data_dir) as server:
        row = names.sampler(server, sampler_id)
        server.post(f"/loops/samplers/{row['id']}/wake")
        status = wait_until_ready(server, names.sampler(server, row["id"]))
    remote.report(f"{row['id']}: {status}", {"id": row["id"], "status": status}, as_json)


def wait_until_ready(server: remote.Server, sampler: remote.Json) -> str:
    """The status that it reaches, which is ``ACTIVE``.

    Raises:
        CommandFailed: it ended or cannot come up.
    """
    if sampler["model_id"] is None:  # a server that answers as serverless capacity wakes it by the request itself
        return sampler["status"]["name"]
    while True:
        ready = server.get(f"/v1/models/{sampler['model_id']}/deployments/{sampler['deployment_id']}")
        status = ready["status"]
        if status == "ACTIVE":
            return status
        if status in (
            "DEPLOY_FAILED",
            "UNHEALTHY",
            "BUILD_FAILED",
            "BUILD_STOPPED",
            "DEACTIVATING",
            "INACTIVE",
            "FAILED",
        ):
            why = f": {ready['reason']}" if ready.get("reason") else ""
            raise remote.CommandFailed(f"sampler {sampler['id']} is {status}{why}")
        if status == "SCALED_TO_ZERO":
            server.post(f"/loops/samplers/{sampler['id']}/wake")
