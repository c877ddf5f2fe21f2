"""``selfloop runs``: what was trained."""

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local, remote, run_curves, timeline, track

app = typer.Typer(invoke_without_command=True)
app.command("watch")(run_curves.watch)
app.command("compare")(run_curves.compare)
app.command("track")(track.track)
app.command("timeline")(timeline.timeline)

Everybody = Annotated[bool, typer.Option("--team", help="With a server: the whole team's, not only this key's.")]


@app.callback()
def runs(
    context: typer.Context,
    team: Everybody = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List the runs, newest first: of the server at --url or $SELFLOOP_URL, else of the data directory."""
    if remote.is_alone(context):
        list_runs(team, url, data_dir, as_json)


@app.command("list")
def list_runs(
    team: Everybody = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """List the runs, newest first: of the server at --url or $SELFLOOP_URL, else of the data directory."""
    if remote.named_url(url) is None:
        _of_directory(data_dir, as_json)
        return
    with remote.server(url, data_dir) as server:
        scope = "org" if team else None
        rows: list[remote.Json] = server.rows("/v1/loops/runs", "runs", scope=scope)
        trainers = {
            row["id"]: row["status"]["name"] for row in server.rows("/v1/loops/deployments", "deployments", scope="org")
        }
    rows.sort(key=lambda row: row["created_at"], reverse=True)
    cells = (
        (
            row["id"],
            "" if row["name"] == row["base_model"] else row["name"],
            row["base_model"],
            trainers.get(row["deployment_id"], "") if row["status"]["name"] == "ACTIVE" else row["status"]["name"],
            row["sampler"]["status"]["name"] if row["sampler"] else "",
            remote.moment(row["created_at"]),
        )
        for row in rows
    )
    remote.show(rows, ("run", "name", "base model", "trainer", "sampler", "created"), cells, as_json)


@app.command("show")
def show_run(
    run_id: run_curves.RunId,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_csv: run_curves.AsCsv = False,
    as_json: remote.AsJson = False,
) -> None:
    """Show one run of a server, with its trainer deployment, its optimizer steps and its curves."""
    with remote.server(url, data_dir) as server:
        if as_csv:
            typer.echo(run_curves.as_csv(run_curves.whole(server, run_id)), nl=False)
            return
        row = server.get(f"/v1/loops/runs/{remote.segment(run_id)}")["run"]
        if row["deployment_id"] is not None:
            deployment = server.get(f"/v1/loops/deployments/{row['deployment_id']}")["deployment"]
            row["deployment"] = {"status": deployment["status"]}
        row["steps"] = server.get(f"/loops/runs/{remote.segment(run_id)}/policy_version")["policy_version"]
        series = run_curves.thinned(server, run_id)
        if as_json:
            row["metrics"] = list(series.values())
        remote.show_one(row, as_json)
        if not as_json:
            for line in run_curves.drawn(series):
                typer.echo(line)


@app.command()
def deactivate(
    run_id: run_curves.RunId, url: remote.Url = None, data_dir: local.DataDir = None, as_json: remote.AsJson = False
) -> None:
    """End a run and its sampler; its checkpoints stay."""
    with remote.server(url, data_dir) as server:
        ended = server.post(f"/v1/loops/runs/{remote.segment(run_id)}/deactivate")
    remote.report(f"deactivated {run_id}", ended, as_json)


def _of_directory(data_dir: Path | None, as_json: bool) -> None:
    async def work() -> list[remote.Json]:
        async with local.opened(data_dir) as data:
            return [
                {
                    "id": row.id,
                    "name": row.name,
                    "base_model": row.base_model,
                    "status": row.status,
                    "steps": row.step,
                    "lora_rank": row.lora_rank,
                    "created_at": datetime.fromtimestamp(row.created_at).astimezone().isoformat(),
                }
                for row in await data.all_runs()
            ]

    rows = local.run(work)
    cells = (
        (
            row["id"],
            "" if row["name"] == row["base_model"] else row["name"],
            row["base_model"],
            row["status"],
            row["steps"],
            row["lora_rank"],
            remote.moment(row["created_at"]),
        )
        for row in rows
    )
    remote.show(rows, ("run", "name", "base model", "status", "steps", "rank", "created"), cells, as_json)
