"""The official ``openai`` client against a sampler: chat and completions, whole and streamed."""

import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from gateway import KEY, MAX_POSITIONS, MODEL, Gateway, Json, Run, ok, words

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say ä"}]
PROMPT_TEXT = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsay ä<|im_end|>\n<|im_start|>assistant\n"
# Bytes follow three special tokens, in the order of the byte-level alphabet.
SEEDED = {"seed": 7, "max_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    """A run with two published versions."""
    run = Run.create(http, seed=1).attached()
    for seed in (1, 2):
        run.train(seed)
        run.save(f"v{seed}", "save_weights_for_sampler")
    return run


@pytest.fixture(scope="module")
def base_url(run: Run) -> str:
    return run.resource["sampler"]["base_url"]


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{base_url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


def adapter(run: Run, version: int) -> str:
    return f"bt://loops:{run.id}/sampler_weights/v{version}"


# -- models ---------------------------------------------------------------------------------------------


def test_models(client: OpenAI, run: Run):
    assert [model.id for model in client.models.list()] == [MODEL, adapter(run, 2)]
    assert client.models.retrieve(MODEL).id == MODEL
    assert client.models.retrieve(adapter(run, 1)).id == adapter(run, 1)
    with pytest.raises(openai.NotFoundError, match="nobody/nothing"):
        client.models.retrieve("nobody/nothing")


def test_the_plain_routes(http: httpx.Client, run: Run):
    """What a client without a library sees; Loops clients find the adapter by its parent."""
    id = run.resource["sampler"]["id"]
    listed = ok(http.get(f"/loops/samplers/{id}/v1/models"))["data"]
    assert [(model["id"], model["parent"]) for model in listed] == [(MODEL, None), (adapter(run, 2), MODEL)]
    quoted = adapter(run, 1).replace("/", "%2F")
    assert ok(http.get(f"/loops/samplers/{id}/v1/models/{quoted}"))["parent"] == MODEL
    body = {"model": MODEL, "max_tokens": 1, "seed": 1}
    chat = ok(http.post(f"/loops/samplers/{id}/v1/chat/completions", json=body | {"messages": MESSAGES}))
    assert (chat["object"], chat["usage"]["completion_tokens"]) == ("chat.completion", 1)
    text = ok(http.post(f"/loops/samplers/{id}/v1/completions", json=body | {"prompt": PROMPT_TEXT}))
    assert text["choices"][0]["text"] == chat["choices"][0]["message"]["content"], "the template, spelled out"


def test_the_model_pins_the_weights(client: OpenAI, run: Run, http: httpx.Client, base_url: str):
    """Each version's logprobs are those that /sample gives with the checkpoint pinned."""
    for version in (1, 2):
        answer = client.completions.with_raw_response.create(
            model=adapter(run, version), prompt=words(3), logprobs=0, **SEEDED
        )
        assert answer.headers["x-trainers-policy-version"] == str(version)
        headers = {"X-Checkpoint-Path": adapter(run, version)}
        sampled = ok(
            http.post(f"{base_url}/sample", json={"prompt": words(3), "logprobs": 0} | SEEDED, headers=headers)
        )
        (choice,) = answer.parse().choices
        assert choice.logprobs.token_logprobs == sampled["choices"][0]["logprobs"]["token_logprobs"]
        assert choice.text == sampled["choices"][0]["text"]
    conflicting = {"X-Checkpoint-Path": adapter(run, 1)}
    with pytest.raises(openai.BadRequestError, match="X-Checkpoint-Path"):
        client.completions.create(model=adapter(run, 2), prompt="a", extra_headers=conflicting)


def test_the_policy_floor(client: OpenAI):
    floor = {"X-Min-Policy-Version": "2"}
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1, extra_headers=floor).choices
    with pytest.raises(openai.BadRequestError, match="X-Min-Policy-Version"):
        client.completions.create(model=MODEL, prompt="a", extra_headers={"X-Min-Policy-Version": "soon"})


def test_below_sync_too(base_url: str):
    with OpenAI(base_url=f"{base_url}/sync/v1", api_key=KEY, max_retries=0) as client:
        assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices


# -- chat -----------------------------------------------------------------------------------------------


