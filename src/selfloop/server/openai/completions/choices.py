"""One choice of a completion, whole or in pieces; a whole answer is made of the same pieces as a stream."""

from dataclasses import dataclass, field

from selfloop.server.openai.logprobs import Grown, TextOffsets, completion_logprobs, joined, prompt_logprobs
from selfloop.server.openai.sampling import Json
from selfloop.types.sampling import SampleResult


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
        shows_sample: whether the sample is shown, or only the prompt.
    """

    index: int
    num_top: int | None
    with_ids: bool
    echo: Echo | None = None
    shows_sample: bool = True
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
        if self.shows_sample:
            text, tokens, reason = grown.text, grown.tokens, grown.stop_reason
            if self.num_top is not None:
                sampled = completion_logprobs(grown, self.num_top, self._offsets)
                logprobs = sampled if logprobs is None else joined(logprobs, sampled)
        return self._chunk(before + text, logprobs, reason, tokens)

    def _chunk(
        self, text: str, logprobs: dict[str, list[object]] | None, finish_reason: str | None, tokens: list[int]
    ) -> Json:
        chunk: Json = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return chunk | ({"token_ids": tokens} if self.with_ids else {})
