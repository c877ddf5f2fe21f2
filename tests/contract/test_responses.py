"""The official ``openai`` client against the Responses API: whole, streamed, parsed, with tools; nothing is kept."""

import json
from collections.abc import Iterator
from typing import Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from gateway import KEY, MODEL, Gateway, Json, ok

ASKED: Json = {"model": MODEL, "input": "say ä", "max_output_tokens": 12, "temperature": 0}
WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CHAT = "/oai/api/v1/chat/completions"
RESPONSES = "/oai/api/v1/responses"


class Place(BaseModel):
    city: Literal["Oslo", "Rome"]


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def chat_of(http: httpx.Client, *messages: Json, **fields: object) -> Json:
    return ok(http.post(CHAT, json={"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0} | fields))


def test_a_response_is_what_the_chat_route_samples(client: OpenAI, http: httpx.Client):
    response = client.responses.create(**ASKED, instructions="be brief", metadata={"a": "b"}, user="me", store=False)
    expected = chat_of(http, {"role": "system", "content": "be brief"}, {"role": "user", "content": "say ä"})
    assert response.output_text == expected["choices"][0]["message"]["content"]
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (
        expected["usage"]["prompt_tokens"],
        expected["usage"]["completion_tokens"],
        expected["usage"]["total_tokens"],
    )
    ended = expected["choices"][0]["finish_reason"]
    assert response.status == {"length": "incomplete", "stop": "completed"}[ended]
    assert (response.incomplete_details is None) is (ended == "stop")
    assert (response.object, response.model, response.metadata) == ("response", MODEL, {"a": "b"})
    assert response.model_dump()["store"] is False
    assert response.id.startswith("resp_")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_a_stream_adds_up_to_the_whole(client: OpenAI):
    whole = client.responses.create(**ASKED)
    events = list(client.responses.create(**ASKED, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    with client.responses.stream(**ASKED) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text


def test_a_conversation_comes_whole(client: OpenAI, http: httpx.Client):
    """Items that came back from here and what the caller adds to them."""
    before = client.responses.create(**ASKED)
    given: list[Json] = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        *[item.model_dump() for item in before.output],
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "weather", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "cold"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "warm"}]},
        {"type": "message", "role": "developer", "content": "go on"},
    ]
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"id": "c2", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
    ]
    expected = chat_of(
        http,
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": before.output_text, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "cold"},
        {"role": "tool", "tool_call_id": "c2", "content": "warm"},
        {"role": "developer", "content": "go on"},
    )
    response = client.responses.create(**ASKED | {"input": given})
    assert response.usage.input_tokens == expected["usage"]["prompt_tokens"]
    assert response.output_text == expected["choices"][0]["message"]["content"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_forced_call(client: OpenAI, choice: object):
    asked = ASKED | {"tools": [WEATHER], "tool_choice": choice, "max_output_tokens": 100}
    (call,) = client.responses.create(**asked).output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    events = list(client.responses.create(**asked, stream=True))
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[-2].item.model_copy(update={"id": "", "call_id": ""}) == (
        call.model_copy(update={"id": "", "call_id": ""})
    )
    with client.responses.stream(**asked) as stream:
        assert stream.get_final_response().output[0].arguments == call.arguments


def test_strict_tools_and_a_format(client: OpenAI):
    answer = client.responses.create(**ASKED, tools=[WEATHER], parallel_tool_calls=False)
    assert answer.parallel_tool_calls is False
    parsed = client.responses.parse(**ASKED | {"max_output_tokens": 60}, text_format=Place)
    assert parsed.output_parsed in (Place(city="Oslo"), Place(city="Rome"))
    for seen in ("text", "json_object"):
        asked = ASKED | {"text": {"format": {"type": seen}, "verbosity": "medium"}}
        assert client.responses.create(**asked).text.format.type == seen


async def test_the_asynchronous_client(gateway: Gateway, client: OpenAI):
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as own:
        assert (await own.responses.create(**ASKED)).output_text == client.responses.create(**ASKED).output_text


def test_a_sampler_of_its_own(gateway: Gateway, client: OpenAI, http: httpx.Client):
    row = ok(http.get("/v1/loops/samplers", params={"scope": "org"}))["samplers"][0]
    with OpenAI(base_url=f"{row['base_url']}/v1", api_key=KEY, max_retries=0, timeout=60) as own:
        assert own.responses.create(**ASKED).output_text == client.responses.create(**ASKED).output_text


ITEM = {"type": "function_call_output", "call_id": "c", "output": "x"}
REFUSALS: dict[str, tuple[Json, str]] = {
    "unknown field": ({"surprise": 1}, "surprise"),
    "kept": ({"store": True}, "store"),
    "a response before": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "in the background": ({"background": True}, "background"),
    "no input": ({"input": []}, "input"),
    "item of another kind": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "item with an unknown key": ({"input": [ITEM | {"surprise": 1}]}, "input[0].surprise"),
    "image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    "part with an unknown key": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]},
        "input[0].content[0].x",
    ),
    "role": ({"input": [{"role": "bot", "content": "a"}]}, "input[0].role"),
    "arguments": (
        {
            "instructions": "i",
            "input": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "["},
            ],
        },
        "input[2].arguments",
    ),
    "a server's tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "tool name": ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name"),
    "tool schema": ({"tools": [WEATHER | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
    "unknown tool": ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
    "temperature": ({"temperature": -1}, "temperature"),
    "max_output_tokens": ({"max_output_tokens": 100000}, "max_output_tokens"),
    "effort": ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    "summary": ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    "format": ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
    "format of no schema": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}}}},
        "text.format",
    ),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "logprobs": ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "too long": ({"input": "a" * 300}, "input"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(http: httpx.Client, name: str, stream: bool):
    fields, param = REFUSALS[name]
    response = http.post("/v1/responses", json=ASKED | {"stream": stream} | fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param, response.text


def test_under_the_other_base_url(client: OpenAI, http: httpx.Client):
    raw = ok(http.post(RESPONSES, json=ASKED))
    assert raw["output"][0]["content"][0]["text"] == client.responses.create(**ASKED).output_text