def test_chat(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        n=2,
        logprobs=True,
        top_logprobs=3,
        extra_body={"return_token_ids": True},
        **SEEDED,
    )
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content, "samples of one seed differ"
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids) == _num_template_tokens()
    assert answer.usage.completion_tokens == sum(len(choice.token_ids) for choice in answer.choices)
    for choice in answer.choices:
        content = choice.logprobs.content
        assert len(content) == len(choice.token_ids)
        # Special tokens stand for their names, and give no text.
        plain = [bytes(t.bytes) for t in content if not t.token.startswith("<|")]
        assert b"".join(plain).decode(errors="replace") == choice.message.content
        for token in content:
            assert [t.logprob for t in token.top_logprobs] == sorted(
                (t.logprob for t in token.top_logprobs), reverse=True
            )
            assert len(token.top_logprobs) == 3
            assert token.logprob <= token.top_logprobs[0].logprob


def _num_template_tokens() -> int:
    special = PROMPT_TEXT.count("<|")
    text = PROMPT_TEXT.replace("<|im_start|>", "").replace("<|im_end|>", "")
    return special + len(text.encode())


def test_chat_is_the_template_sampled(client: OpenAI, http: httpx.Client, base_url: str):
    """The same text and logprobs as /sample gives after the rendered prompt."""
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, extra_body={"return_token_ids": True, "top_k": 20}, **SEEDED
    )
    body = {"prompt": answer.prompt_token_ids, "logprobs": 0, "top_k": 20} | SEEDED
    sampled = ok(http.post(f"{base_url}/sample", json=body))["choices"][0]
    (choice,) = answer.choices
    assert choice.token_ids == sampled["token_ids"]
    assert [t.logprob for t in choice.logprobs.content] == sampled["logprobs"]["token_logprobs"]
    assert choice.message.content == sampled["text"]


def test_chat_streams_what_it_answers_whole(client: OpenAI):
    asked: Json = {"model": MODEL, "messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 1} | SEEDED
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert mine[-1].finish_reason is not None
        logprobs = [t.logprob for c in mine if c.logprobs for t in c.logprobs.content]
        assert logprobs == pytest.approx([t.logprob for t in choice.logprobs.content], abs=1e-5)
    assert len(chunks) > 4, "it came in pieces"


async def test_async_client(base_url: str):
    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=KEY, max_retries=0) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES, **SEEDED)
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True, **SEEDED)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == whole.choices[0].message.content
        completion = await client.completions.create(model=MODEL, prompt="a", **SEEDED)
        pieces = await client.completions.create(model=MODEL, prompt="a", stream=True, **SEEDED)
        assert "".join([chunk.choices[0].text async for chunk in pieces]) == completion.choices[0].text


def test_seeds(client: OpenAI):
    def text(**fields: object) -> str | None:
        asked: Json = {"model": MODEL, "messages": MESSAGES} | SEEDED | fields
        return client.chat.completions.create(**asked).choices[0].message.content

    assert text() == text()
    assert text() != text(seed=8)
    assert text(temperature=0, seed=1) == text(temperature=0, seed=2)


def test_parts_of_text_are_joined(client: OpenAI):
    def prompt(content: object) -> list[int]:
        messages = [{"role": "user", "content": content}]
        body = {"return_token_ids": True}
        return client.chat.completions.create(
            model=MODEL, messages=messages, max_completion_tokens=1, extra_body=body
        ).prompt_token_ids

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert prompt(parts) == prompt("one\ntwo")


def test_stop(client: OpenAI):
    free = client.completions.create(model=MODEL, prompt="a", logprobs=0, **(SEEDED | {"max_tokens": 40}))
    text = free.choices[0].text
    stop = text[5:7]
    stopped = client.completions.create(model=MODEL, prompt="a", stop=[stop], **(SEEDED | {"max_tokens": 40})).choices[
        0
    ]
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


