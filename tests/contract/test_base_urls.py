"""The server's own address as the base URL of others' clients, beside the management API below the same ``/v1``."""

from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from openai import OpenAI

from gateway import KEY, MODEL, Gateway, Json, ok

MESSAGES = [{"role": "user", "content": "say ä"}]


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def claude(gateway: Gateway) -> Iterator[Anthropic]:
    with Anthropic(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def test_openai(client: OpenAI, http: httpx.Client):
    asked: Json = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    answer = client.chat.completions.create(**asked)
    expected = ok(http.post("/oai/api/v1/chat/completions", json=asked))
    assert answer.choices[0].message.content == expected["choices"][0]["message"]["content"]
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == answer.choices[0].message.content
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=2).usage.completion_tokens == 2
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nobody/nothing")
    assert missing.value.param == "model"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, extra_body={"surprise": 1})
    assert refused.value.param == "surprise"


def test_anthropic(claude: Anthropic):
    message = claude.messages.create(model=MODEL, max_tokens=4, messages=MESSAGES)
    assert message.usage.output_tokens > 0
    assert claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 4
    assert claude.beta.messages.create(model=MODEL, max_tokens=1, messages=MESSAGES, betas=["any"]).role == "assistant"
    found = list(claude.models.list(limit=1))
    assert MODEL in [model.id for model in found]
    assert len({model.id for model in found}) == len(found)
    assert claude.models.retrieve(MODEL).display_name == MODEL
    with pytest.raises(anthropic.NotFoundError):
        claude.models.retrieve("nobody/nothing")
    with pytest.raises(anthropic.BadRequestError, match="after_id"):
        claude.models.list(after_id="nobody/nothing")


def test_pages_of_models(http: httpx.Client):
    route = "/anthropic/api/v1/models"
    every = [model["id"] for model in ok(http.get(route, params={"limit": 1000}))["data"]]
    first = ok(http.get(route, params={"limit": 1}))
    assert (first["data"][0]["id"], first["first_id"], first["last_id"]) == (every[0],) * 3
    assert first["has_more"] is (len(every) > 1)
    after = ok(http.get(route, params={"after_id": every[0], "limit": 1000}))
    assert [model["id"] for model in after["data"]] == every[1:]
    before = ok(http.get(route, params={"before_id": every[-1], "limit": 1000}))
    assert ([model["id"] for model in before["data"]], before["has_more"]) == (every[:-1], False)
    assert http.get(route, params={"limit": 0}).status_code == 400
    assert ok(http.get(f"/anthropic/api/v1/models/{MODEL}"))["id"] == MODEL


@pytest.mark.parametrize("scheme", ["Bearer", "Api-Key"])
def test_the_management_api_has_its_models(gateway: Gateway, scheme: str):
    """Its own clients send either scheme, so that the key cannot distinguish the two lists."""
    headers = {"Authorization": f"{scheme} {KEY}"}
    assert "models" in ok(httpx.get(f"{gateway.url}/v1/models", headers=headers))
    missing = httpx.get(f"{gateway.url}/v1/models/aaaaaaa", headers=headers)
    assert (missing.status_code, missing.json()["code"]) == (404, "NOT_FOUND")
    chat = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1}
    assert ok(httpx.post(f"{gateway.url}/v1/chat/completions", json=chat, headers=headers, timeout=60))["choices"]


def test_a_read_only_key_lists_and_samples_nothing(gateway: Gateway, http: httpx.Client):
    key = ok(http.post("/v1/api_keys", json={"name": "reader", "role": "read-only"}))["api_key"]
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0) as reader:
        assert [model.id for model in reader.models.list()]
        with pytest.raises(openai.PermissionDeniedError):
            reader.chat.completions.create(model=MODEL, messages=MESSAGES)
