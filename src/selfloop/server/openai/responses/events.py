"""A response as an answer, whole or as events; both are made of the same items."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from selfloop.server.openai.errors import ERRORS
from selfloop.server.openai.logprobs import Grown
from selfloop.server.openai.responses import wire
from selfloop.server.openai.wire import ErrorAnswer
from selfloop.server.shared.events import frame
from selfloop.server.shared.tools import Call, CallReader, ToolUse
from selfloop.types.errors import SelfloopError
from selfloop.types.ids import new_id
from selfloop.types.sampling import SampledSequence

Json = dict[str, object]


def _id(prefix: str) -> str:
    return f"{prefix}_{new_id()}{new_id()}{new_id()}"


@dataclass(slots=True)
class ResponseAnswer:
    """The response to a request, as its sample grows.

    Args:
        num_prompt: tokens of the rendered conversation.
    """

    body: wire.ResponsesBody
    num_prompt: int
    use: ToolUse
    id: str = field(default_factory=lambda: _id("resp"))
    created_at: int = field(default_factory=lambda: int(time.time()))
    num_cached: int = 0
    num_sampled: int = 0
    _reader: CallReader = field(init=False)
    _output: list[Json] = field(default_factory=list[Json])
    _open: Json | None = None
    _text: str = ""
    _num_events: int = 0

    def __post_init__(self) -> None:
        self._reader = CallReader(self.use)

    def whole(self, sequence: SampledSequence, num_cached: int) -> Json:
        self.num_cached = num_cached
        for _ in self._items(sequence):
            pass
        return self._response(sequence.stop_reason)

    def opening(self, num_cached: int) -> Iterator[bytes]:
        self.num_cached = num_cached
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None))

    def grown(self, grown: Grown) -> Iterator[bytes]:
        """The events for what the sample grew by; none when there is nothing to show yet."""
        yield from self._items(grown)
        if grown.stop_reason is not None:
            response = self._response(grown.stop_reason)
            yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: SelfloopError) -> bytes:
        """The last event of a stream that fails."""
        shown = msgspec.convert(ERRORS.body(error), ErrorAnswer).error
        return self._event("error", code=shown.code, message=shown.message, param=shown.param)

    def _items(self, grown: Grown) -> Iterator[bytes]:
        self.num_sampled += len(grown.tokens)
        pieces = self._reader.feed(grown.text).items
        if grown.stop_reason is not None:
            pieces = [*pieces, *self._reader.finish().items]
        for piece in pieces:
            if isinstance(piece, Call):
                yield from self._close_message(cut=False)
                yield from self._call(piece)
            elif piece:
                yield from self._say(piece)
        if grown.stop_reason is not None:
            if not self._output and self._open is None:
                yield from self._say("")
            yield from self._close_message(cut=grown.stop_reason == "length")

    def _say(self, text: str) -> Iterator[bytes]:
        if self._open is None:
            self._open = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
            yield self._item_event("added", self._open | {"content": []})
            yield self._event("response.content_part.added", **self._place(), part=_part(""))
        self._text += text
        if text:
            yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[])

    def _close_message(self, *, cut: bool) -> Iterator[bytes]:
        if self._open is None:
            return
        place, text = self._place(), self._text
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        item = self._open | {"status": "incomplete" if cut else "completed", "content": [_part(text)]}
        yield self._item_event("done", item)
        self._output.append(item)
        self._open, self._text = None, ""

    def _call(self, call: Call) -> Iterator[bytes]:
        item: Json = {"id": _id("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        place: Json = {"item_id": item["id"], "output_index": len(self._output)}
        kind = "response.function_call_arguments"
        yield self._item_event("added", item | {"status": "in_progress", "arguments": ""})
        yield self._event(f"{kind}.delta", **place, delta=call.arguments)
        yield self._event(f"{kind}.done", **place, name=call.name, arguments=call.arguments)
        item |= {"status": "completed", "arguments": call.arguments}
        yield self._item_event("done", item)
        self._output.append(item)

    def _place(self) -> Json:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output), "content_index": 0}

    def _item_event(self, what: str, item: Json) -> bytes:
        return self._event(f"response.output_item.{what}", output_index=len(self._output), item=item)

    def _event(self, type: str, **fields: object) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return frame({"type": type, "sequence_number": number, **fields}, type)

    def _response(self, stop_reason: str | None) -> Json:
        is_cut = stop_reason == "length"
        status = "in_progress" if stop_reason is None else "incomplete" if is_cut else "completed"
        return self._asked() | {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": list(self._output),
            "usage": None if stop_reason is None else self._usage(),
        }

    def _asked(self) -> Json:
        """What the request said, with what stands for it where it said nothing."""
        body = self.body
        given = None if body.text is None else body.text.format
        reasoning = body.reasoning or wire.Reasoning()
        return {
            "model": body.model,
            "background": False,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"} if given is None else _without_nulls(given)},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def _usage(self) -> Json:
        return {
            "input_tokens": self.num_prompt,
            "input_tokens_details": {"cached_tokens": self.num_cached, "cache_write_tokens": 0},
            "output_tokens": self.num_sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.num_prompt + self.num_sampled,
        }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _without_nulls(given: wire.TextFormat) -> Json:
    return {name: value for name, value in msgspec.structs.asdict(given).items() if value is not None}
