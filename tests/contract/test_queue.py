"""The order and the durability of a run's operations, as seen from the wire."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx

from gateway import MODEL, Json, Run, datum, ok, words


def loss(seed: int) -> Json:
    return {"data": [datum(words(seed))], "loss_fn": "cross_entropy"}


def key() -> str:
    return uuid.uuid4().hex


def test_the_same_key_runs_once(http: httpx.Client):
    run = Run.create(http).attached()
    run.forward_backward([datum(words(1))])
    step = key()
    first = run.post("optim_step", key=step, seq=3)
    again = run.post("optim_step", key=step, seq=3)
    assert ok(first, 202) == ok(again, 202) == {"operation_id": step, "schema_version": 1}
    assert first.headers["Location"] == f"/operations/{step}"
    result = run.result(step)
    assert ok(run.post("optim_step", key=step, seq=3), 202)["operation_id"] == step
    assert run.result(step) == result
    assert run.policy_version() == 1
    run.seq = 3
    run.train(2)
    assert run.policy_version() == 2


def test_the_same_key_at_the_same_time_runs_once(http: httpx.Client):
    run = Run.create(http).attached()
    step = key()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: run.post("optim_step", key=step, seq=2), range(8)))
    assert {ok(a, 202)["operation_id"] for a in answers} == {step}
    run.result(step)
    assert run.policy_version() == 1


def test_the_same_key_for_something_else(http: httpx.Client):
    run = Run.create(http).attached()
    used = key()
    ok(run.post("forward", key=used, seq=2, **loss(1)), 202)
    for op, seq, body in (("forward", 2, loss(2)), ("forward_backward", 2, loss(1)), ("forward", 3, loss(1))):
        response = run.post(op, key=used, seq=seq, **body)
        assert response.status_code == 409
        assert f"Idempotency-Key {used}" in response.json()["detail"]
        assert response.headers["X-Baseten-Error-Source"] == "06"
    assert run.result(used)["loss"] > 0


def test_the_same_seq_id_for_something_else(http: httpx.Client):
    run = Run.create(http).attached()
    first = run.submit("forward", **loss(1))
    response = run.post("forward", seq=2, **loss(2))
    assert response.status_code == 409
    assert "seq_id 2" in response.json()["detail"]
    assert response.headers["X-Baseten-Error-Source"] == "06"
    # The same request once more, without its key, is taken for a retry.
    assert ok(run.post("forward", seq=2, **loss(1)), 202)["operation_id"] == first
    run.result(first)


def test_seq_ids_run_in_order_whatever_order_they_come_in(http: httpx.Client):
    expected = Run.create(http, seed=3).attached()
    expected.train(1, 2, 3)

    run = Run.create(http, seed=3)
    init = {"lora_rank": 8, "base_model": MODEL}
    calls: list[tuple[str, Json]] = [("init_trainer_server", init)]
    for seed in (1, 2, 3):
        calls += [("forward_backward", loss(seed)), ("optim_step", {"adam_params": {"learning_rate": 1e-2}})]
    ids = {
        seq: ok(run.post(op, seq=seq, **body), 202)["operation_id"]
        for seq, (op, body) in reversed(list(enumerate(calls, 1)))
    }
    steps = [run.result(ids[seq])["metrics"]["step"] for seq in (3, 5, 7)]
    assert steps == [1, 2, 3]
    run.seq = len(calls)
    assert run.state() == expected.state()


def test_seq_ids_sent_at_the_same_time(http: httpx.Client):
    run = Run.create(http).attached()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seq: run.post("optim_step", seq=seq), range(2, 26)))
    steps = [run.result(ok(answer, 202)["operation_id"])["metrics"]["step"] for answer in answers]
    assert steps == list(range(1, 25))


def test_a_waiting_operation_says_for_what(http: httpx.Client):
    run = Run.create(http).attached()
    waiting = ok(run.post("optim_step", seq=3), 202)["operation_id"]
    ok(http.post(f"{run.path}/operations/{waiting}/cancel"))
    outcome = run.outcome(waiting)
    assert (outcome["status"], outcome["error_class"]) == ("error", "Cancelled")
    assert run.policy_version() == 0
    assert http.post(f"{run.path}/operations/{waiting}/cancel").status_code == 200


def test_a_refused_operation_is_not_waited_for(http: httpx.Client):
    run = Run.create(http).attached()
    assert run.post("optim_step", seq=2, adam_params={"learning_rate": -1}).status_code == 422
    assert run.post("load_state", seq=3, path="bt://loops:aaaaaaa/weights/a").status_code == 404
    behind = ok(run.post("optim_step", seq=4), 202)["operation_id"]
    assert run.result(behind, timeout=5)["metrics"]["step"] == 1
    assert run.post("optim_step", seq=2).status_code == 409


def test_a_refused_operation_that_comes_after_those_behind_it(http: httpx.Client):
    run = Run.create(http).attached()
    behind = [ok(run.post("optim_step", seq=seq), 202)["operation_id"] for seq in (6, 5, 3)]
    for seq in (4, 2):
        assert run.post("forward", seq=seq, data=[], loss_fn="cross_entropy").status_code == 422
    assert [run.result(id, timeout=5)["metrics"]["step"] for id in behind] == [3, 2, 1]


def test_a_refused_operation_may_be_corrected(http: httpx.Client):
    run = Run.create(http).attached()
    assert run.post("forward", seq=2, data=[], loss_fn="cross_entropy").status_code == 422
    corrected = ok(run.post("forward", seq=2, **loss(1)), 202)["operation_id"]
    assert run.result(corrected, timeout=5)["loss"] > 0
    run.seq = 2
    run.train(1)


def test_a_cancelled_operation_is_not_waited_for(http: httpx.Client):
    run = Run.create(http).attached()
    cancelled = ok(run.post("optim_step", seq=3), 202)["operation_id"]
    behind = ok(run.post("optim_step", seq=4), 202)["operation_id"]
    ok(http.post(f"{run.path}/operations/{cancelled}/cancel"))
    ok(run.post("optim_step", seq=2), 202)
    assert run.result(behind, timeout=5)["metrics"]["step"] == 2


def test_an_operation_that_ended_cannot_be_cancelled(http: httpx.Client):
    run = Run.create(http).attached()
    done = run.submit("optim_step")
    run.result(done)
    response = http.post(f"{run.path}/operations/{done}/cancel")
    assert response.status_code == 409
    assert response.headers["X-Baseten-Error-Source"] == "06"


def test_a_client_that_attaches_counts_anew(http: httpx.Client):
    first = Run.create(http, seed=1).attached()
    first.train(1, 2)
    saved = first.state()
    second = Run(http, first.resource).attached()
    assert second.policy_version() == 0
    second.train(1, 2)
    assert second.state() == saved
