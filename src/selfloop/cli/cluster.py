"""``selfloop cluster``: the worker groups of a running server, and which of them runs live in."""

from typing import Annotated

import typer

from selfloop.cli import local, names, remote

app = typer.Typer(no_args_is_help=True)

GroupName = Annotated[
    str, typer.Argument(metavar="GROUP", help="The worker group, as `selfloop cluster status` has it.")
]


# Running operations are waited for, and a state is stored.
_MOVE_S = 600.0


@app.command()
def status(url: remote.Url = None, data_dir: local.DataDir = None, as_json: remote.AsJson = False) -> None:
    """List the worker groups of every base model in use, and how many runs and samplers live in each."""
    with remote.server(url, data_dir) as server:
        groups: list[remote.Json] = server.get("/v1/cluster")["groups"]
    cells = (
        (
            group["name"],
            f"{group['state']}, drained" if group["drained"] else group["state"],
            group["num_deployments"],
            group["num_samplers"],
            group["pid"] or "",
            group["reason"],
        )
        for group in groups
    )
    remote.show(groups, ("group", "state", "deployments", "samplers", "pid", "reason"), cells, as_json)


@app.command()
def drain(
    group: GroupName,
    undo: Annotated[bool, typer.Option("--undo", help="Have it take runs again.")] = False,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Move all runs and samplers out of a worker group, which takes nothing new."""
    with remote.server(url, data_dir) as server:
        found = server.post(f"/v1/cluster/{'undrain' if undo else 'drain'}", {"group": group}, timeout_s=_MOVE_S)
    said = "takes runs again" if undo else "is drained: what lived in it is in other groups"
    remote.report(f"{group} {said}", found["group"], as_json)


@app.command()
def move(
    run_id: Annotated[str, typer.Argument(help="The run: abc1234, or abc1234:train:0.")],
    group: Annotated[
        str | None, typer.Option("--to", help="The worker group. Default: the one with the fewest.")
    ] = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Move a run, with what shares its deployment, to another worker group; it goes on where it was."""
    with remote.server(url, data_dir) as server:
        id = names.run_id(run_id)
        found = server.post(f"/v1/loops/runs/{id}/move", {"group": group}, timeout_s=_MOVE_S)["group"]
    remote.report(f"{id} lives in {found['name']}", found, as_json)
