"""A message as an answer, whole or as events; both are made of the same blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from selfloop.server.shared.events import frame
from selfloop.server.shared.tools import Call, CallReader, ToolUse
from selfloop.types.ids import new_id
from selfloop.types.sampling import SampleDelta, SampledSequence

Json = dict[str, object]
Grown = SampleDelta | SampledSequence


@dataclass(slots=True)
class Answer:
    """The message that answers a request, as its sample grows.

    Args:
        stop_sequences: the request's own; another stop string ends the turn as the model would.
        is_cut: whether the model's length ends the answer before ``max_tokens`` does.
    """

    model: str
    num_prompt: int
    use: ToolUse
    stop_sequences: list[str]
    is_cut: bool
    id: str = field(default_factory=lambda: f"msg_{new_id()}{new_id()}{new_id()}")
    num_cached: int = 0
    num_sampled: int = 0
    _reader: CallReader = field(init=False)
    _num_blocks: int = 0
    _num_calls: int = 0
    _in_text: bool = False

    def __post_init__(self) -> None:
        self._reader = CallReader(self.use, "toolu_")

    def whole(self, sequence: SampledSequence, num_cached: int) -> Json:
        self.num_cached = num_cached
        content: list[Json] = []
        text = ""
        for item in self._items(sequence):
            if isinstance(item, str):
                text += item
                continue
            if text:
                content.append({"type": "text", "text": text})
            text = ""
            content.append(_tool_use(item) | {"input": msgspec.json.decode(item.arguments)})
        if text:
            content.append({"type": "text", "text": text})
        return self._message(content, self._usage()) | self._end(sequence)

    def opening(self, num_cached: int) -> Iterator[bytes]:
        self.num_cached = num_cached
        message = self._message([], self._usage()) | {"stop_reason": None, "stop_sequence": None}
        yield _event("message_start", message=message)
        yield _event("ping")

    def grown(self, delta: SampleDelta) -> Iterator[bytes]:
        """The events for what the sample grew by; none when there is nothing to show yet."""
        for item in self._items(delta):
            if isinstance(item, Call):
                yield from self._close_text()
                yield _event("content_block_start", index=self._num_blocks, content_block=_tool_use(item))
                arguments: Json = {"type": "input_json_delta", "partial_json": item.arguments}
                yield _event("content_block_delta", index=self._num_blocks, delta=arguments)
                yield _event("content_block_stop", index=self._num_blocks)
                self._num_blocks += 1
            elif item:
                if not self._in_text:
                    self._in_text = True
                    block: Json = {"type": "text", "text": ""}
                    yield _event("content_block_start", index=self._num_blocks, content_block=block)
                yield _event("content_block_delta", index=self._num_blocks, delta={"type": "text_delta", "text": item})
        if delta.stop_reason is not None:
            self.num_cached = delta.num_cached
            yield from self._close_text()
            yield _event("message_delta", delta=self._end(delta), usage=self._usage())
            yield _event("message_stop")

    def _close_text(self) -> Iterator[bytes]:
        if self._in_text:
            self._in_text = False
            yield _event("content_block_stop", index=self._num_blocks)
            self._num_blocks += 1

    def _items(self, grown: Grown) -> list[str | Call]:
        self.num_sampled += len(grown.tokens)
        items = self._reader.feed(grown.text).items
        if grown.stop_reason is not None:
            items = [*items, *self._reader.finish().items]
        self._num_calls += sum(isinstance(item, Call) for item in items)
        return items

    def _end(self, grown: Grown) -> Json:
        """Why the answer ends where it does."""
        stop_string = grown.stop_string if grown.stop_string in self.stop_sequences else None
        if grown.stop_reason == "length":
            return {"stop_reason": "model_context_window_exceeded" if self.is_cut else "max_tokens"} | _NO_STOP
        if stop_string is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_string}
        return {"stop_reason": "tool_use" if self._num_calls else "end_turn"} | _NO_STOP

    def _message(self, content: list[Json], usage: Json) -> Json:
        head: Json = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        return head | {"content": content, "usage": usage}

    def _usage(self) -> Json:
        """What was read from the cache is not among the input tokens; all that was not is new to it."""
        return {
            "input_tokens": self.num_prompt - self.num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.num_cached,
            "output_tokens": self.num_sampled,
        }


_NO_STOP: Json = {"stop_sequence": None}


def _tool_use(call: Call) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}


def _event(type: str, **fields: object) -> bytes:
    return frame({"type": type, **fields}, type)
