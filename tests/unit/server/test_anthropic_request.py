"""A conversation of blocks on its way to the template, and what a messages request asks of the sampler."""

import json
from pathlib import Path

import msgspec
import pytest

from selfloop.server.anthropic import wire
from selfloop.server.anthropic.request import Prompt, prompt_of, spec_of
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import StructuredOutput

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"
TEMPLATE = "{{ tools }} <tool_call>"
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
USER = {"role": "user", "content": "a"}
FORMAT = {"type": "json_schema", "schema": {"type": "object"}}


def body(**fields: object) -> wire.MessagesBody:
    base = {"model": "m", "max_tokens": 8, "messages": [USER]}
    return msgspec.convert(base | fields, wire.MessagesBody)


def prompt(**fields: object) -> Prompt:
    return prompt_of(body(**fields), TEMPLATE)


def messages(*given: object, **fields: object) -> list[object]:
    return json.loads(prompt(messages=given, **fields).chat.messages)


def text(value: str, **fields: object) -> dict[str, object]:
    return {"type": "text", "text": value} | fields


def result(**fields: object) -> dict[str, object]:
    return {"type": "tool_result", "tool_use_id": "toolu_1"} | fields


def test_system_as_a_string_or_blocks():
    assert messages(USER, system="s")[0] == {"role": "system", "content": "s"}
    blocks = [text("one", cache_control={"type": "ephemeral"}), text("two")]
    assert messages(USER, system=blocks)[0] == {"role": "system", "content": "one\ntwo"}
    assert messages(USER, system="") == messages(USER, system=None) == [{"role": "user", "content": "a"}]


def test_system_turns_stay_where_they_are():
    """As Claude Code sends its reminders; what a template makes of them is its own affair."""
    reminder = {"role": "system", "content": [text("be brief", cache_control={"type": "ephemeral"})]}
    assert messages(USER, {"role": "assistant", "content": "b"}, reminder, USER | {"cache_control": None}) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a"},
    ]
    assert messages(reminder, USER, system="s")[0] == {"role": "system", "content": "s\nbe brief"}


def test_a_refused_message_is_named_as_it_was_sent():
    """The template's messages are others: the system message is one, and turns of one role are one."""
    answer = {"role": "assistant", "content": [text("b"), USE]}
    asked = prompt(
        messages=[USER, USER, answer, {"role": "user", "content": [result(content="c"), text("d")]}], system="s"
    )
    fields = [asked.as_asked(BadRequest(f"messages[{i}].content", "other text")).field for i in range(5)]
    assert fields == [
        "system",
        "messages[0].content or messages[1].content",
        "messages[2].content[0] or messages[2].content[1]",
        "messages[3].content[0]",
        "messages[3].content[1]",
    ]
    assert asked.as_asked(BadRequest("messages", "other text")).field == "messages"


def test_thinking_and_effort_are_variables_of_the_template():
    def options(template: str, **fields: object) -> object:
        given = prompt_of(body(**fields), template).chat.options
        return None if given is None else json.loads(given)

    off = {"thinking": {"type": "disabled"}}
    assert options("{{ enable_thinking }}", **off) == {"enable_thinking": False}
    assert options("", **off) is options("{{ enable_thinking }}", thinking={"type": "adaptive"}) is None
    low = {"output_config": {"effort": "low"}}
    assert options("{{ reasoning_effort }}", **low, **off) == {"reasoning_effort": "low"}
    assert options("", output_config={"effort": "high"}) is None


def test_an_answer_of_a_format():
    for fields in ({"output_format": FORMAT}, {"output_config": {"format": FORMAT}}):
        asked = prompt(**fields)
        assert asked.structured == StructuredOutput("json_schema", '{"type":"object"}')
        assert asked.structured_by.startswith(next(iter(fields)))
        beside = prompt(**fields, tools=[TOOL])
        assert beside.structured is beside.tools.structured is not None
        with pytest.raises(BadRequest, match="a call does not match it"):
            prompt_of(body(**fields, tools=[TOOL]), 'tools {"name": n, "parameters": p}')
    clears = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    assert prompt(context_management=clears).chat == prompt().chat


def test_turns_with_tools_as_templates_read_them():
    assert messages(
        USER,
        {"role": "assistant", "content": [text("let me see"), USE, USE | {"id": "toolu_2", "input": {}}]},
        {
            "role": "user",
            "content": [
                result(content=[text("3"), text("4")]),
                result(tool_use_id="toolu_2", content="no", is_error=True),
                text("and now?"),
            ],
        },
    ) == [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
                {"id": "toolu_2", "type": "function", "function": {"name": "f", "arguments": {}}},
            ],
        },
        {"role": "tool", "content": "3\n4", "tool_call_id": "toolu_1", "name": "f"},
        {"role": "tool", "content": "Error: no", "tool_call_id": "toolu_2", "name": "f"},
        {"role": "user", "content": "and now?"},
    ]


def test_turns_of_one_role_are_one():
    assert messages(USER, {"role": "user", "content": [text("b"), text("c")]}) == [
        {"role": "user", "content": "a\nb\nc"}
    ]
    assert messages(USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [result()]})[1:] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "", "tool_call_id": "toolu_1", "name": "f"},
    ]


def test_an_assistant_at_the_end_is_gone_on_with():
    chat = prompt(messages=[USER, {"role": "assistant", "content": "The"}]).chat
    assert (chat.continue_final_message, chat.add_generation_prompt) == (True, False)
    chat = prompt().chat
    assert (chat.continue_final_message, chat.add_generation_prompt) == (False, True)


