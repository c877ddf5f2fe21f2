"""The official ``openai`` client against the whole server: base models and checkpoints by name."""

import asyncio
from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

import stores
from gateway import KEY, MODEL, Gateway, Json, Run, ok, until, words

MESSAGES = [{"role": "user", "content": "say ä"}]
SEEDED = {"seed": 7, "max_tokens": 12, "temperature": 1.0}
CHAT = "/oai/api/v1/chat/completions"
COMPLETIONS = "/oai/api/v1/completions"
MODELS = "/oai/api/v1/models"
MESSAGES_ROUTE = "/anthropic/api/v1/messages"


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    """A run with a checkpoint of either kind."""
    run = Run.create(http, seed=1).attached()
    run.train(1, 2)
    run.save("kept")
    run.save("served", "save_weights_for_sampler")
    return run


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/oai/api/v1", api_key=f"tml-{KEY}", max_retries=0, timeout=60) as client:
        yield client


def shared(http: httpx.Client) -> list[Json]:
    """The team's samplers that serve the whole server and are not ended."""
    rows = ok(http.get("/v1/loops/samplers", params={"scope": "org"}))["samplers"]
    live = [row for row in rows if row["status"]["name"] != "INACTIVE"]
    return [row for row in live if "shared by the team" in row["capacity"]["reason"]]


def test_models(client: OpenAI, run: Run, http: httpx.Client):
    listed = {model.id: model for model in client.models.list()}
    served = f"tinker://{run.id}/sampler_weights/served"
    assert listed[MODEL].parent is None
    assert listed[served].parent == MODEL
    assert not any("/weights/" in id for id in listed)
    for name in (MODEL, served, f"bt://loops:{run.id}/weights/kept", f"{MODEL};{served}"):
        assert client.models.retrieve(name).id == name
    assert ok(http.get(f"/oai/api/v1/models/{MODEL}"))["created"] > 0
    with pytest.raises(openai.NotFoundError, match="nobody/nothing"):
        client.models.retrieve("nobody/nothing")


def test_every_name_of_a_checkpoint_samples_what_its_own_sampler_samples(client: OpenAI, http: httpx.Client, run: Run):
    sampler, own = run.resource["sampler"]["id"], f"bt://loops:{run.id}/sampler_weights/served"
    body = {"prompt": words(3), "logprobs": 0, **SEEDED}
    headers = {"X-Checkpoint-Path": own}
    expected = ok(http.post(f"/loops/samplers/{sampler}/sample", json=body, headers=headers))["choices"][0]
    tinker = f"tinker://{run.id}/sampler_weights/served"
    for name in (tinker, own, f"{MODEL};{tinker}", f"tinker://{run.id}/weights/kept"):
        (choice,) = client.completions.create(model=name, **body).choices
        assert choice.text == expected["text"]
        assert choice.logprobs.token_logprobs == expected["logprobs"]["token_logprobs"]
    (base,) = client.completions.create(model=MODEL, **body).choices
    assert base.logprobs.token_logprobs != expected["logprobs"]["token_logprobs"]


def test_chat_whole_and_streamed(client: OpenAI, run: Run):
    name = f"tinker://{run.id}/sampler_weights/served"
    answer = client.chat.completions.create(model=name, messages=MESSAGES, **SEEDED)
    assert answer.model == name
    stream = client.chat.completions.create(model=name, messages=MESSAGES, stream=True, **SEEDED)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


async def test_the_asynchronous_client(gateway: Gateway, client: OpenAI):
    expected = client.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED).choices[0].message.content
    async with AsyncOpenAI(base_url=f"{gateway.url}/oai/api/v1", api_key=KEY, max_retries=0) as own:
        answers = await asyncio.gather(
            *(own.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED) for _ in range(8))
        )
    assert {answer.choices[0].message.content for answer in answers} == {expected}


