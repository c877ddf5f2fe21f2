"""``selfloop runs timeline``: what a run waited for and computed, as bars or as a file for Perfetto."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local, plot, remote, run_curves

_MAX_SPANS = 5000
_WIDTH = 34
_WAITING, _COMPUTING = "·", "█"
_PLAIN = str.maketrans({_WAITING: ".", _COMPUTING: "#"})


def timeline(
    run_id: run_curves.RunId,
    last: Annotated[int, typer.Option(min=1, max=_MAX_SPANS, help="So many of the newest at most.")] = 20,
    perfetto: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write everything to a file, which https://ui.perfetto.dev opens."),
    ] = None,
    url: remote.Url = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Show how long a run's operations and samples waited and computed."""
    path = f"/v1/loops/runs/{remote.segment(run_id)}/timeline"
    with remote.server(url, data_dir) as server:
        if perfetto is not None:
            perfetto.write_text(json.dumps(server.get(f"{path}/perfetto")), encoding="utf-8")
            typer.echo(f"wrote {perfetto}: open it at https://ui.perfetto.dev")
            return
        found = server.get(path, limit=last)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    if not found["spans"]:
        typer.echo("nothing in the log yet")
        return
    for line in bars(found["spans"]):
        typer.echo(line if plot.shows_utf8() else line.translate(_PLAIN))


def bars(spans: Sequence[remote.Json]) -> Iterator[str]:
    """A line for each span on one axis of time: points while it waited, blocks while it was computed."""
    start, end = min(span["accepted"] for span in spans), max(span["ended"] for span in spans)
    scale = _WIDTH / max(end - start, 1e-9)
    yield f"{'':<20} {'wait':>7} {'compute':>7}  0 s{f'{end - start:.1f} s':>{_WIDTH - 3}}"
    for span in spans:
        begins, computes, ends = (
            min(int((span[name] - start) * scale), _WIDTH) for name in ("accepted", "begun", "ended")
        )
        waited, computed = span["begun"] - span["accepted"], span["ended"] - span["begun"]
        bar = " " * begins + _WAITING * (computes - begins) + _COMPUTING * (max(ends - computes, int(computed > 0)))
        failed = "  failed" if span["error"] else ""
        yield f"{span['kind']:<20} {waited:>6.2f}s {computed:>6.2f}s  {bar}{failed}"