def test_penalties(client: OpenAI, http: httpx.Client, base_url: str):
    """Whole, streamed and by the other route; what they do to numbers is tested where they are computed."""
    forced = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=5, logit_bias={"35": 100})
    assert forced.choices[0].message.content == "AAAAA"
    once: Json = {"logit_bias": {str(token): 50 for token in range(35, 45)}, "presence_penalty": 2, "seed": 3}
    once |= {"frequency_penalty": 2, "max_tokens": 30, "temperature": 0.1}
    text = client.completions.create(model=MODEL, prompt="a", **once).choices[0].text
    assert set(text) == set("ABCDEFGHIJ")
    without = once | {"presence_penalty": 0, "frequency_penalty": 0}
    assert len(set(client.completions.create(model=MODEL, prompt="a", **without).choices[0].text)) < 10
    chunks = client.completions.create(model=MODEL, prompt="a", stream=True, **once)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    (sampled,) = ok(http.post(f"{base_url}/sample", json={"prompt": [67], **once}))["choices"]
    assert sampled["text"] == text
    extra = {"repetition_penalty": 1.3, "min_p": 1.0, "return_token_ids": True}
    answers = [client.completions.create(model=MODEL, prompt="a", seed=n, extra_body=extra) for n in range(3)]
    assert len({answer.choices[0].text for answer in answers}) == 1


def test_response_format(client: OpenAI):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    named = {"name": "place", "schema": schema, "strict": True}
    asked: Json = {"model": MODEL, "messages": MESSAGES, "max_tokens": 60, "seed": 1}
    answer = client.chat.completions.create(**asked, response_format={"type": "json_schema", "json_schema": named})
    assert json.loads(answer.choices[0].message.content)["city"] in ("Oslo", "Rome")
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    assert client.chat.completions.create(**asked, extra_body=extra).choices[0].message.content in ("yes", "no")
    extra = {"guided_regex": "[0-9]{3}"}
    assert client.chat.completions.create(**asked, extra_body=extra).choices[0].message.content.isdigit()
    broken = named | {"schema": {"type": "nonsense"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, response_format={"type": "json_schema", "json_schema": broken})
    assert caught.value.param == "response_format"


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


def call_of(client: OpenAI, **fields: object) -> Json:
    asked: Json = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "?"}],
        "seed": 1,
        "max_tokens": 120,
    } | fields
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.message.tool_calls, whole
    (call,) = whole.message.tool_calls
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    chunks = [c for chunk in client.chat.completions.create(**asked, stream=True) for c in chunk.choices]
    (streamed,) = [t for c in chunks for t in c.delta.tool_calls or []]
    assert (streamed.index, streamed.function) == (0, streamed.function.model_copy(update=call.function.model_dump()))
    assert chunks[-1].finish_reason == "tool_calls"
    return {"name": call.function.name} | json.loads(call.function.arguments)


def test_forced_tools(client: OpenAI):
    named = {"type": "function", "function": {"name": "weather"}}
    called = call_of(client, tools=[WEATHER], tool_choice=named)
    assert called["name"] == "weather"
    assert called["city"] in ("Oslo", "Rome")
    assert call_of(client, tools=[WEATHER], tool_choice="required")["name"] == "weather"


def test_strict_tools_that_the_model_may_call(client: OpenAI):
    """As the Agents SDK sends them; beside a format, the answer is a call or of that format."""
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}
    asked: Json = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "tools": [strict, CLOCK]}
    answer = client.chat.completions.create(**asked, seed=1, max_tokens=30)
    assert answer.choices[0].message.content
    schema = WEATHER["function"]["parameters"]
    formatted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    asked |= {"n": 20, "max_tokens": 110, "seed": 2, "response_format": formatted}
    whole = client.chat.completions.create(**asked).choices
    called = [choice for choice in whole if choice.message.tool_calls]
    answered = [choice for choice in whole if choice.finish_reason == "stop"]
    assert len(called) > 0 < len(answered)
    for choice in answered:
        assert json.loads(choice.message.content)["city"] in ("Oslo", "Rome")
    for call in (call for choice in called for call in choice.message.tool_calls):
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "clock" or arguments["city"] in ("Oslo", "Rome")
    chunks = [c for chunk in client.chat.completions.create(**asked, stream=True) for c in chunk.choices]
    streamed = [t.function for c in chunks for t in c.delta.tool_calls or []]
    assert sorted((f.name, f.arguments) for f in streamed) == sorted(
        (call.function.name, call.function.arguments) for choice in called for call in choice.message.tool_calls
    )


