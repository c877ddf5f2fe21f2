"""``selfloop runs track``: the numbers of a run, as they come, to a tracker of the user's.

The libraries are the user's own, and are loaded here alone, when they are asked for.
"""

import importlib
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

import typer

from selfloop.cli import local, remote, run_curves

_TARGETS = "tensorboard:DIR, wandb, wandb:PROJECT, mlflow:URI or trackio:PROJECT"
_PROJECT = "selfloop"


class Measured(NamedTuple):
    """What one operation measured, at ``at`` in UNIX seconds."""

    step: int
    at: float
    values: Mapping[str, float]


Log = Callable[[Measured], None]


@contextmanager
def tensorboard(folder: str, run: remote.Json) -> Generator[Log]:
    """Event files of TensorBoard in a folder of the run's, below ``folder``."""
    writers = _library("tensorboard.summary.writer.event_file_writer", "tensorboard")
    events = _library("tensorboard.compat.proto.event_pb2", "tensorboard")
    summaries = _library("tensorboard.compat.proto.summary_pb2", "tensorboard")
    writer = writers.EventFileWriter(f"{folder}/{run['id']}")

    def log(measured: Measured) -> None:
        values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in measured.values.items()]
        summary = summaries.Summary(value=values)
        writer.add_event(events.Event(wall_time=measured.at, step=measured.step, summary=summary))

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def wandb(project: str, run: remote.Json) -> Generator[Log]:
    """A run of Weights & Biases with the same id, which goes on where it is there already."""
    library = _library("wandb", "wandb")
    theirs = library.init(project=project or _PROJECT, id=run["id"], name=run["name"], resume="allow", config=run)
    # Several measurements belong to one step, so that it is no step of theirs.
    theirs.define_metric("*", step_metric="step")
    try:
        yield lambda measured: theirs.log({**measured.values, "step": measured.step})
    finally:
        theirs.finish()


@contextmanager
def mlflow(uri: str, run: remote.Json) -> Generator[Log]:
    """A run of the MLflow server or folder at ``uri``."""
    library = _library("mlflow", "mlflow-skinny")
    client = library.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(_PROJECT)
    experiment_id = client.create_experiment(_PROJECT) if found is None else found.experiment_id
    id = client.create_run(experiment_id, run_name=f"{run['name']} {run['id']}").info.run_id
    metric = _library("mlflow.entities", "mlflow-skinny").Metric

    def log(measured: Measured) -> None:
        at_ms = int(measured.at * 1000)
        # Its names have no colons.
        named = [(name.replace(":", "/"), value) for name, value in measured.values.items()]
        client.log_batch(id, metrics=[metric(name, value, at_ms, measured.step) for name, value in named])

    try:
        yield log
    finally:
        client.set_terminated(id)


@contextmanager
def trackio(project: str, run: remote.Json) -> Generator[Log]:
    """A run of Trackio's local project."""
    library = _library("trackio", "trackio")
    theirs = library.init(project=project or _PROJECT, name=f"{run['name']} {run['id']}", config=run)
    try:
        yield lambda measured: theirs.log(dict(measured.values), step=measured.step)
    finally:
        theirs.finish()


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def track(
    run_id: run_curves.RunId,
    to: Annotated[str, typer.Option("--to", help=f"{_TARGETS}.")],
    after: Annotated[int, typer.Option(min=0, help="Only what was measured behind this number.")] = 0,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
) -> None:
    """Send a run's numbers to a tracker, those that are there and those that come, until it has ended, or Ctrl-C."""
    name, _, where = to.partition(":")
    tracker = TRACKERS.get(name)
    if tracker is None or (name in ("tensorboard", "mlflow") and not where):
        raise typer.BadParameter(f"one of {_TARGETS}, got {to}", param_hint="--to")
    with remote.server(url, data_dir) as server:
        run = server.get(f"/v1/loops/runs/{remote.segment(run_id)}")["run"]
        try:
            with tracker(where, run) as log:
                for point in run_curves.followed(server, run_id, after):
                    values = {key: value for key, value in point["values"].items() if value is not None}
                    log(Measured(point["step"], point["at"], values))
                    after = point["number"]
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        finally:
            typer.echo(f"sent what was measured up to number {after}; --after {after} goes on from there")


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise remote.CommandFailed(f"{error}: pip install {package}") from None
