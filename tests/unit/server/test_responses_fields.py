"""What the chat request refuses is named as the Responses request has it."""

import pytest

from selfloop.server.openai.responses.request import chat_of
from selfloop.server.openai.responses.wire import ResponsesBody


@pytest.mark.parametrize(
    ("chat_field", "own"),
    [
        ("messages[0].content", "instructions"),
        ("messages[1].content", "input"),
        ("messages", "input"),
    ],
)
def test_texts_of_their_own(chat_field: str, own: str):
    _, conversation = chat_of(ResponsesBody(model="m", input="hello", instructions="be brief"))
    assert conversation.field_of(chat_field) == own


def test_items():
    message = {"type": "message", "role": "user", "content": "hello"}
    _, conversation = chat_of(ResponsesBody(model="m", input=[message], instructions="be brief"))
    assert conversation.field_of("messages[1].content") == "input[0].content"
