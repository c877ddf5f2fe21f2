"""What a run waited for and computed, over time."""

import time

import httpx
import pytest

from gateway import Run, ok

KINDS = ["forward_backward", "optim_step"]


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    """A run that has trained for two steps."""
    made = Run.create(http, name="timeline").attached()
    made.train(1, 2)
    return made


def test_each_operation_is_a_span_from_its_acceptance_to_its_end(run: Run):
    found = ok(run.http.get(f"/v1/loops/runs/{run.id}/timeline"))
    spans = [span for span in found["spans"] if span["about"] == run.id]
    assert [span["kind"] for span in spans] == ["init_trainer_server", *KINDS * 2]
    assert found["is_whole"]
    for span in spans:
        assert span["accepted"] <= span["begun"] <= span["ended"] <= time.time()
        assert span["error"] == ""
        assert span["operation_id"]
    assert [span["tokens"] > 0 for span in spans if span["kind"] in KINDS] == [True, False] * 2


def test_a_part_is_the_newest(run: Run):
    whole = ok(run.http.get(f"/v1/loops/runs/{run.id}/timeline"))["spans"]
    part = ok(run.http.get(f"/v1/loops/runs/{run.id}/timeline", params={"limit": 3}))
    assert part == {"run_id": run.id, "spans": whole[-3:], "is_whole": False}


def test_the_file_for_perfetto_has_the_same(run: Run):
    answer = run.http.get(f"/v1/loops/runs/{run.id}/timeline/perfetto")
    assert answer.headers["content-disposition"] == f'attachment; filename="{run.id}.json"'
    trace = ok(answer)
    begun = [event["name"] for event in trace["traceEvents"] if event["ph"] == "b"]
    assert begun.count("forward_backward") == begun.count("optim_step") == 2
    assert trace["otherData"] == {"run_id": run.id, "is_truncated": "false"}


def test_another_teams_run_is_not_there(other_team: httpx.Client, run: Run):
    assert other_team.get(f"/v1/loops/runs/{run.id}/timeline").status_code == 404
    assert other_team.get(f"/v1/loops/runs/{run.id}/timeline/perfetto").status_code == 404
