"""A conversation on its way to the template, and what a chat request asks of the sampler."""

import json
from pathlib import Path

import msgspec
import pytest

from selfloop.server.openai import wire
from selfloop.server.openai.chat.request import ChatRequest, chat_request
from selfloop.server.openai.responses import wire as responses_wire
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import StructuredOutput

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
TEMPLATE = "{{ tools }} <tool_call> {{ thinking }}"


def request(template: str | None = TEMPLATE, **fields: object) -> ChatRequest:
    base = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    return chat_request(msgspec.convert(base | fields, wire.ChatBody), template)


def messages(*given: object) -> list[object]:
    return json.loads(request(messages=given).chat.messages)


def test_messages_as_templates_read_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    assert messages(
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ) == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "one\ntwo"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]


LABEL = {"cache_control": {"type": "ephemeral", "ttl": "5m"}}


def test_labels_change_nothing():
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    labelled = [
        {"role": "user", "name": "ann", "content": [{"type": "text", "text": "a"} | LABEL]},
        {"role": "assistant", "name": "bot", "content": "b"} | LABEL,
    ]
    assert messages(*labelled) == messages(*plain)
    assert messages({"role": "system", "name": "s", "content": "c"}) == [{"role": "system", "content": "c"}]
    tool = {"type": "function", "function": {"name": "f"}}
    assert request(tools=[tool | LABEL, {"type": "function", "function": {"name": "g"} | LABEL}]).chat == (
        request(tools=[tool, {"type": "function", "function": {"name": "g"}}]).chat
    )


@pytest.mark.parametrize(
    ("part", "field", "words"),
    [
        ({"type": "text", "text": "a", "surprise": 1}, "messages[0].content[0].surprise", "unknown"),
        ({"type": "text", "text": 3}, "messages[0].content[0].text", "str"),
        ({"type": "text"}, "messages[0].content[0].text", "missing"),
        ({"type": "text", "text": "a", "cache_control": 3}, "messages[0].content[0].cache_control", "object"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "messages[0].content[0]", "text only"),
    ],
)
def test_a_part_is_refused_by_the_key_that_is_wrong(part: dict[str, object], field: str, words: str):
    with pytest.raises(BadRequest, match=words) as caught:
        messages({"role": "user", "content": [part]})
    assert caught.value.field == field


def test_whose_turn_it_is():
    assert request().chat.add_generation_prompt
    assert not request(add_generation_prompt=False).chat.add_generation_prompt
    goes_on = request(continue_final_message=True).chat
    assert (goes_on.continue_final_message, goes_on.add_generation_prompt) == (True, False)


def test_variables_of_the_template():
    assert json.loads(request(chat_template_kwargs={"thinking": False}).chat.options or b"") == {"thinking": False}
    assert request().chat.options is None
    with pytest.raises(BadRequest, match=r"chat_template_kwargs\.other"):
        request(chat_template_kwargs={"other": 1})


def test_reasoning_effort_is_a_variable_of_the_template():
    template = "{{ reasoning_effort }}"
    assert json.loads(request(template, reasoning_effort="low").chat.options or b"") == {"reasoning_effort": "low"}
    for wrong in ("enormous", "LOW", ""):
        with pytest.raises(BadRequest, match="reasoning_effort: one of none, minimal, low, medium, high, xhigh"):
            request(template, reasoning_effort=wrong)
    for without in (TEMPLATE, None, "{{ no_reasoning_effort_here }}"):
        with pytest.raises(BadRequest, match="reasoning_effort: null"):
            request(without, reasoning_effort="low")
    with pytest.raises(BadRequest, match="reasoning_effort: null when"):
        request(template, reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})


def test_limits_and_logprobs():
    assert (request().max_tokens, request().top_logprobs) == (None, None)
    assert request(max_tokens=3).max_tokens == request(max_completion_tokens=3).max_tokens == 3
    assert request(logprobs=True).top_logprobs == 0
    assert request(logprobs=True, top_logprobs=20).top_logprobs == 20
    assert request(logprobs=False, top_logprobs=0).top_logprobs is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput("json_schema", '{"type":"object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
            StructuredOutput("json_schema", '{"type":"null"}'),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            StructuredOutput("json_schema", "{}"),
        ),
        ({"guided_json": {"type": "null"}}, StructuredOutput("json_schema", '{"type":"null"}')),
        ({"guided_json": '{"type": "null"}'}, StructuredOutput("json_schema", '{"type":"null"}')),
        ({"guided_regex": "a+"}, StructuredOutput("regex", "a+")),
        ({"guided_choice": ["a", "b"]}, StructuredOutput("choice", '["a","b"]')),
        ({"guided_grammar": "start: a"}, StructuredOutput("grammar", "start: a")),
        ({"structured_outputs": {"json": {"type": "null"}}}, StructuredOutput("json_schema", '{"type":"null"}')),
        ({"structured_outputs": {"json": {}}}, StructuredOutput("json_schema", "{}")),
        ({"structured_outputs": {"json_object": True}}, StructuredOutput("json_schema", '{"type":"object"}')),
        (
            {"structured_outputs": {"regex": "a", "json": None, "disable_fallback": False}},
            StructuredOutput("regex", "a"),
        ),
        ({"structured_outputs": {"choice": ["x"]}}, StructuredOutput("choice", '["x"]')),
        ({"structured_outputs": {"grammar": "g"}}, StructuredOutput("grammar", "g")),
    ],
)
def test_what_the_text_must_match(fields: dict[str, object], expected: StructuredOutput | None):
    assert request(**fields).asked.structured == expected


def test_one_call_at_most_ends_the_text():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert request(tools=tools, parallel_tool_calls=False, stop="x").asked.stop == ["x", "</tool_call>"]
    assert request(tools=tools, stop="x").asked.stop == ["x"]


def test_tools_reach_the_template_without_what_it_does_not_know():
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "strict": False}}]
    given = request(tools=tools).chat.tools
    assert given is not None
    assert json.loads(given) == [{"type": "function", "function": {"name": "f", "description": "d"}}]
    assert request(tools=tools, tool_choice="none").chat.tools is None


def _fields() -> list[str]:
    answers = (wire.Error, wire.ErrorAnswer)
    both = [*vars(wire).values(), *vars(responses_wire).values()]
    structs = [kind for kind in both if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    kinds = [kind for kind in structs if kind not in answers]
    return sorted({field.name for kind in kinds for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("field", _fields())
def test_every_field_is_documented(field: str):
    assert f"`{field}`" in PAGE.read_text(encoding="utf-8")
