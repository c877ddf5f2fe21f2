"""The curves of a run over HTTP: pages, few points, and the stream."""

import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from gateway import MODEL, Gateway, Json, Run, datum, ok, until, words


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    """A run that has trained for three steps."""
    made = Run.create(http, name="curves").attached()
    made.train(1, 2, 3)
    return made


def metrics(run: Run, **params: object) -> Json:
    return ok(run.http.get(f"/v1/loops/runs/{run.id}/metrics", params=params))


def series(run: Run, **params: object) -> dict[str, Json]:
    return {one["name"]: one for one in metrics(run, **params)["series"]}


def events(lines: Iterator[str]) -> Iterator[tuple[str, Json]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_each_step_has_its_numbers(run: Run):
    found = series(run)
    assert found["train/loss_mean"]["steps"] == [1, 2, 3]
    assert found["train/loss_mean"]["numbers"] == [1, 3, 5]
    assert found["optim/grad_norm"]["numbers"] == [2, 4, 6]
    assert found["train/tokens"]["values"] == [11.0] * 3
    for mean, total, tokens in zip(
        *(found[f"train/{name}"]["values"] for name in ("loss_mean", "loss_sum", "supervised_tokens")), strict=True
    ):
        assert mean * tokens == pytest.approx(total)
    assert all(value > 0 for value in found["optim/grad_norm"]["values"])
    assert all(abs(at - time.time()) < 3600 for at in found["train/wait_s"]["times"])


def test_the_loss_is_the_one_that_was_answered(run: Run):
    result = run.forward([datum(words(7))])
    assert series(run)["forward/loss_mean"]["values"][-1] == result["metrics"]["loss"]


def test_pages_go_on_where_they_ended(run: Run):
    whole, seen, after = series(run, names="train/loss_mean")["train/loss_mean"], [], 0
    while after is not None:
        page = metrics(run, names="train/loss_mean", after=after, limit=2)
        seen += [value for one in page["series"] for value in one["values"]]
        after = page["next_after"]
    assert seen == whole["values"]
    assert len(series(run, points=3)["train/loss_mean"]["values"]) == 3
    assert metrics(run, after=10_000) == {"run_id": run.id, "series": [], "last": 10_000, "next_after": None}


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"names": "train/loss_mean,"}, "names"),
        ({"limit": "0"}, "limit"),
        ({"points": "2"}, "points"),
        ({"after": "-1"}, "after"),
    ],
)
def test_what_cannot_be_asked_is_named(run: Run, params: dict[str, str], field: str):
    refused = run.http.get(f"/v1/loops/runs/{run.id}/metrics", params=params)
    assert refused.status_code in (400, 422), refused.text
    assert field in refused.text


def test_the_stream_has_what_was_and_what_comes_until_the_run_ends(gateway: Gateway, http: httpx.Client):
    run = Run.create(http).attached()
    run.train(1)
    got: list[tuple[str, Json]] = []

    def watch() -> None:
        with gateway.http().stream("GET", f"/v1/loops/runs/{run.id}/metrics/stream", timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            got.extend(events(answer.iter_lines()))

    watching = threading.Thread(target=watch)
    watching.start()
    run.train(2)
    ok(http.post(f"/v1/loops/runs/{run.id}/deactivate"))
    watching.join(60)
    assert not watching.is_alive()
    names = [name for name, _ in got]
    assert names == ["metrics"] * 4 + ["end"]
    assert [event["number"] for _, event in got[:-1]] == [1, 2, 3, 4]
    assert got[2][1]["values"]["train/loss_mean"] == series(run)["train/loss_mean"]["values"][1]


def test_a_stream_goes_on_behind_a_number(run: Run):
    with run.http.stream("GET", f"/v1/loops/runs/{run.id}/metrics/stream", params={"after": 5, "timeout": 0}) as answer:
        got = list(events(answer.iter_lines()))
    assert got[0][1]["number"] == 6
    assert all(name == "metrics" for name, _ in got)


def test_prometheus_has_the_last_values_by_base_model(run: Run):
    # Another test's run may be the last to have trained.
    text = run.http.get("/metrics").text
    line = next(line for line in text.splitlines() if "selfloop_last_value" in line and 'grad_norm"' in line)
    assert f'model="{MODEL}"' in line
    assert run.id not in text


def test_runs_of_tinkers_clients_have_the_name_that_they_say_of_themselves(http: httpx.Client):
    def post(route: str, **body: object) -> Json:
        return ok(http.post(f"/api/v1/{route}", json=body))

    session = post("create_session", display_name="Tuesday", user_metadata={"recipe_name": "sl_basic"})["session_id"]
    made = [
        post("create_model", session_id=session, model_seq_id=place, base_model=MODEL, user_metadata=metadata)
        for place, metadata in enumerate([None, {"recipe_name": "rl_math"}, {"name": "mine", "recipe_name": "rl_math"}])
    ]
    ids = [answer["request_id"].split("/")[1] for answer in made]
    until(lambda: len(ok(http.get("/v1/loops/runs", params={"scope": "org"}))["runs"]) >= 3, "runs are listed")
    names = {run["id"]: run["name"] for run in ok(http.get("/v1/loops/runs", params={"scope": "org"}))["runs"]}
    assert [names[id] for id in ids] == ["Tuesday", "rl_math", "mine"]