def test_tools_are_in_the_prompt(client: OpenAI):
    def num_prompt(**fields: object) -> int:
        asked: Json = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1} | fields
        return client.chat.completions.create(**asked).usage.prompt_tokens

    assert num_prompt(tools=[CLOCK]) > num_prompt() == num_prompt(tools=[CLOCK], tool_choice="none")


# -- completions ----------------------------------------------------------------------------------------


def test_prompts_in_all_forms(client: OpenAI):
    def texts(prompt: object) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=prompt, **SEEDED)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = client.completions.create(model=MODEL, prompt="ab", max_tokens=1, extra_body={"return_token_ids": True})
    ab = ids.choices[0].prompt_token_ids
    assert len(ab) == 2
    one = texts("ab")
    assert texts(ab) == texts(["ab"]) == texts([ab]) == one
    assert texts(["ab", "b"]) == one + texts("b")


def test_many_prompts_stream_side_by_side(client: OpenAI):
    asked: Json = {"model": MODEL, "prompt": ["a", "b", "c"], "n": 2} | SEEDED
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == 3


def test_echo_scores_the_prompt(client: OpenAI, http: httpx.Client, base_url: str):
    prompt = words(5)
    answer = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=0)
    (choice,) = answer.choices
    scored = choice.logprobs
    body = {"prompt": prompt, "prompt_logprobs": 2, "max_tokens": 1}
    expected = ok(http.post(f"{base_url}/sample", json=body))["choices"][0]["prompt_logprobs"]
    assert scored.token_logprobs[0] is None
    own = [position[str(token)]["logprob"] for token, position in zip(prompt[1:], expected[1:], strict=True)]
    assert scored.token_logprobs[1:] == pytest.approx(own, abs=1e-5)
    assert scored.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in scored.top_logprobs[1:])
    assert answer.usage.completion_tokens == 0
    assert (choice.finish_reason, len(scored.tokens)) == ("length", len(prompt))


def test_a_prompt_that_fills_the_model_is_scored_on_both_routes(client: OpenAI, http: httpx.Client, base_url: str):
    """As evaluation harnesses send them; one that is to be continued needs room as ever."""
    full = (words(40) * MAX_POSITIONS)[:MAX_POSITIONS]
    body = {"prompt": full, "prompt_logprobs": 0}
    for more in ({"max_tokens": 1}, {}):
        positions = ok(http.post(f"{base_url}/sample", json=body | more))["choices"][0]["prompt_logprobs"]
        assert len(positions) == MAX_POSITIONS
    own = [position[str(token)]["logprob"] for token, position in zip(full[1:], positions[1:], strict=True)]
    for max_tokens, logprobs in ((0, 1), (1, 1), (0, None)):
        asked = {"model": MODEL, "prompt": full, "echo": True, "max_tokens": max_tokens, "logprobs": logprobs}
        (choice,) = client.completions.create(**asked).choices
        if logprobs is not None:
            assert choice.logprobs.token_logprobs[1:MAX_POSITIONS] == pytest.approx(own, abs=1e-5)
    for refused in ({"max_tokens": 2}, {"prompt": [*full, 3]}):
        assert http.post(f"{base_url}/sample", json=body | refused).status_code == 422
    assert http.post(f"{base_url}/sample", json={"prompt": full, "max_tokens": 1}).status_code == 422
    with pytest.raises(openai.BadRequestError, match=f"at most {MAX_POSITIONS - 1} tokens"):
        client.completions.create(model=MODEL, prompt=full, max_tokens=1)


