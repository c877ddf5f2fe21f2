"""Server-sent events: whatever text is sampled arrives as it was; and streams that run side by side."""

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai._streaming import SSEDecoder

from selfloop.server.openai.chat.choices import ChatChoice
from selfloop.server.openai.completions.choices import CompletionChoice
from selfloop.server.openai.logprobs import TextOffsets, token_text
from selfloop.server.shared.events import DONE, frame, merged
from selfloop.server.shared.tools import ToolUse
from selfloop.types.sampling import SampleDelta, SampledSequence, SampleResult

texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\n\r\x85\u2028\u2029\x0b\x0c\x1c"), max_size=20
)


@given(st.lists(texts, max_size=5), st.integers(1, 50))
def test_frames_arrive_as_they_were(given_texts: list[str], size: int):
    body = b"".join(map(frame, given_texts)) + DONE
    chunks = iter([body[at : at + size] for at in range(0, len(body), size)])
    events = [event.data for event in SSEDecoder().iter_bytes(chunks)]
    assert events.pop() == "[DONE]"
    assert list(map(json.loads, events)) == given_texts


@given(texts)
def test_a_frame_is_one_line_by_every_rule(text: str):
    lines = frame({"text": text}).decode().splitlines()
    assert [bool(line) for line in lines] == [True, False]


deltas = st.lists(st.tuples(texts, st.integers(0, 3)), min_size=1, max_size=6)


@given(deltas)
@pytest.mark.parametrize("use", [ToolUse(), ToolUse(frozenset({"f"}), "tags"), ToolUse(frozenset({"f"}), "json")])
def test_a_chat_in_pieces_is_the_whole(use: ToolUse, pieces: list[tuple[str, int]]):
    grown = _deltas(pieces)
    whole = ChatChoice(0, use, True, True).whole(_sum(grown))
    choice = ChatChoice(0, use, True, True)
    chunks = [chunk for delta in grown if (chunk := choice.grown(delta)) is not None]
    assert "".join(c["delta"].get("content", "") for c in chunks) == whole["message"]["content"]
    assert [t for c in chunks for t in c["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert [t for c in chunks for t in c["token_ids"]] == whole["token_ids"]
    assert [c["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + [whole["finish_reason"]]


@given(deltas)
def test_a_completion_in_pieces_is_the_whole(pieces: list[tuple[str, int]]):
    grown = _deltas(pieces)
    whole = CompletionChoice(0, 1, True).whole(_sum(grown), SampleResult("", []))
    choice = CompletionChoice(0, 1, True)
    chunks = [chunk for delta in grown if (chunk := choice.grown(delta)) is not None]
    assert "".join(c["text"] for c in chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [value for c in chunks for value in c["logprobs"][name]] == values


@given(st.text(max_size=20), st.integers(1, 3))
def test_offsets_count_characters(text: str, size: int):
    text = text.encode(errors="replace").decode()
    raw = text.encode()
    offsets = TextOffsets()
    found = [offsets.next(raw[at : at + size]) for at in range(0, len(raw), size)]
    assert found == sorted(found)
    assert all(len(raw[: at * size].decode(errors="ignore")) == offset for at, offset in enumerate(found))


@given(st.binary(max_size=4), st.binary(max_size=4))
def test_tokens_look_as_different_as_they_are(first: bytes, second: bytes):
    if not (first.startswith(b"bytes:") or second.startswith(b"bytes:")):
        assert (token_text(first) == token_text(second)) is (first == second)


async def test_streams_side_by_side():
    async def count(n: int) -> AsyncGenerator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    events = [event async for event in merged([count(3), count(0), count(2)])]
    assert [i for place, i in events if place == 0] == [0, 1, 2]
    assert [i for place, i in events if place == 2] == [0, 1]
    assert len(events) == 5


async def test_the_first_error_ends_all_streams():
    ended: list[str] = []

    async def endless() -> AsyncGenerator[int]:
        try:
            while True:
                await asyncio.sleep(0)
                yield 1
        finally:
            ended.append("endless")

    async def broken() -> AsyncGenerator[int]:
        await asyncio.sleep(0)
        yield 2
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        async for _ in merged([endless(), broken()]):
            pass
    assert ended == ["endless"]


def _deltas(pieces: list[tuple[str, int]]) -> list[SampleDelta]:
    grown: list[SampleDelta] = []
    for place, (text, num_tokens) in enumerate(pieces):
        reason = "stop" if place + 1 == len(pieces) else None
        tokens = list(range(num_tokens))
        raws = [bytes([97 + token]) for token in tokens]
        grown.append(SampleDelta(0, tokens, [-0.5] * num_tokens, text, reason, [[] for _ in tokens], raws))
    return grown


def _sum(grown: list[SampleDelta]) -> SampledSequence:
    return SampledSequence(
        [t for d in grown for t in d.tokens],
        [p for d in grown for p in d.logprobs],
        "stop",
        "".join(d.text for d in grown),
        [t for d in grown for t in d.top_logprobs or []],
        [b for d in grown for b in d.token_bytes or []],
    )
