"""Templates with tools for models whose own has none."""

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from selfloop.convert.embedded import gguf_file
from selfloop.server.shared.tools import call_form
from selfloop.types.tool_templates import template_with_tools

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Łódź", "days": [1, 2]}}},
    {"id": "2", "type": "function", "function": {"name": "look_up", "arguments": {}}},
]


@pytest.fixture(scope="module")
def own() -> str:
    from gguf import GGUFReader

    with gguf_file(lambda stage, fraction: None) as path:
        return GGUFReader(path).fields["tokenizer.chat_template"].contents()


def written(template: str, messages: list[dict], tools: list[dict] | None) -> str:
    texts, _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True)
    return texts[0]


def test_a_template_that_is_not_known_is_kept():
    assert template_with_tools("{{ messages }}") == "{{ messages }}"
    assert template_with_tools("") == ""


@pytest.mark.smollm2
def test_the_embedded_models_template_is_known(own: str):
    served = template_with_tools(own)
    assert served != own
    assert call_form(own) is None
    assert call_form(served) == "tags"


@pytest.mark.smollm2
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_turns_are_those_of_the_own_template(own: str, system: list[dict]):
    """All that comes after the system turn, which begins as the own one does."""
    messages = [
        *system,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy"},
        {"role": "tool", "content": "rain"},
        {"role": "user", "content": "So?"},
    ]
    before, after = (written(text, messages, [TOOL]) for text in (own, template_with_tools(own)))
    head, turns = before.split("<|im_end|>\n", 1)
    assert after.startswith(head + "\n\n# Tools\n")
    assert after.endswith("<|im_end|>\n" + turns)
    assert json.dumps(TOOL) in after


@pytest.mark.smollm2
def test_calls_are_written_as_they_are_read(own: str):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": CALLS}]
    text = written(template_with_tools(own), messages, [TOOL])
    turn = text.split("<|im_start|>assistant\n")[1].removesuffix("<|im_end|>\n")
    blocks = turn.split("<tool_call>\n")[1:]
    assert [json.loads(block.split("\n</tool_call>")[0]) for block in blocks] == [call["function"] for call in CALLS]