def test_echo_with_text(client: OpenAI):
    asked: Json = {"model": MODEL, "prompt": "tea, ", "logprobs": 1} | SEEDED
    plain = client.completions.create(**asked).choices[0]
    echoed = client.completions.create(**asked, echo=True).choices[0]
    assert echoed.text == "tea, " + plain.text
    assert echoed.logprobs.tokens == list("tea, ") + plain.logprobs.tokens
    assert echoed.logprobs.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert echoed.logprobs.token_logprobs[5:] == pytest.approx(plain.logprobs.token_logprobs, abs=1e-5)
    streamed = client.completions.create(**(asked | {"logprobs": None}), echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.text


# -- errors ---------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


def message(**fields: object) -> Json:
    return {"messages": [{"role": "user", "content": "a"} | fields]}


CHAT_REFUSALS: dict[str, tuple[Json, str]] = {
    "unknown field": ({"surprise": 1}, "surprise"),
    "no messages": ({"messages": []}, "messages"),
    "messages missing": ({"messages": ...}, "messages"),
    "unknown role": (message(role="king"), "messages[0].role"),
    "image": (message(content=[IMAGE]), "messages[0].content[0]"),
    "no content": (message(content=None), "messages[0].content"),
    "unknown of a message": (message(surprise=1), "messages[0].surprise"),
    "tool calls of a user": (
        message(tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        "messages[0].tool_calls",
    ),
    "broken arguments": (
        message(
            role="assistant", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]
        ),
        "messages[0].tool_calls[0].function.arguments",
    ),
    "answer to no call": (message(role="tool"), "messages[0].tool_call_id"),
    "n of none": ({"n": 0}, "n"),
    "n too many": ({"n": 257}, "n"),
    "temperature": ({"temperature": -1}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "top_k": ({"top_k": -2}, "top_k"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens too many": ({"max_tokens": 1000}, "max_tokens"),
    "two limits": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    "max_completion_tokens": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "prompt too long": (message(content="a" * 300), "messages"),
    "empty stop": ({"stop": [""]}, "stop"),
    "stop id": ({"stop_token_ids": [264]}, "stop_token_ids"),
    "frequency_penalty": ({"frequency_penalty": 2.5}, "frequency_penalty"),
    "presence_penalty": ({"presence_penalty": -2.5}, "presence_penalty"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty"),
    "min_p": ({"min_p": 1.1}, "min_p"),
    "logit_bias": ({"logit_bias": {"3": 101}}, "logit_bias.3"),
    "logit_bias of no token": ({"logit_bias": {"03": 1}}, "logit_bias.03"),
    "logit_bias out of the vocabulary": ({"logit_bias": {"264": 1}}, "logit_bias"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs"),
    "top_logprobs too many": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "stream_options alone": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "format": ({"response_format": {"type": "xml"}}, "response_format.type"),
    "format without schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "two structures": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
    "structured two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
    "structured none": ({"structured_outputs": {}}, "structured_outputs"),
    "structured unknown": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    "structured not served": (
        {"structured_outputs": {"whitespace_pattern": "a"}},
        "structured_outputs.whitespace_pattern",
    ),
    "broken regex": ({"guided_regex": "("}, "guided_regex"),
    "tool choice alone": ({"tool_choice": "required"}, "tool_choice"),
    "tool twice": ({"tools": [TOOL, TOOL]}, "tools"),
    "tool of another kind": ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0]"),
    "unknown tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    "strict tool": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "string"}}}]},
        "tools[0].function.parameters.type",
    ),
    "strict tool of no schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"allOf": [3]}}}]},
        "tools",
    ),
    "tool and structure": ({"tools": [TOOL], "guided_regex": "a"}, "tool_choice"),
    "store": ({"store": True}, "store"),
    "audio": ({"modalities": ["audio"]}, "modalities"),
    "functions": ({"functions": []}, "functions"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "reasoning_effort"),
    "template variable": ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
    "own variable": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    "both ends": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    "no model": ({"model": ...}, "model"),
}


@pytest.mark.parametrize(
    ("name", "stream"),
    [
        (name, stream)
        for name in CHAT_REFUSALS
        for stream in (False, True)
        if name != "stream_options alone" or not stream
    ],
)
def test_chat_refuses_by_name(http: httpx.Client, base_url: str, name: str, stream: bool):
    fields, param = CHAT_REFUSALS[name]
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2, "stream": stream} | fields
    sent = {k: v for k, v in body.items() if v is not ...}
    if "max_completion_tokens" in fields and "max_tokens" not in fields:
        del sent["max_tokens"]
    check_refused(http.post(f"{base_url}/v1/chat/completions", json=sent), 400, param)


def check_refused(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text[:500]
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert error["message"]
    assert error["type"] == "invalid_request_error"


COMPLETION_REFUSALS: dict[str, tuple[Json, str]] = {
    "unknown field": ({"surprise": 1}, "surprise"),
    "no prompt": ({"prompt": ...}, "prompt"),
    "prompt null": ({"prompt": None}, "prompt"),
    "prompt of nothing": ({"prompt": []}, "prompt"),
    "empty text": ({"prompt": ""}, "prompt"),
    "second empty": ({"prompt": ["a", ""]}, "prompt[1]"),
    "mixed": ({"prompt": ["a", 3]}, "prompt"),
    "token out of vocabulary": ({"prompt": [264]}, "prompt"),
    "too long": ({"prompt": [3] * 256}, "prompt"),
    "too many": ({"prompt": ["a"] * 100, "n": 11}, "prompt"),
    "suffix": ({"suffix": "b"}, "suffix"),
    "best_of": ({"best_of": 2}, "best_of"),
    "logprobs": ({"logprobs": 21}, "logprobs"),
    "max_tokens": ({"max_tokens": 0}, "max_tokens"),
    "chat only": ({"messages": []}, "messages"),
}


@pytest.mark.parametrize("name", COMPLETION_REFUSALS)
def test_completions_refuse_by_name(http: httpx.Client, base_url: str, name: str):
    fields, param = COMPLETION_REFUSALS[name]
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2} | fields
    sent = {k: v for k, v in body.items() if v is not ...}
    check_refused(http.post(f"{base_url}/v1/completions", json=sent), 400, param)


@pytest.mark.parametrize("depth", [700, 900, 960, 980, 5000])
@pytest.mark.parametrize("field", ["guided_json", "chat_template_kwargs", "surprise"])
def test_deep_json_is_refused(http: httpx.Client, base_url: str, field: str, depth: int):
    deep = '{"a":' * depth + "1" + "}" * depth
    body = (
        f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "a"}}], "max_tokens": 1, "{field}": {deep}}}'
    )
    response = http.post(f"{base_url}/v1/chat/completions", content=body)
    assert response.status_code in (200, 400), response.text[:500]


