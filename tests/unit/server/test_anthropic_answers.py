"""A message in blocks: what a stream's events add up to is the whole answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.server.anthropic.answers import Answer
from selfloop.server.shared.tools import ToolUse
from selfloop.types.sampling import SampleDelta, SampledSequence

USE = ToolUse(frozenset({"f"}), "tags")
F = '<tool_call>{"name": "f", "arguments": {"a": "é"}}</tool_call>'
Json = dict[str, object]


def answer(use: ToolUse = USE, *, is_cut: bool = False) -> Answer:
    return Answer("m", 5, use, ["STOP"], is_cut, id="msg_1")


def whole(text: str, reason: str = "stop", stop_string: str | None = None, **options: bool) -> Json:
    sequence = SampledSequence([1, 2], [0.0, 0.0], reason, text, stop_string=stop_string)  # type: ignore[arg-type]
    return answer(**options).whole(sequence, 3)


def events_of(pieces: list[str], stop_string: str | None = None) -> list[Json]:
    """The events of a stream of one token a piece."""
    streamed = answer()
    frames = list(streamed.opening(0))
    for i, piece in enumerate(pieces):
        is_last = i + 1 == len(pieces)
        reason, by = ("stop", stop_string) if is_last else (None, None)
        frames += streamed.grown(SampleDelta(0, [i], [0.0], piece, reason, stop_string=by, num_cached=3))
    found: list[Json] = []
    for one in frames:
        name, data = one.decode().removesuffix("\n\n").split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def added_up(events: list[Json]) -> Json:
    """The message that a client puts together."""
    message: Json = events[0]["message"]
    content: list[Json] = []
    ends: list[object] = []
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(content) == len(ends)
                content.append(dict(event["content_block"]))
            case "content_block_delta":
                assert event["index"] == len(content) - 1 == len(ends)
                if event["delta"]["type"] == "text_delta":
                    assert event["delta"]["text"]
                    content[-1]["text"] += event["delta"]["text"]
                else:
                    content[-1]["input"] = json.loads(event["delta"]["partial_json"])
            case "content_block_stop":
                assert event["index"] == len(ends)
                ends.append(event["index"])
            case "message_delta":
                message |= event["delta"] | {"usage": event["usage"]}
            case kind:
                assert kind in ("ping", "message_stop")
    assert len(ends) == len(content)
    return message | {"content": content}


def unnamed(message: Json) -> Json:
    """Ids of calls are fresh each time."""
    return message | {"content": [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]}


def test_the_order_of_events():
    kinds = [event["type"] for event in events_of(["Let me", " see.", F])]
    text = ["content_block_start", "content_block_delta", "content_block_delta", "content_block_stop"]
    call = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert kinds == ["message_start", "ping", *text, *call, "message_delta", "message_stop"]


def test_an_answer_without_text():
    assert [event["type"] for event in events_of([""])] == ["message_start", "ping", "message_delta", "message_stop"]
    assert whole("")["content"] == []


def test_blocks_and_usage():
    message = whole(f"a {F} b")
    text, call, after = message["content"]
    assert (text, after) == ({"type": "text", "text": "a"}, {"type": "text", "text": "b"})
    assert call.pop("id").startswith("toolu_")
    assert call == {"type": "tool_use", "name": "f", "input": {"a": "é"}}
    cached = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 3}
    assert message["usage"] == {"input_tokens": 2, "output_tokens": 2} | cached
    assert (message["id"], message["type"], message["role"], message["model"]) == ("msg_1", "message", "assistant", "m")


@pytest.mark.parametrize(
    ("message", "reason", "sequence"),
    [
        (whole("a"), "end_turn", None),
        (whole("a", "length"), "max_tokens", None),
        (whole("a", "length", is_cut=True), "model_context_window_exceeded", None),
        (whole(F), "tool_use", None),
        (whole(F, "length"), "max_tokens", None),
        (whole("a", stop_string="STOP"), "stop_sequence", "STOP"),
        (whole(F.removesuffix("</tool_call>"), stop_string="</tool_call>"), "tool_use", None),
    ],
)
def test_why_it_ends(message: Json, reason: str, sequence: str | None):
    assert (message["stop_reason"], message["stop_sequence"]) == (reason, sequence)


parts = st.sampled_from([F, "text", " ", "\n", "<tool_call>", "</tool_call>", "<", "é", '"', "}"])


@given(st.lists(parts, max_size=8).map("".join), st.data())
def test_events_add_up_to_the_whole_answer(text: str, data: st.DataObject):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    sequence = SampledSequence(list(range(len(pieces))), [0.0] * len(pieces), "stop", text)
    assert unnamed(added_up(events_of(pieces))) == unnamed(answer().whole(sequence, 3))