def test_tools_reach_the_template_unless_none_may_be_called():
    shown = prompt(tools=[TOOL | {"cache_control": {"type": "ephemeral"}}]).chat.tools
    assert shown is not None
    function = {"name": "f", "description": "d", "parameters": TOOL["input_schema"]}
    assert json.loads(shown) == [{"type": "function", "function": function}]
    assert prompt(tools=[TOOL], tool_choice={"type": "none"}).chat.tools is None


def test_tool_choice():
    use = prompt(tools=[TOOL]).tools
    assert (use.names, use.form, use.structured) == ({"f"}, "tags", None)
    assert prompt(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).tools.own_stop
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
        forced = prompt(tools=[TOOL, TOOL | {"name": "g"}], tool_choice=choice).tools.structured
        assert forced is not None
        names = [name for name in "fg" if rf"\"{name}\"" in forced.spec]
        assert names == (["f", "g"] if choice["type"] == "any" else ["f"])
    strict = prompt(tools=[TOOL | {"strict": True}]).tools
    assert strict.form == "tags"
    assert strict.structured is not None


def test_what_is_sampled():
    asked = body(temperature=0.5, top_p=0.9, top_k=3, stop_sequences=["x"], max_tokens=5)
    params = spec_of(asked, [1, 2, 3], prompt_of(asked, None), 16).params
    assert (params.temperature, params.top_p, params.top_k, params.stop) == (0.5, 0.9, 3, ["x"])
    assert (params.max_tokens, params.seed) == (5, None)
    default = spec_of(body(), [1, 2, 3], prompt(), 8).params
    assert (default.temperature, default.top_p, default.top_k) == (1.0, 1.0, 0)
    assert default.max_tokens == 5, "the room that is left"
    one = prompt(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert spec_of(asked, [1], one, 16).params.stop == ["x", "</tool_call>"]


def user(*blocks: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "no blocks": (user(), "messages[0].content"),
    "image": (user({"type": "image", "source": {}}), "messages[0].content[0]"),
    "document": (user(text("a"), {"type": "document", "source": {}}), "messages[0].content[1]"),
    "thinking": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "thinking"}]}]},
        "messages[1].content[0]",
    ),
    "no type": (user({"text": "a"}), "messages[0].content[0]"),
    "text that is none": (user({"type": "text", "text": 1}), "messages[0].content[0].text"),
    "unknown of a block": (user(text("a", surprise=1)), "messages[0].content[0].surprise"),
    "citations": (user(text("a", citations=[{"a": 1}])), "messages[0].content[0].citations"),
    "call of a user": (user(USE), "messages[0].content[0]"),
    "answer to no call": (user(result()), "messages[0].content[0].tool_use_id"),
    "one id twice": (
        {"messages": [USER, {"role": "assistant", "content": [USE, USE]}, USER]},
        "messages[1].content[1].id",
    ),
    "image of a tool": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [USE]},
                {"role": "user", "content": [result(content=[{"type": "image"}])]},
            ]
        },
        "messages[2].content[0].content[0]",
    ),
    "calls without answers": ({"messages": [USER, {"role": "assistant", "content": [USE]}]}, "messages"),
    "system image": ({"system": [{"type": "image"}]}, "system[0]"),
    "a server's tool": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    "tool without schema": ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    "tool of an unfit name": ({"tools": [TOOL | {"name": "a b"}]}, "tools[0].name"),
    "tool twice": ({"tools": [TOOL, TOOL]}, "tools"),
    "arguments that are no object": (
        {"tools": [TOOL | {"strict": True, "input_schema": {"type": "array"}}]},
        "tools[0].input_schema.type",
    ),
    "deferred": ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
    "choice without tools": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "choice of an unknown": ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
    "choice of none by name": ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "f"}}, "tool_choice.name"),
    "thinking on": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
    "thinking off with a budget": ({"thinking": {"type": "disabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
    "system image in its place": (
        {"messages": [USER, {"role": "system", "content": [{"type": "image"}]}]},
        "messages[1].content[0]",
    ),
    "clear tool uses": (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        "context_management.edits[0].type",
    ),
    "clear thinking in part": (
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "when": 1}]}},
        "context_management.edits[0].when",
    ),
    "task budget": (
        {"output_config": {"task_budget": {"type": "tokens", "total": 20000}}},
        "output_config.task_budget",
    ),
    "two formats": ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "output_format"),
    "format and forced call": (
        {"output_format": FORMAT, "tools": [TOOL], "tool_choice": {"type": "any"}},
        "output_format.schema",
    ),
    "container": ({"container": "c"}, "container"),
    "service_tier": ({"service_tier": "priority"}, "service_tier"),
    "effort": ({"output_config": {"effort": "low"}}, "output_config.effort"),
    "mcp_servers": ({"mcp_servers": [{}]}, "mcp_servers"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_by_name(name: str):
    fields, expected = REFUSALS[name]
    with pytest.raises(BadRequest) as caught:
        prompt(**fields)
    assert caught.value.field == expected


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": -2}, {"max_tokens": 0}, {"stop_sequences": [""]}],
)
def test_parameters_out_of_range(fields: dict[str, object]):
    with pytest.raises(BadRequest) as caught:
        spec_of(body(**fields), [1], prompt(), 16)
    assert caught.value.field == next(iter(fields))


def test_neutral_values_are_taken():
    assert prompt(
        metadata={"user_id": "me"},
        cache_control={"type": "ephemeral"},
        thinking={"type": "disabled"},
        service_tier="auto",
        mcp_servers=[],
        tools=[TOOL | {"type": "custom", "defer_loading": False, "strict": False}],
        messages=[{"role": "user", "content": [text("a", citations=None)]}],
    )


def _fields() -> list[str]:
    kinds = [kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire._Wire)]
    return sorted({field.name for kind in kinds for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize("field", _fields())
def test_every_field_is_documented(field: str):
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## Anthropic")
    assert f"`{field}`" in section
