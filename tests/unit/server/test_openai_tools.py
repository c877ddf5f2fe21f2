"""Function calls: how they are read out of text that comes in pieces, and how one is forced."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.server.openai import wire
from selfloop.server.openai.chat.tools import tool_use
from selfloop.server.shared.tools import CallReader, ToolUse, call_form
from selfloop.types.errors import BadRequest

QWEN = 'tools <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
LLAMA = 'tools {"name": function name, "parameters": dictionary of argument name and its value}.'
QWEN3_5 = "tools <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call>"
PARAMETERS = ToolUse(frozenset({"f", "g"}), "parameters", texts=frozenset({("f", "t")}))
TAGS = ToolUse(frozenset({"f", "g"}), "tags")
WHOLE = ToolUse(frozenset({"f", "g"}), "json")
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = '<tool_call>{"name": "g", "arguments": {"t": "</tool_call>"}}</tool_call>'
_VALUES = "<parameter=a>\n1\n</parameter>\n<parameter=t>\n1\n</parameter>\n"
BY_TAG = f"<tool_call>\n<function=f>\n{_VALUES}</function>\n</tool_call>"


def read(use: ToolUse, *pieces: str) -> tuple[str, list[tuple[str, object]]]:
    """Text, and calls by name and arguments."""
    reader = CallReader(use)
    read = [*map(reader.feed, pieces), reader.finish()]
    calls = [call for piece in read for call in piece.calls]
    assert len({call.id for call in calls}) == len(calls)
    return "".join(piece.text for piece in read), [(call.name, json.loads(call.arguments)) for call in calls]


def by_tag(*parameters: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        (BY_TAG, "", [("f", {"a": 1, "t": "1"})]),
        (by_tag(), "", [("f", {})]),
        (by_tag(("a", "True"), ("b", "null"), ("c", "None")), "", [("f", {"a": True, "b": None, "c": None})]),
        (by_tag(("a", '{"x": [1]}'), ("b", "two\nlines ")), "", [("f", {"a": {"x": [1]}, "b": "two\nlines "})]),
        (by_tag(("t", "</tool_call> </function>")), "", [("f", {"t": "</tool_call> </function>"})]),
        (f"Let me see.\n\n{BY_TAG}\n{by_tag(name='g')}", "Let me see.", [("f", {"a": 1, "t": "1"}), ("g", {})]),
        (BY_TAG.removesuffix("</tool_call>"), "", [("f", {"a": 1, "t": "1"})]),
        (by_tag(name="unknown"), by_tag(name="unknown"), []),
        (F, F, []),
        ("<tool_call>\n<function=f>\n<parameter=a>\n1", "<tool_call>\n<function=f>\n<parameter=a>\n1", []),
        (by_tag().replace("</function>", "more</function>"), by_tag().replace("</function>", "more</function>"), []),
        (f"<tool_call>nothing</tool_call>{BY_TAG}", "<tool_call>nothing</tool_call>", [("f", {"a": 1, "t": "1"})]),
    ],
)
def test_calls_with_a_tag_for_each_parameter(text: str, left: str, calls: list[tuple[str, object]]):
    assert read(PARAMETERS, text) == (left, calls)


def test_parameters_that_are_text_stay_text():
    properties = {"t": {"type": "string"}, "e": {"enum": ["1", "2"]}, "n": {"type": "integer"}, "x": {}}
    tools = [tool("f", parameters={"type": "object", "properties": properties}), tool("g", parameters={})]
    use = tool_use(chat(tools=tools, parallel_tool_calls=False), QWEN3_5)
    assert (use.texts, use.own_stop) == ({("f", "t"), ("f", "e")}, ("</tool_call>",))
    assert read(use, by_tag(*((key, "1") for key in properties)))[1] == [("f", {"t": "1", "e": "1", "n": 1, "x": 1})]


def test_a_strict_function_is_refused_where_no_grammar_keeps_its_calls():
    with pytest.raises(BadRequest, match=r"tools\[1\].function.strict: false, or tool_choice none, required"):
        tool_use(chat(tools=[tool("g"), tool("f", strict=True)]), QWEN3_5)
    assert tool_use(chat(tools=[tool("f", strict=True)], tool_choice="required"), QWEN3_5).structured is not None


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("just text", "just text", []),
        ("text \n", "text \n", []),
        (F, "", ["f"]),
        (f"{F}\n{G}\n", "", ["f", "g"]),
        (f"Let me see.\n{F}", "Let me see.", ["f"]),
        (f"{F} and then", "and then", ["f"]),
        (F.removesuffix("</tool_call>"), "", ["f"]),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ("<tool_call>", "<tool_call>", []),
        ("a <tool_c", "a <tool_c", []),
        (F.replace('"f"', '"unknown"'), F.replace('"f"', '"unknown"'), []),
        (F.replace('{"a": 1}', "3"), F.replace('{"a": 1}', "3"), []),
        (f"<tool_call>{F}", "<tool_call>", ["f"]),
        (f"{F}text <tool_call>", "text <tool_call>", ["f"]),
        ("", "", []),
    ],
)
def test_tagged_calls(text: str, left: str, names: list[str]):
    assert (read(TAGS, text)[0], [name for name, _ in read(TAGS, text)[1]]) == (left, names)


def test_a_tag_within_a_string_closes_nothing():
    assert read(TAGS, G) == ("", [("g", {"t": "</tool_call>"})])


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', "", ["f"]),
        (' \n{"name": "f", "parameters": {}}\n', "", ["f"]),
        ('{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
        ('{"some": "json"}', '{"some": "json"}', []),
        ("text {", "text {", []),
        ("  ", "  ", []),
    ],
)
def test_calls_as_the_whole_text(text: str, left: str, names: list[str]):
    assert (read(WHOLE, text)[0], [name for name, _ in read(WHOLE, text)[1]]) == (left, names)


CUT = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<", "{", '{"name": "f"', '"', "}"]
parts = st.sampled_from([F, G, BY_TAG, "text", " ", "\n", "é", *CUT])


@given(st.lists(parts, max_size=8).map("".join), st.data())
@pytest.mark.parametrize("use", [TAGS, PARAMETERS, WHOLE, ToolUse()])
def test_how_the_text_is_cut_changes_nothing(use: ToolUse, text: str, data: st.DataObject):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(use, *pieces) == read(use, text)


@given(st.text())
def test_text_without_tools_is_left_alone(text: str):
    assert read(ToolUse(), text) == (text, [])


def test_text_is_not_held_back_for_long():
    reader = CallReader(TAGS)
    assert [reader.feed(piece).text for piece in ("a", " b", " <", "x")] == ["a", " b", "", " <x"]


def test_forms_are_read_from_the_template():
    assert call_form(QWEN) == "tags"
    assert call_form(LLAMA) == "json"
    assert call_form(QWEN3_5) == "parameters"
    assert call_form("[TOOL_CALLS]") is None


def chat(**fields: object) -> wire.ChatBody:
    base = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    return msgspec.convert(base | fields, wire.ChatBody)


def tool(name: str, **function: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name} | function}


def test_choices():
    tools = [tool("f", parameters={"type": "object", "properties": {"a": {"type": "integer"}}}), tool("g")]
    assert tool_use(chat(), None) == ToolUse()
    assert tool_use(chat(tools=tools, tool_choice="none"), QWEN) == ToolUse()
    assert tool_use(chat(tools=tools), QWEN) == TAGS
    assert tool_use(chat(tools=tools, parallel_tool_calls=False), QWEN).own_stop == ("</tool_call>",)
    forced = tool_use(chat(tools=tools, tool_choice="required"), "tools in some way").structured
    assert forced is not None
    assert [name in forced.spec for name in (r"\"f\"", r"\"g\"")] == [True, True]
    named = tool_use(chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}}), QWEN).structured
    assert named is not None
    assert [name in named.spec for name in (r"\"f\"", r"\"g\"")] == [False, True]


def test_strict_functions_are_kept_where_the_model_may_call():
    tools = [tool("f", strict=True, parameters={"type": "object"}), tool("g")]
    use = tool_use(chat(tools=tools), QWEN)
    assert (use.names, use.form, use.own_stop) == ({"f", "g"}, "tags", ())
    assert use.structured is not None
    assert tool_use(chat(tools=tools), LLAMA).structured not in (None, use.structured)
    assert tool_use(chat(tools=tools, parallel_tool_calls=False), QWEN).structured not in (None, use.structured)
    with pytest.raises(BadRequest, match=r"tools\[0\].function.parameters.type: object"):
        tool_use(chat(tools=[tool("f", strict=True, parameters={"type": "string"})]), QWEN)


def test_an_answer_of_a_schema_beside_calls():
    answer = {"type": "object"}
    assert tool_use(chat(tools=[tool("f")]), QWEN, answer).structured is not None
    with pytest.raises(BadRequest, match="response_format"):
        tool_use(chat(tools=[tool("f")]), LLAMA, answer)


@pytest.mark.parametrize("template", [None, "no such variable"])
def test_a_template_without_tools(template: str | None):
    with pytest.raises(BadRequest, match="tools: null"):
        tool_use(chat(tools=[tool("f")]), template)


def test_a_form_that_is_not_read():
    with pytest.raises(BadRequest, match="tool_choice: none, required or a function"):
        tool_use(chat(tools=[tool("f")]), "tools [TOOL_CALLS]")
