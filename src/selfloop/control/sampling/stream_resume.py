"""Go on with a stream of samples that its worker did not finish."""

from dataclasses import dataclass, field

from selfloop.types.errors import WorkerLost
from selfloop.types.sampling import SampleDelta


@dataclass(slots=True)
class _Grown:
    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    ended: bool = False


class Continuation:
    """Passes deltas on; after :meth:`restart` it holds back what sampling again repeats.

    With a seed, sampling repeats itself, unless rounding in a batch of another shape tips a token over: that is
    noticed at the first token that differs from what was given out.
    """

    def __init__(self) -> None:
        self._given: dict[int, _Grown] = {}
        self._again: dict[int, _Grown] = {}

    def restart(self) -> None:
        """The request is being sampled again from its beginning."""
        self._again = {}

    def fresh(self, delta: SampleDelta) -> SampleDelta | None:
        """What of ``delta`` was not given out before, None when all of it was.

        Raises:
            WorkerLost: what is sampled again differs from what was given out.
        """
        given = self._given.setdefault(delta.index, _Grown())
        again = self._again.setdefault(delta.index, _Grown())
        first, first_text = len(again.tokens), len(again.text)
        again.tokens += delta.tokens
        again.text += delta.text
        again.ended = delta.stop_reason is not None
        _check_same(given, again)
        skip = max(0, len(given.tokens) - first)
        fresh = SampleDelta(
            index=delta.index,
            tokens=delta.tokens[skip:],
            logprobs=delta.logprobs[skip:],
            text=delta.text[max(0, len(given.text) - first_text) :],
            stop_reason=None if given.ended else delta.stop_reason,
            top_logprobs=None if delta.top_logprobs is None else delta.top_logprobs[skip:],
            token_bytes=None if delta.token_bytes is None else delta.token_bytes[skip:],
            stop_string=None if given.ended else delta.stop_string,
            num_cached=delta.num_cached,
        )
        given.tokens += fresh.tokens
        given.text += fresh.text
        given.ended = given.ended or again.ended
        return fresh if fresh.tokens or fresh.text or fresh.stop_reason else None


def _check_same(given: _Grown, again: _Grown) -> None:
    num_tokens, num_characters = (
        min(len(given.tokens), len(again.tokens)),
        min(len(given.text), len(again.text)),
    )
    same = (
        given.tokens[:num_tokens] == again.tokens[:num_tokens]
        and given.text[:num_characters] == again.text[:num_characters]
        and not (given.ended and len(again.tokens) > len(given.tokens))
        and not (again.ended and len(again.tokens) < len(given.tokens))
    )
    if not same:
        raise WorkerLost("the worker died in the middle of this stream, and sampling it again gave another text")
