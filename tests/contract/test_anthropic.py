"""The official ``anthropic`` client against the whole server: messages, whole and streamed, and token counts."""

import asyncio
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from anthropic import Anthropic, AsyncAnthropic

from gateway import KEY, MODEL, Gateway, Json, Run, ok

USER = {"role": "user", "content": "say ä"}
ASKED: Json = {"model": MODEL, "max_tokens": 12, "messages": [USER]}
# The client has no parameter of that name any more; older ones send the same.
GREEDY: Json = ASKED | {"extra_body": {"temperature": 0}}
PROMPT_TEXT = "<|im_start|>user\nsay ä<|im_end|>\n<|im_start|>assistant\n"
# A token for each special one, and one for each byte.
NUM_PROMPT = PROMPT_TEXT.count("<|") + len(PROMPT_TEXT.replace("<|im_start|>", "").replace("<|im_end|>", "").encode())
WEATHER = {
    "name": "weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
MESSAGES = "/anthropic/api/v1/messages"
COUNT = "/anthropic/api/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[Anthropic]:
    with Anthropic(base_url=f"{gateway.url}/anthropic/api", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content)


def num_prompt(message: anthropic.types.Message) -> int:
    """Tokens of the prompt: those read from the cache are counted apart."""
    usage = message.usage
    assert usage.cache_read_input_tokens is not None
    return usage.input_tokens + usage.cache_read_input_tokens


def openai_text(http: httpx.Client, **fields: object) -> Json:
    return ok(http.post("/oai/api/v1/chat/completions", json=ASKED | {"temperature": 0} | fields))


def test_a_message_is_what_the_other_dialect_samples(client: Anthropic, http: httpx.Client):
    message = client.messages.create(**GREEDY, system="be brief", metadata={"user_id": "me"})
    expected = openai_text(http, messages=[{"role": "system", "content": "be brief"}, USER])
    assert text_of(message) == expected["choices"][0]["message"]["content"]
    assert (message.type, message.role, message.model) == ("message", "assistant", MODEL)
    assert message.id.startswith("msg_")
    assert num_prompt(message) == expected["usage"]["prompt_tokens"]
    assert message.usage.output_tokens == expected["usage"]["completion_tokens"]
    assert message.stop_reason == {"length": "max_tokens", "stop": "end_turn"}[expected["choices"][0]["finish_reason"]]


def test_the_methods_for_betas_ask_the_same_routes(client: Anthropic):
    """They send ``?beta=true``."""
    assert client.beta.messages.create(**GREEDY).content[0].type == "text"
    counted = client.beta.messages.count_tokens(model=MODEL, messages=[USER])
    assert counted.input_tokens == client.messages.count_tokens(model=MODEL, messages=[USER]).input_tokens


def test_a_prompt_that_was_seen_is_counted_as_read_from_the_cache(client: Anthropic, http: httpx.Client):
    """In this dialect, in OpenAI's, and in the two ways of a stream's end."""
    seen = {"role": "user", "content": "the same long beginning of two conversations, word by word"}
    first, again = (client.messages.create(**GREEDY | {"messages": [seen]}) for _ in range(2))
    cached = again.usage.cache_read_input_tokens
    assert cached is not None
    assert 0 < cached < num_prompt(again) == num_prompt(first)
    with client.messages.stream(**GREEDY | {"messages": [seen]}) as stream:
        usage = stream.get_final_message().usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (again.usage.input_tokens, cached)
    asked = {"messages": [seen], "temperature": 0}
    theirs = ok(http.post("/oai/api/v1/chat/completions", json=ASKED | asked))["usage"]
    assert theirs["prompt_tokens_details"] == {"cached_tokens": cached}
    assert theirs["prompt_tokens"] == num_prompt(again)


def test_a_stream_adds_up_to_the_whole(client: Anthropic):
    whole = client.messages.create(**GREEDY)
    kinds: list[str] = []
    with client.messages.stream(**GREEDY) as stream:
        kinds += [event.type for event in stream]
        final = stream.get_final_message()
    assert text_of(final) == text_of(whole)
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    raw = [event.type for event in client.messages.create(**GREEDY, stream=True)]
    assert raw[:1] + raw[-3:] == ["message_start", "content_block_stop", "message_delta", "message_stop"]


async def test_the_asynchronous_client(gateway: Gateway, client: Anthropic):
    expected = client.messages.create(**GREEDY).content
    async with AsyncAnthropic(base_url=f"{gateway.url}/anthropic/api", api_key=f"tml-{KEY}", max_retries=0) as own:
        answers = await asyncio.gather(*(own.messages.create(**GREEDY) for _ in range(4)))
        async with own.messages.stream(**GREEDY) as stream:
            streamed = "".join([text async for text in stream.text_stream])
    assert all(answer.content == expected for answer in answers)
    assert streamed == text_of(answers[0])


def test_a_checkpoint(client: Anthropic, http: httpx.Client):
    run = Run.create(http, seed=3).attached()
    run.train(1, 2, 3)
    run.save("served", "save_weights_for_sampler")
    name = f"tinker://{run.id}/sampler_weights/served"
    message = client.messages.create(**GREEDY | {"model": name})
    assert message.model == name
    assert text_of(message) == openai_text(http, model=name)["choices"][0]["message"]["content"]


def test_stop_sequences(client: Anthropic):
    text = text_of(client.messages.create(**GREEDY))
    stop = text[3:5]
    at = text.index(stop)
    stopped = client.messages.create(**GREEDY, stop_sequences=["never", stop])
    assert (stopped.stop_reason, stopped.stop_sequence, text_of(stopped)) == ("stop_sequence", stop, text[:at])
    with client.messages.stream(**GREEDY, stop_sequences=["never", stop]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence, text_of(final)) == ("stop_sequence", stop, text[:at])


def test_an_answer_goes_on_from_its_beginning(client: Anthropic, http: httpx.Client):
    begun = {"role": "assistant", "content": "The"}
    message = client.messages.create(**GREEDY | {"messages": [USER, begun]})
    expected = openai_text(http, messages=[USER, begun], continue_final_message=True)
    assert text_of(message) == expected["choices"][0]["message"]["content"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_tool(client: Anthropic, choice: Json):
    asked = GREEDY | {"max_tokens": 120, "tools": [WEATHER], "tool_choice": choice}
    whole = client.messages.create(**asked)
    (call,) = whole.content
    assert (whole.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "weather")
    assert call.input["city"] in ("Oslo", "Rome")
    with client.messages.stream(**asked) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.name, streamed.input) == (call.name, call.input)
    answered = [
        USER,
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
    ]
    assert client.messages.create(**GREEDY | {"messages": answered, "tools": [WEATHER]}).usage.output_tokens > 0


def test_counted_tokens_are_those_of_the_template(client: Anthropic):
    counted = client.messages.count_tokens(model=MODEL, messages=[USER]).input_tokens
    assert counted == NUM_PROMPT
    more = client.messages.count_tokens(model=MODEL, messages=[USER], system="be brief", tools=[WEATHER])
    assert more.input_tokens > counted
    answered = client.messages.create(**GREEDY, system="be brief", tools=[WEATHER])
    assert num_prompt(answered) == more.input_tokens
    none = client.messages.count_tokens(model=MODEL, messages=[USER], tools=[WEATHER], tool_choice={"type": "none"})
    assert none.input_tokens == counted


def test_more_tokens_than_there_is_room_for(client: Anthropic):
    message = client.messages.create(**GREEDY | {"max_tokens": 100_000})
    if message.stop_reason == "end_turn":
        pytest.fail("the tiny model ends this by itself: choose another prompt")
    assert message.stop_reason == "model_context_window_exceeded"
    assert num_prompt(message) + message.usage.output_tokens == 256


ERRORS: dict[str, tuple[Json, type[anthropic.APIStatusError], str, str]] = {
    "unknown model": ({"model": "claude"}, anthropic.NotFoundError, "not_found_error", "claude"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        r"messages\[0\]\.content\[0\]",
    ),
    "thinking": (
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        anthropic.BadRequestError,
        "invalid_request_error",
        "thinking",
    ),
    "too long": (
        {"messages": [{"role": "user", "content": "a" * 300}]},
        anthropic.BadRequestError,
        "invalid_request_error",
        "messages",
    ),
    "broken schema": (
        {"tools": [WEATHER | {"input_schema": {"type": "nonsense"}}], "tool_choice": {"type": "any"}},
        anthropic.BadRequestError,
        "invalid_request_error",
        "tools",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("stream", [False, True])
def test_errors(client: Anthropic, name: str, stream: bool):
    fields, kind, type_, match = ERRORS[name]
    with pytest.raises(kind, match=match) as caught:
        client.messages.create(**GREEDY | fields, stream=stream)
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == type_


def test_the_plain_routes(gateway: Gateway, http: httpx.Client):
    """What a client without a library sees: any version or none, and errors of one shape."""
    for headers in ({}, {"anthropic-version": "2023-06-01"}, {"anthropic-version": "of tomorrow"}):
        assert ok(http.post(MESSAGES, json=ASKED, headers=headers))["type"] == "message"
    assert ok(http.post(COUNT, json={"model": MODEL, "messages": [USER]})) == {"input_tokens": NUM_PROMPT}
    refusals = [
        (http.post(MESSAGES, json={k: v for k, v in ASKED.items() if k != "max_tokens"}), 400, "max_tokens"),
        (http.post(MESSAGES, json=ASKED | {"surprise": 1}), 400, "surprise"),
        (http.post(COUNT, json=ASKED), 400, "max_tokens"),
        (http.post(MESSAGES, content=b"{"), 400, "body"),
        (http.post(MESSAGES, json=ASKED, headers={"Idempotency-Key": "a"}), 400, "Idempotency-Key"),
        (http.get(MESSAGES), 405, "GET"),
        (http.get("/anthropic/api/v1/files"), 404, "files"),
        (gateway.http(None).post(MESSAGES, json=ASKED), 401, "API key"),
    ]
    for response, status, said in refusals:
        assert response.status_code == status, response.text
        body = response.json()
        assert body["type"] == "error"
        assert said in body["error"]["message"]
