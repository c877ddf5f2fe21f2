"""When a sample ends, and what of it is text."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from selfloop.types.sampling import SamplingParams

Decode = Callable[[list[int]], str]


class Ending(NamedTuple):
    """Why a sample ended, and its text."""

    reason: Literal["stop", "length"]
    text: str


def ending(
    tokens: list[int], params: SamplingParams, end_tokens: frozenset[int], decode: Decode | None
) -> Ending | None:
    """None while the sample goes on; looked at after each new token."""
    if tokens[-1] in end_tokens or tokens[-1] in params.stop_token_ids:
        return Ending("stop", decode(tokens[:-1]) if decode else "")
    if params.stop:
        assert decode is not None, "stop strings need a decoder"
        text = decode(tokens)
        cut = min((at for at in map(text.find, params.stop) if at >= 0), default=None)
        if cut is not None:
            return Ending("stop", text[:cut])
    if len(tokens) == params.max_tokens:
        return Ending("length", decode(tokens) if decode else "")
    return None