def test_other_errors_have_the_same_shape(gateway: Gateway, http: httpx.Client, base_url: str, client: OpenAI):
    chat = f"{base_url}/v1/chat/completions"
    body = {"model": "gpt-4", "messages": MESSAGES}
    check_refused(http.post(chat, json=body), 404, "model")
    check_refused(http.post(chat, json=body | {"model": "bt://loops:aaaaaaa/sampler_weights/a"}), 404, "model")
    check_refused(http.post(f"{gateway.url}/loops/samplers/aaaaaaa/v1/completions", json={}), 404, "sampler")
    check_refused(http.post(chat, content=b"{"), 400, "body")
    check_refused(http.get(chat), 405, None)
    check_refused(gateway.http(None).post(chat, json=body), 401, None)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.code == "model_not_found"


def test_labels_and_neutral_values_are_taken(client: OpenAI):
    """What SDKs and frameworks send along without asking for anything."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "assistant", "content": "a", "refusal": None, "audio": None}, *MESSAGES],
        max_tokens=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        service_tier="auto",
        modalities=["text"],
    )
    assert answer.usage.completion_tokens == 1


# -- who goes away --------------------------------------------------------------------------------------


def num_sampled(gateway: Gateway) -> float:
    """Sampling requests that were answered."""
    lines = gateway.http().get("/metrics").raise_for_status().text.splitlines()
    return float(next(line for line in lines if line.startswith("selfloop_samples_total")).split()[-1])


@pytest.mark.parametrize("how", ["chat", "chat streamed", "completion", "completion streamed", "sample"])
def test_a_client_that_goes_away_ends_its_sampling(gateway: Gateway, http: httpx.Client, base_url: str, how: str):
    """Of two equal requests the first is left alone; were it still sampled, it would be done before the second."""
    route = {"chat": "v1/chat/completions", "completion": "v1/completions", "sample": "sample"}[how.split()[0]]
    body: Json = {"n": 256, "max_tokens": 100, "seed": 1}
    body |= {"messages": MESSAGES} if how.startswith("chat") else {"prompt": [3]}
    body |= {} if how == "sample" else {"model": MODEL}
    url = f"{base_url}/{route}"
    before = num_sampled(gateway)
    if how.endswith("streamed"):
        with http.stream("POST", url, json=body | {"stream": True}) as response:
            assert response.status_code == 200
            next(response.iter_bytes())
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post(url, json=body, timeout=0.1)
    assert len(ok(http.post(url, json=body))["choices"]) == 256
    assert num_sampled(gateway) == before + 1
