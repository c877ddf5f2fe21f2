"""One choice of a chat, whole or in pieces; a whole answer is made of the same pieces as a stream."""

from dataclasses import dataclass, field

from selfloop.server.openai.chat.tools import rendered
from selfloop.server.openai.logprobs import Grown, chat_logprobs
from selfloop.server.openai.sampling import Json
from selfloop.server.shared.tools import CallReader, Piece, ToolUse


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
