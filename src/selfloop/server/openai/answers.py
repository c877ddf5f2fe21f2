"""Answers of both routes, whole or in pieces; a whole answer is made of the same pieces as a stream."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from selfloop.server.openai.logprobs import (
    Grown,
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    joined,
    prompt_logprobs,
)
from selfloop.server.openai.tools import rendered
from selfloop.server.shared.tools import CallReader, Piece, ToolUse
from selfloop.types.ids import new_id
from selfloop.types.sampling import SampleResult

Json = dict[str, object]


class Head(NamedTuple):
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Head":
        return cls(f"{prefix}-{new_id()}{new_id()}{new_id()}", int(time.time()), model)

    def render(self, kind: str, choices: list[Json], usage: Json | None) -> Json:
        head: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices, "usage": usage}


def usage(num_prompt: int, num_cached: int, num_drawn: int) -> Json:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_drawn,
        "total_tokens": num_prompt + num_drawn,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


@dataclass(slots=True)
class ChatChoice:
    """One sample of a chat, as it grows."""

    index: int
    use: ToolUse
    with_logprobs: bool
    with_ids: bool
    _reader: CallReader = field(init=False)
    _num_calls: int = 0

    def __post_init__(self) -> None:
        self._reader = CallReader(self.use)

    def opening(self) -> Json:
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def grown(self, grown: Grown) -> Json | None:
        """The chunk for what the sample grew by, None when there is nothing to show yet."""
        piece = self._read(grown)
        delta: Json = {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            delta["tool_calls"] = [{"index": self._num_calls + i} | rendered(c) for i, c in enumerate(piece.calls)]
            self._num_calls += len(piece.calls)
        finish_reason = None if grown.stop_reason is None else self._reason(grown, self._num_calls)
        if not (delta or finish_reason or self.with_logprobs or self.with_ids):
            return None
        return self._chunk(delta, grown, finish_reason)

    def whole(self, grown: Grown) -> Json:
        piece = self._read(grown)
        message: Json = {"role": "assistant", "content": piece.text or (None if piece.calls else ""), "refusal": None}
        if piece.calls:
            message["tool_calls"] = [rendered(call) for call in piece.calls]
        choice = self._chunk({}, grown, self._reason(grown, len(piece.calls)))
        del choice["delta"]
        return choice | {"message": message}

    def _read(self, grown: Grown) -> Piece:
        piece = self._reader.feed(grown.text)
        return piece if grown.stop_reason is None else Piece([*piece.items, *self._reader.finish().items])

    def _chunk(self, delta: Json, grown: Grown | None, finish_reason: str | None) -> Json:
        logprobs = chat_logprobs(grown) if self.with_logprobs and grown is not None else None
        chunk: Json = {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return chunk | ({"token_ids": grown.tokens} if self.with_ids and grown is not None else {})

    def _reason(self, grown: Grown, num_calls: int) -> str | None:
        return "tool_calls" if num_calls and grown.stop_reason == "stop" else grown.stop_reason


@dataclass(frozen=True, slots=True)
class Echo:
    """The prompt as an answer repeats it: its text, and what each of its tokens stands for."""

    text: str
    raws: list[bytes]

    @property
    def skipped(self) -> int:
        """Characters at its beginning that its tokens have and its text does not, such as a begin token's."""
        spelled = b"".join(self.raws).decode(errors="replace")
        return len(spelled) - len(self.text) if spelled.endswith(self.text) else 0


@dataclass(slots=True)
class CompletionChoice:
    """One sample of a completion, as it grows.

    Args:
        num_top: likeliest tokens beside each; None for no logprobs.
        is_drawn: whether what was drawn is shown, or only the prompt.
    """

    index: int
    num_top: int | None
    with_ids: bool
    echo: Echo | None = None
    is_drawn: bool = True
    _offsets: TextOffsets = field(init=False)

    def __post_init__(self) -> None:
        self._offsets = TextOffsets(self.echo.skipped if self.echo else 0)

    def opening(self) -> Json | None:
        """The prompt that the stream begins with; never with logprobs, which come with the end only."""
        return None if self.echo is None else self._chunk(self.echo.text, None, None, [])

    def grown(self, grown: Grown) -> Json | None:
        if not (grown.text or grown.stop_reason or self.num_top is not None or self.with_ids):
            return None
        logprobs = None if self.num_top is None else completion_logprobs(grown, self.num_top, self._offsets)
        return self._chunk(grown.text, logprobs, grown.stop_reason, grown.tokens)

    def whole(self, grown: Grown, result: SampleResult) -> Json:
        before, text, tokens, reason = "", "", list[int](), "length"
        logprobs: dict[str, list[object]] | None = None
        if self.echo is not None:
            before = self.echo.text
            if self.num_top is not None:
                assert result.prompt_logprobs is not None
                logprobs = prompt_logprobs(result.prompt_logprobs, self.echo.raws, self.num_top, self._offsets)
        if self.is_drawn:
            text, tokens, reason = grown.text, grown.tokens, grown.stop_reason
            if self.num_top is not None:
                drawn = completion_logprobs(grown, self.num_top, self._offsets)
                logprobs = drawn if logprobs is None else joined(logprobs, drawn)
        return self._chunk(before + text, logprobs, reason, tokens)

    def _chunk(
        self, text: str, logprobs: dict[str, list[object]] | None, finish_reason: str | None, tokens: list[int]
    ) -> Json:
        chunk: Json = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return chunk | ({"token_ids": tokens} if self.with_ids else {})
