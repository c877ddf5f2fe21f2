"""``selfloop logs``: what a run, a sampler or a deployment of a server has logged."""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import typer

from selfloop.cli import local, names, remote

_POLL_S = 1.0
# Lines may be stored a little later than their own time; asking again from before drops none.
_OVERLAP_MS = 10_000
# The server shows at most a week at once, of which it keeps what it keeps.
_WINDOW_S = 7 * 86_400 - 3_600
_ENDED = ("STOPPED", "FAILED", "INACTIVE", "DEPLOY_FAILED")


class Level(StrEnum):
    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class _Source:
    """The log of one deployment. ``path`` shows it, ``key`` is the name of it in the answer."""

    def __init__(self, server: remote.Server, id: str) -> None:
        self._server = server
        self.sampler: remote.Json | None = None
        self.deployment = id
        run = names.find_run(server, id)
        if run is not None:
            self.deployment = _shown_id(run["deployment_id"])
            return
        self.sampler = names.find_sampler(server, id)
        if self.sampler is not None:
            _shown_id(self.sampler["model_id"])
        elif server.find(f"/v1/loops/deployments/{remote.segment(id)}") is None:
            raise remote.CommandFailed(f"no run, sampler or deployment {id!r} on this server")

    def lines(self, since_ms: int, level: Level | None, limit: int) -> list[remote.Json]:
        """The newest ``limit`` lines, oldest first."""
        named = {
            "start_epoch_millis": since_ms,
            "min_level": level and level.value,
            "limit": limit,
            "direction": "desc",
        }
        asked = {name: value for name, value in named.items() if value is not None}
        if self.sampler is not None:
            model, deployment = self.sampler["model_id"], self.sampler["deployment_id"]
            logs = self._server.post(f"/v1/models/{model}/deployments/{deployment}/logs", asked)["logs"]
        else:
            logs = self._server.get(f"/v1/loops/deployments/{self.deployment}/logs", **asked)["logs"]
        return sorted(logs, key=lambda line: int(line["timestamp"]))

    def has_ended(self) -> bool:
        if self.sampler is not None:
            row = self._server.get(f"/v1/loops/samplers/{self.sampler['id']}")["sampler"]
        else:
            row = self._server.get(f"/v1/loops/deployments/{self.deployment}")["deployment"]
        return row["status"]["name"] in _ENDED


def logs(
    id: Annotated[
        str,
        typer.Argument(help="A run (its trainer's log), a sampler or a deployment."),
    ],
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Follow the log until it has ended, or Ctrl-C.")
    ] = False,
    level: Annotated[
        Level | None, typer.Option(help="Only lines of this level or above.", case_sensitive=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="At most so many lines, the newest.", min=1, max=1000)] = 500,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Print the log of a run, a sampler or a deployment; as JSON one object a line."""
    with remote.server(url, data_dir) as server:
        source = _Source(server, id)
        lines = _followed(source, level, limit) if follow else iter(source.lines(_week_ago_ms(), level, limit))
        try:
            for line in lines:
                typer.echo(json.dumps(line) if as_json else _shown(line))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def _shown_id(id: str | None) -> str:
    if id is None:
        raise remote.CommandFailed("this server answers as serverless capacity, which has no log of its own")
    return id


def _followed(source: _Source, level: Level | None, limit: int) -> Iterator[remote.Json]:
    """Every line once, until what writes them has ended."""
    seen: set[tuple[str, str]] = set()
    since = _week_ago_ms()
    while True:
        # Asked first: what was logged before the end is then in the lines that come after.
        ended = source.has_ended()
        fresh = source.lines(since, level, limit)
        for line in fresh:
            mark = (line["timestamp"], line["message"])
            if mark not in seen:
                seen.add(mark)
                yield line
        if ended:
            return
        if fresh:
            since = int(fresh[-1]["timestamp"]) // 1_000_000 - _OVERLAP_MS
            seen = {(line["timestamp"], line["message"]) for line in fresh}
        time.sleep(_POLL_S)


def _week_ago_ms() -> int:
    return int((time.time() - _WINDOW_S) * 1000)


def _shown(line: remote.Json) -> str:
    at = datetime.fromtimestamp(int(line["timestamp"]) / 1e9)
    level = f"{line['level']:<7} " if line.get("level") else ""
    return f"{at:%Y-%m-%d %H:%M:%S}  {level}{line['message'].rstrip()}"
