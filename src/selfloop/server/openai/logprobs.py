"""Logprobs as OpenAI writes them: a list of tokens for chat, parallel lists for completions."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from selfloop.types.sampling import SampleDelta, SampledSequence, TokenLogprob

Grown = SampleDelta | SampledSequence
"""A whole sample, or what one grew by."""


def token_text(raw: bytes) -> str:
    """A token as text; a part of a character as ``bytes:\\xe2\\x82``, so that no two tokens look the same."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(grown: Grown) -> dict[str, object]:
    """``{"content": [...], "refusal": null}`` with an entry for each sampled token, an end token included."""
    assert grown.token_bytes is not None
    tops = grown.top_logprobs if grown.top_logprobs is not None else [[]] * len(grown.tokens)
    content = [
        _entry(raw, logprob) | {"top_logprobs": [_entry(t.raw or b"", t.logprob) for t in top]}
        for raw, logprob, top in zip(grown.token_bytes, grown.logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _entry(raw: bytes, logprob: float) -> dict[str, object]:
    return {"token": token_text(raw), "logprob": logprob, "bytes": list(raw)}


@dataclass(slots=True)
class TextOffsets:
    """Where in the text each token begins, in characters.

    Args:
        skipped: characters at the beginning that tokens stand for and the text does not have.
    """

    skipped: int = 0
    _position: int = 0
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace")
    )

    def next(self, raw: bytes) -> int:
        offset = max(0, self._position - self.skipped)
        self._position += len(self._decoder.decode(raw))
        return offset


def completion_logprobs(grown: Grown, num_top: int, offsets: TextOffsets) -> dict[str, list[object]]:
    """``tokens``, ``token_logprobs``, ``top_logprobs`` (with the sampled token) and ``text_offset``."""
    assert grown.token_bytes is not None
    tops = grown.top_logprobs if grown.top_logprobs is not None else [[]] * len(grown.tokens)
    return {
        "tokens": [token_text(raw) for raw in grown.token_bytes],
        "token_logprobs": list(grown.logprobs),
        "top_logprobs": [
            _by_text(top[:num_top]) | {token_text(raw): logprob}
            for raw, logprob, top in zip(grown.token_bytes, grown.logprobs, tops, strict=True)
        ],
        "text_offset": [offsets.next(raw) for raw in grown.token_bytes],
    }


def prompt_logprobs(
    positions: Sequence[list[TokenLogprob] | None], raws: list[bytes], num_top: int, offsets: TextOffsets
) -> dict[str, list[object]]:
    """The prompt's part in the same shape; nothing precedes the first token, so it has no logprob."""
    return {
        "tokens": [token_text(raw) for raw in raws],
        "token_logprobs": [None if tokens is None else tokens[0].logprob for tokens in positions],
        "top_logprobs": [
            None if tokens is None else _by_text([t for t in tokens if t is tokens[0] or t.rank <= num_top])
            for tokens in positions
        ],
        "text_offset": [offsets.next(raw) for raw in raws],
    }


def joined(first: dict[str, list[object]], second: dict[str, list[object]]) -> dict[str, list[object]]:
    return {name: values + second[name] for name, values in first.items()}


def _by_text(tokens: list[TokenLogprob]) -> dict[str, float]:
    return {token_text(t.raw or b""): t.logprob for t in tokens}
