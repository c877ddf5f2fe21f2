"""The curves of runs on the command line: drawn, followed, compared, and as CSV."""

import csv
import io
import json
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Annotated

import typer

from selfloop.cli import local, names, plot, remote

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV instead: a line for each measurement.")]
RunId = Annotated[
    str,
    typer.Argument(help=f"The run: {names.FORMS_OF_A_RUN}.", parser=names.run_id, metavar="RUN"),
]

Series = dict[str, remote.Json]
"""By name: what the server says of each quantity."""

# A dot is half a column of a drawing.
_POINTS = 2 * plot.WIDTH
_PAGE = 5000
_RECONNECT_S, _PATIENCE_S = 1.0, 60.0
# Of what is drawn, in this order; losses' own quantities follow.
_FIRST = ("train/loss_mean", "optim/grad_norm", "optim/learning_rate")
_PLAIN = ("loss_sum", "supervised_tokens", "tokens", "tokens_per_s", "compute_s", "wait_s", "pairs")
_WATCHED = {
    "loss": "train/loss_mean",
    "norm": "optim/grad_norm",
    "rate": "optim/learning_rate",
    "tokens/s": "train/tokens_per_s",
    "advantage": "train/advantage_mean",
    "gap": "train/sampler_logprob_gap",
}


def thinned(server: remote.Server, run_id: str) -> Series:
    """Every quantity of a run by as many points as a drawing has."""
    found = server.get(f"/v1/loops/runs/{remote.segment(run_id)}/metrics", points=_POINTS)
    return {series["name"]: series for series in found["series"]}


def whole(server: remote.Server, run_id: str) -> Series:
    """Every measurement of a run."""
    found: Series = {}
    after: int | None = 0
    while after is not None:
        page = server.get(f"/v1/loops/runs/{remote.segment(run_id)}/metrics", after=after, limit=_PAGE)
        for part in page["series"]:
            series = found.setdefault(part["name"], {"name": part["name"]})
            for column in ("numbers", "steps", "times", "values"):
                series.setdefault(column, []).extend(part[column])
        after = page["next_after"]
    return dict(sorted(found.items()))


def drawn(series: Series) -> Iterator[str]:
    """Lines that show the quantities that change from step to step by what is trained."""
    braille = plot.shows_utf8()
    for name in _shown_names(series):
        xs, ys = _points(series[name])
        if ys:
            yield f"{name}: {plot.number(ys[-1])}"
            yield from plot.plot(xs, ys, plot.bounds((xs, ys)), braille=braille)


def as_csv(series: Series) -> str:
    """A line for each measurement, a column for each quantity; empty where it was not measured."""
    rows: dict[int, dict[str, object]] = {}
    for name, one in series.items():
        for number, step, at, value in zip(one["numbers"], one["steps"], one["times"], one["values"], strict=True):
            rows.setdefault(number, {"number": number, "step": step, "time": at})[name] = value
    return _csv(["number", "step", "time", *series], [rows[number] for number in sorted(rows)])


def watch(
    run_id: RunId,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Follow a run until it has ended, or Ctrl-C: a line for each optimizer step; as JSON one object a line."""
    known: dict[str, float] = {}
    with remote.server(url, data_dir) as server:
        try:
            if not as_json:
                typer.echo(f"{'step':>8}" + "".join(f"{title:>12}" for title in _WATCHED))
            for point in followed(server, run_id):
                known |= {name: value for name, value in point["values"].items() if value is not None}
                if as_json:
                    typer.echo(json.dumps(point))
                elif point["kind"] == "optim_step":
                    cells = (plot.number(known[name]) if name in known else "" for name in _WATCHED.values())
                    typer.echo(f"{point['step']:>8}" + "".join(f"{cell:>12}" for cell in cells))
                    known.clear()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def followed(server: remote.Server, run_id: str, after: int = 0) -> Iterator[remote.Json]:
    """Every measurement behind ``after``, until the run has ended; a server that restarts meanwhile is waited for.

    Raises:
        CommandFailed: the server refuses, or is away for a minute.
    """
    path = f"/v1/loops/runs/{remote.segment(run_id)}/metrics/stream"
    heard = time.monotonic()
    while True:
        try:
            for name, event in server.events(path, after=after):
                heard = time.monotonic()
                if name == "end":
                    return
                after = event["number"]
                yield event
            heard = time.monotonic()
        except remote.Unreachable:
            if time.monotonic() - heard > _PATIENCE_S:
                raise
        time.sleep(_RECONNECT_S)


def compare(
    first: Annotated[str, typer.Argument(help=f"A run: {names.FORMS_OF_A_RUN}.", parser=names.run_id, metavar="FIRST")],
    second: Annotated[str, typer.Argument(help="The other one.", parser=names.run_id, metavar="SECOND")],
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    by_step: Annotated[
        bool, typer.Option("--csv", help="Print CSV instead: a line for each quantity and step.")
    ] = False,
    as_json: remote.AsJson = False,
) -> None:
    """Show two runs of a server beside each other: their last numbers, and curves on the same axes."""
    with remote.server(url, data_dir) as server:
        runs = {id: whole(server, id) if by_step else thinned(server, id) for id in (first, second)}
    if as_json:
        typer.echo(json.dumps({id: list(series.values()) for id, series in runs.items()}, indent=2))
    elif by_step:
        typer.echo(_beside(runs), nl=False)
    else:
        _show_beside(runs)


def _show_beside(runs: dict[str, Series]) -> None:
    shared = sorted(set.intersection(*(set(series) for series in runs.values())))
    table = local.table("quantity", *runs)
    for name in shared:
        table.add_row(name, *(_last(series[name]) for series in runs.values()))
    local.show(table)
    braille = plot.shows_utf8()
    for name in _shown_names(shared):
        curves = {id: _points(series[name]) for id, series in runs.items()}
        if all(ys for _, ys in curves.values()):
            box = plot.bounds(*curves.values())
            for id, (xs, ys) in curves.items():
                typer.echo(f"{name} of {id}")
                typer.echo("\n".join(plot.plot(xs, ys, box, braille=braille)))


def _last(series: remote.Json) -> str:
    ys = _points(series)[1]
    return plot.number(ys[-1]) if ys else ""


def _beside(runs: dict[str, Series]) -> str:
    rows: dict[tuple[str, int], dict[str, object]] = {}
    for id, series in runs.items():
        for name, one in series.items():
            for step, value in zip(one["steps"], one["values"], strict=True):
                # Of several measurements at one step the last.
                rows.setdefault((name, step), {"quantity": name, "step": step})[id] = value
    return _csv(["quantity", "step", *runs], [rows[key] for key in sorted(rows)])


def _csv(columns: Sequence[str], rows: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _points(series: remote.Json) -> tuple[list[float], list[float]]:
    """Steps and values, where these are finite."""
    pairs = [(step, value) for step, value in zip(series["steps"], series["values"], strict=True) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _shown_names(known: Collection[str]) -> list[str]:
    others = [name for name in known if name not in _FIRST and name.partition("/")[2] not in _PLAIN]
    return [name for name in _FIRST if name in known] + [name for name in others if name.startswith("train/")]
