"""Both answering modes of ``/sample`` and its keys, as seen from the wire."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from gateway import MODEL, Json, Run, create_run, ok, words

ASYNC = {"Prefer": "respond-async"}


def body(seed: int | None = None, **fields: object) -> Json:
    made = {"prompt": words(5), "max_tokens": 6, "logprobs": 0, "return_tokens_as_token_ids": True} | fields
    return made if seed is None else made | {"seed": seed}


class Sampler:
    """The data plane of one sampler."""

    def __init__(self, http: httpx.Client, resource: Json) -> None:
        self.http = http
        self.id: str = resource["id"]
        self.path = f"/loops/samplers/{self.id}"

    def sample(self, content: Json, key: str | None = None, **headers: str) -> httpx.Response:
        return self.http.post(
            f"{self.path}/sample", json=content, headers=({"Idempotency-Key": key} if key else {}) | headers
        )

    def queue(self, content: Json, key: str | None = None, **headers: str) -> str:
        return ok(self.sample(content, key, **ASYNC, **headers), 202)["operation_id"]

    def poll(self, id: str) -> httpx.Response:
        while True:
            response = self.http.get(f"{self.path}/operations/{id}")
            if response.status_code != 408:
                return response

    def result(self, id: str) -> Json:
        outcome = ok(self.poll(id))
        assert outcome["status"] == "done", outcome
        return outcome["result"]


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    trained = Run.create(http, seed=5).attached()
    trained.train(1, 2)
    trained.save("live", "save_weights_for_sampler")
    return trained


@pytest.fixture(scope="module")
def sampler(http: httpx.Client, run: Run) -> Sampler:
    return Sampler(http, run.resource["sampler"])


def tokens(completion: Json) -> list[list[int]]:
    return [choice["token_ids"] for choice in completion["choices"]]


def test_penalties_are_kept_with_what_is_queued(sampler: Sampler):
    asked = body(3, n=2, max_tokens=20, frequency_penalty=2, logit_bias={"35": 8.5, "36": 8}, min_p=0.01)
    asked |= {"repetition_penalty": 1.5, "presence_penalty": 0.5}
    direct = tokens(ok(sampler.sample(asked)))
    assert tokens(sampler.result(sampler.queue(asked))) == direct
    assert tokens(ok(sampler.sample(body(3, n=2, max_tokens=20)))) != direct


def test_both_modes_give_the_same(sampler: Sampler, run: Run):
    direct = sampler.sample(body(7, n=2, prompt_logprobs=2))
    accepted = sampler.sample(body(7, n=2, prompt_logprobs=2), **ASYNC)
    assert accepted.headers["Preference-Applied"] == "respond-async"
    id = ok(accepted, 202)["operation_id"]
    assert accepted.json() == {"operation_id": id, "schema_version": 1}
    assert accepted.headers["Location"] == f"/operations/{id}"
    outcome = sampler.poll(id)
    queued = outcome.json()["result"]
    assert ok(direct) | {"id": ""} == queued | {"id": ""}
    version = str(run.policy_version())
    assert direct.headers["x-trainers-policy-version"] == outcome.headers["x-trainers-policy-version"] == version
    assert sampler.poll(id).content == outcome.content


def test_the_result_stays_when_the_adapter_changes(http: httpx.Client):
    run = Run.create(http, seed=6).attached()
    own = Sampler(http, run.resource["sampler"])
    id = own.queue(body(max_tokens=20))
    first = own.poll(id)
    run.train(1)
    run.save("next", "save_weights_for_sampler")
    assert own.poll(id).content == first.content
    assert first.headers["x-trainers-policy-version"] == "0"
    assert own.poll(own.queue(body())).headers["x-trainers-policy-version"] == "1"


def test_a_pinned_checkpoint_by_header_and_by_body(sampler: Sampler, run: Run):
    run.train(3)
    other = run.save("pinned", "save_weights_for_sampler")
    run.train(4)
    run.save("live", "save_weights_for_sampler")
    by_body = sampler.poll(sampler.queue(body(3, lora=other, model=MODEL)))
    by_header = sampler.poll(sampler.queue(body(3), **{"X-Checkpoint-Path": other}))
    both = sampler.sample(body(3, lora=other), **{"X-Checkpoint-Path": other})
    assert tokens(ok(by_body)["result"]) == tokens(ok(by_header)["result"]) == tokens(ok(both))
    assert by_body.headers["x-trainers-policy-version"] == "3"
    disagreeing = sampler.sample(body(lora="bt://loops:aaaaaaa/weights/x"), **{"X-Checkpoint-Path": other})
    assert disagreeing.status_code == 422
    unknown = sampler.sample(body(lora="bt://loops:aaaaaaa/weights/x"), **ASYNC)
    assert unknown.status_code == 404
    assert unknown.headers["X-Baseten-Error-Source"] == "06"


@pytest.mark.parametrize("headers", [ASYNC, {}], ids=["queued", "direct"])
def test_the_same_key_samples_once(sampler: Sampler, headers: dict[str, str]):
    def answer(response: httpx.Response) -> Json:
        return sampler.result(ok(response, 202)["operation_id"]) if headers else ok(response)

    key = uuid.uuid4().hex
    with ThreadPoolExecutor(6) as pool:
        first = list(pool.map(lambda _: answer(sampler.sample(body(max_tokens=20), key, **headers)), range(6)))
    again = answer(sampler.sample(body(max_tokens=20), key, **headers))
    assert all(completion == again for completion in first)
    different = sampler.sample(body(max_tokens=19), key, **headers)
    assert different.status_code == 409
    assert f"Idempotency-Key {key}" in different.json()["detail"]
    assert different.headers["X-Baseten-Error-Source"] == "06"
    fresh = answer(sampler.sample(body(max_tokens=20), uuid.uuid4().hex, **headers))
    assert fresh["id"] != again["id"]


@pytest.mark.parametrize("headers", [ASYNC, {}], ids=["queued", "direct"])
def test_the_same_key_at_another_sampler_is_another_request(
    http: httpx.Client, sampler: Sampler, headers: dict[str, str]
):
    key = uuid.uuid4().hex
    other = Sampler(http, create_run(http)["sampler"])
    for one, content in ((sampler, body()), (other, body(max_tokens=2))):
        response = one.sample(content, key, **headers)
        completion = one.result(ok(response, 202)["operation_id"]) if headers else ok(response)
        assert len(tokens(completion)[0]) <= content["max_tokens"]


def test_a_finished_sample_cannot_be_cancelled(sampler: Sampler):
    id = sampler.queue(body())
    sampler.result(id)
    response = sampler.http.post(f"{sampler.path}/operations/{id}/cancel")
    assert response.status_code == 409
    assert response.headers["X-Baseten-Error-Source"] == "06"


def test_queued_samples_belong_to_their_sampler_and_team(
    http: httpx.Client, other_team: httpx.Client, sampler: Sampler
):
    id = sampler.queue(body())
    path = f"{sampler.path}/operations/{id}"
    elsewhere = f"/loops/samplers/{create_run(http)['sampler']['id']}/operations/{id}"
    assert other_team.get(path).status_code == other_team.post(f"{path}/cancel").status_code == 404
    assert http.get(elsewhere).status_code == http.post(f"{elsewhere}/cancel").status_code == 404
    assert http.get(f"{sampler.path}/operations/nothing").status_code == 404
    sampler.result(id)


@pytest.mark.parametrize(
    ("content", "headers", "field"),
    [
        (body(max_tokens=10_000), ASYNC, "max_tokens"),
        (body(prompt=[10**9]), ASYNC, "prompt"),
        (body(), ASYNC | {"Idempotency-Key": "a b"}, "Idempotency-Key"),
        (body(), {"Idempotency-Key": "x" * 129}, "Idempotency-Key"),
        (body(lora="nonsense"), ASYNC, "lora"),
    ],
)
def test_what_could_never_be_sampled_is_refused_before_it_is_queued(
    sampler: Sampler, content: Json, headers: dict[str, str], field: str
):
    response = sampler.sample(content, **headers)
    assert response.status_code == 422
    assert response.json()["details"]["field"] == field


def test_other_preferences_change_nothing(sampler: Sampler):
    ok(sampler.sample(body(), Prefer="return=minimal"))
    ok(sampler.sample(body(), Prefer="return=minimal, Respond-Async"), 202)
    ok(sampler.sample(body(), traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01", **{"X-Baseten-Session-ID": "g1"}))