def test_the_plain_routes_and_keys(gateway: Gateway, http: httpx.Client):
    body = {"model": MODEL, "max_tokens": 1, "temperature": 0}
    chat = ok(http.post(CHAT, json=body | {"messages": MESSAGES}))
    assert chat["usage"]["completion_tokens"] == 1
    assert ok(http.post(COMPLETIONS, json=body | {"prompt": "a"}))["choices"]
    anybody = gateway.http(None)
    for headers in ({"X-API-Key": KEY}, {"X-API-Key": f"tml-{KEY}"}, {"Authorization": f"Bearer tml-{KEY}"}):
        assert ok(anybody.get(MODELS, headers=headers))["object"] == "list"
    for headers in ({}, {"X-API-Key": "tml-nobody"}, {"Authorization": "Basic x"}):
        refused = anybody.get(MODELS, headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"


REFUSALS: dict[str, tuple[Json, int, str]] = {
    "unknown model": ({"model": "gpt-4"}, 404, "model"),
    "unknown checkpoint": ({"model": "tinker://aaaaaaa/sampler_weights/a"}, 404, "model"),
    "malformed path": ({"model": "tinker://aaaaaaa/a"}, 404, "model"),
    "path of a hidden name": ({"model": "tinker://aaaaaaa/sampler_weights/.a"}, 404, "model"),
    "empty model": ({"model": ""}, 404, "model"),
    "base without a path": ({"model": f"{MODEL};"}, 404, "model"),
    "path without a base": ({"model": ";tinker://aaaaaaa/sampler_weights/a"}, 404, "model"),
    "no messages": ({"messages": []}, 400, "messages"),
    "effort of no kind": ({"reasoning_effort": "enormous"}, 400, "reasoning_effort"),
    "effort without a variable": ({"reasoning_effort": "low"}, 400, "reasoning_effort"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(http: httpx.Client, name: str):
    fields, status, param = REFUSALS[name]
    response = http.post(CHAT, json={"model": MODEL, "messages": MESSAGES, "max_tokens": 1} | fields)
    assert response.status_code == status, response.text
    assert response.json()["error"]["param"] == param
    if name == "effort of no kind":
        assert "none, minimal, low, medium, high, xhigh" in response.json()["error"]["message"]


@pytest.mark.parametrize("header", ["Idempotency-Key", "X-Min-Policy-Version", "X-Run-Id", "X-Sampler-Id"])
def test_headers_that_could_not_be_obeyed(http: httpx.Client, header: str):
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1}
    response = http.post(COMPLETIONS, json=body, headers={header: "1"})
    assert response.status_code == 400
    assert response.json()["error"]["param"].lower() == header.lower()


def test_a_checkpoint_of_another_base_model(http: httpx.Client, run: Run):
    other = "HuggingFaceTB/SmolLM2-135M-Instruct"
    body = {"model": f"{other};tinker://{run.id}/sampler_weights/served", "prompt": "a"}
    response = http.post(COMPLETIONS, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "model"


def test_teams_share_nothing(client: OpenAI, other_team: httpx.Client, run: Run, http: httpx.Client):
    name = f"tinker://{run.id}/sampler_weights/served"
    assert other_team.post(COMPLETIONS, json={"model": name, "prompt": "a"}).status_code == 404
    assert [model["parent"] for model in ok(other_team.get(MODELS))["data"] if "://" in model["id"]] == []
    assert ok(other_team.post(COMPLETIONS, json={"model": MODEL, "prompt": "a", "max_tokens": 1}))["choices"]
    client.completions.create(model=MODEL, prompt="a", max_tokens=1)
    theirs, ours = shared(other_team), shared(http)
    assert len(theirs) == len(ours) == 1
    assert theirs[0]["id"] != ours[0]["id"]


def test_a_published_checkpoint_is_anybodys_to_sample(http: httpx.Client, other_team: httpx.Client):
    """By both dialects of the whole server and, pinned, on a sampler of one's own; until it is published no more."""
    run = Run.create(http, seed=4).attached()
    run.train(1, 2)
    run.save("given", "save_weights_for_sampler")
    name, own = f"tinker://{run.id}/sampler_weights/given", f"bt://loops:{run.id}/sampler_weights/given"
    asked = {"prompt": words(3), **SEEDED}
    message = {"model": name, "messages": MESSAGES, "max_tokens": 8, "temperature": 0.0}
    (text,) = [choice["text"] for choice in ok(http.post(COMPLETIONS, json=asked | {"model": name}))["choices"]]
    (said,) = ok(http.post(MESSAGES_ROUTE, json=message))["content"]
    sampler = Run.create(other_team, seed=5).attached().resource["sampler"]["id"]
    pinned = {"X-Checkpoint-Path": own}
    published = f"/api/v1/training_runs/{run.id}/checkpoints/sampler_weights/given/publish"
    assert http.post(published).status_code == 204
    for known in (name, own, f"{MODEL};{name}"):
        (choice,) = ok(other_team.post(COMPLETIONS, json=asked | {"model": known}))["choices"]
        assert choice["text"] == text
        assert ok(other_team.get(f"{MODELS}/{known}"))["parent"] == MODEL
    (theirs,) = ok(other_team.post(MESSAGES_ROUTE, json=message))["content"]
    assert theirs == said
    (choice,) = ok(other_team.post(f"/loops/samplers/{sampler}/sample", json=asked, headers=pinned))["choices"]
    assert choice["text"] == text
    assert http.delete(published).status_code == 204
    assert other_team.post(COMPLETIONS, json=asked | {"model": name}).status_code == 404
    assert other_team.post(MESSAGES_ROUTE, json=message).status_code == 404
    answer = other_team.post(f"/loops/samplers/{sampler}/sample", json=asked, headers=pinned)
    assert (answer.status_code, answer.headers["x-baseten-error-source"]) == (404, "06"), answer.text


def test_one_sampler_however_many_ask_first(new_gateway: Callable[[], Gateway]):
    """Made once under concurrent requests, kept by a restart, asleep when idle, made anew when it was deactivated."""
    own = new_gateway()
    http = own.http()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 1, "temperature": 0}

    async def at_once() -> list[Json]:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=own.url, headers=headers, timeout=60) as client:
            answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for _ in range(12)))
        return [ok(answer) for answer in answers]

    texts = {answer["choices"][0]["text"] for answer in asyncio.run(at_once())}
    assert len(texts) == 1
    (sampler,) = shared(http)
    assert sampler["base_model"] == MODEL

    own.kill()
    stores.execute(own.data_dir, "UPDATE samplers SET scale_down_delay_s = 1")
    own.start()
    until(lambda: shared(http)[0]["status"]["name"] == "SCALED_TO_ZERO", "the sampler sleeps")
    until(lambda: own.worker_pids() == [], "its worker has ended")
    assert ok(http.post(COMPLETIONS, json=body))["choices"][0]["text"] in texts
    assert [row["id"] for row in shared(http)] == [sampler["id"]]

    ok(http.post(f"/v1/loops/samplers/{sampler['id']}/deactivate"))
    assert ok(http.post(COMPLETIONS, json=body))["choices"][0]["text"] in texts
    (fresh,) = shared(http)
    assert fresh["id"] != sampler["id"]
