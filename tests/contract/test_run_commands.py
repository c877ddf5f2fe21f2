"""Curves of runs on the command line, against a real gateway."""

import csv
import json
import re
from pathlib import Path

import httpx
import pytest
from test_command_line import Cli

from gateway import Gateway, Run, ok


@pytest.fixture(scope="module")
def cli(gateway: Gateway) -> Cli:
    return Cli(gateway)


@pytest.fixture(scope="module")
def trained(http: httpx.Client) -> Run:
    made = Run.create(http, name="drawn").attached()
    made.train(1, 2, 3)
    return made


def test_runs_show_draws_curves_and_prints_them_as_csv(cli: Cli, trained: Run):
    text = cli.text("runs", "show", trained.id)
    assert re.search(r"^train/loss_mean: \d", text, re.MULTILINE)
    assert re.search(r"^ +\S+ \|.*\*", text, re.MULTILINE)
    assert "step 1" in text
    header, *rows = csv.reader(cli.text("runs", "show", trained.id, "--csv").splitlines())
    numbers = ok(trained.http.get(f"/v1/loops/runs/{trained.id}/metrics"))
    assert header[:3] == ["number", "step", "time"]
    assert len(rows) == numbers["last"]
    column = header.index("train/loss_mean")
    (losses,) = [one["values"] for one in numbers["series"] if one["name"] == "train/loss_mean"]
    assert [float(row[column]) for row in rows if row[column]] == losses
    assert {one["name"] for one in cli.json("runs", "show", trained.id)["metrics"]} == set(header[3:])


def test_runs_watch_prints_each_step_until_the_run_ends(cli: Cli, http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1, 2)
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    head, *steps = cli.text("runs", "watch", run.id).splitlines()
    assert head.split()[:3] == ["step", "loss", "norm"]
    assert [line.split()[0] for line in steps] == ["1", "2"]
    points = [json.loads(line) for line in cli.text("runs", "watch", run.id, "--json").splitlines()]
    assert [point["number"] for point in points] == [1, 2, 3, 4]


def test_runs_compare_shows_two_beside_each_other(cli: Cli, trained: Run, http: httpx.Client):
    other = Run.create(http).attached()
    other.train(4)
    text = cli.text("runs", "compare", trained.id, other.id)
    assert re.search(r"^ *optim/grad_norm +\S+ +\S+", text, re.MULTILINE)
    assert f"train/loss_mean of {other.id}" in text
    header, *rows = csv.reader(cli.text("runs", "compare", trained.id, other.id, "--csv").splitlines())
    assert header == ["quantity", "step", trained.id, other.id]
    assert [row[1] for row in rows if row[0] == "train/loss_mean" and row[3]] == ["1"]
    assert set(cli.json("runs", "compare", trained.id, other.id)) == {trained.id, other.id}


def test_runs_timeline_shows_waits_and_computing(cli: Cli, trained: Run, tmp_path: Path):
    text = cli.text("runs", "timeline", trained.id)
    assert len(re.findall(r"^optim_step +\d+\.\d\ds +\d+\.\d\ds  [ .]*#+$", text, re.MULTILINE)) == 3
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(cli.json("runs", "timeline", trained.id, "--last", "2")["spans"]) == 2
    file = tmp_path / "trace.json"
    assert str(file) in cli.text("runs", "timeline", trained.id, "--perfetto", str(file))
    assert {event["name"] for event in json.loads(file.read_text())["traceEvents"]} >= {
        "optim_step",
        "forward_backward",
    }


def test_runs_track_says_what_it_needs(cli: Cli, trained: Run):
    assert "tensorboard:DIR" in cli.run("runs", "track", trained.id, "--to", "nowhere", rc=2).stderr
    assert "tensorboard:DIR" in cli.run("runs", "track", trained.id, "--to", "tensorboard", rc=2).stderr


def test_event_files_of_tensorboard_have_every_number(cli: Cli, trained: Run, http: httpx.Client, tmp_path: Path):
    """With TensorBoard's own reader; skipped where its package is not installed, as it is nothing of ours."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run.create(http).attached()
    run.train(1, 2)
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    assert "number 4" in cli.text("runs", "track", run.id, "--to", f"tensorboard:{tmp_path}")
    events = reader.EventAccumulator(str(tmp_path / run.id)).Reload()
    for series in ok(http.get(f"/v1/loops/runs/{run.id}/metrics"))["series"]:
        read = events.Scalars(series["name"])
        assert [event.step for event in read] == series["steps"]
        assert [event.value for event in read] == pytest.approx(series["values"])
