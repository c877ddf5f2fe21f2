"""What does not fit is refused by its field, with what may stand there."""

from typing import Any

import pytest

from selfloop.server.anthropic import wire as anthropic
from selfloop.server.openai import wire as openai
from selfloop.server.shared.decode import convert, decode
from selfloop.types.errors import BadRequest


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (
            anthropic.MessagesBody,
            b'{"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "a"}, {"role": "x"}]}',
            """messages[1].role: "assistant" or "system" or "user", got 'x'""",
        ),
        (
            openai.ChatBody,
            b'{"model": "m", "messages": [{"role": "bot"}]}',
            """messages[0].role: "assistant" or "developer" or "system" or "tool" or "user", got 'bot'""",
        ),
        (
            openai.ChatBody,
            b'{"model": "m", "messages": [], "tool_choice": "maybe"}',
            """tool_choice: "auto" or "none" or "required", got 'maybe'""",
        ),
    ],
)
def test_what_may_stand_there_is_named(kind: Any, body: bytes, message: str):
    with pytest.raises(BadRequest) as caught:
        decode(body, kind)
    assert str(caught.value) == message


def test_also_below_what_was_decoded():
    with pytest.raises(BadRequest) as caught:
        convert({"type": "sometimes"}, anthropic.ToolChoice, "tool_choice")
    assert str(caught.value) == """tool_choice.type: "any" or "auto" or "none" or "tool", got 'sometimes'"""
