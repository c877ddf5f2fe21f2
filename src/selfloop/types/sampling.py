"""Sampling requests and results."""

from typing import Literal

import msgspec


class SamplingParams(msgspec.Struct, frozen=True):
    """How to draw tokens.

    Args:
        max_tokens: at most this many new tokens, >= 1.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        top_p: 1 keeps every token.
        seed: reproduces the draw; sample i of a request uses a stream of its own. None draws afresh.
        stop: strings that end a sample; the text stops before, the tokens include the completing one.
        stop_token_ids: tokens that end a sample, besides the model's own end tokens; returned.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []


class AdapterRef(msgspec.Struct, frozen=True):
    """The weights to sample: a sampler checkpoint by id, and where its files lie if it is not in memory."""

    checkpoint_id: str
    path: str


class SampleRequest(msgspec.Struct, frozen=True):
    """Draw ``num_samples`` continuations of ``prompt`` (>= 1 token).

    Args:
        adapter: None samples the base model.
        prompt_logprobs: None for none; k >= 0 for the prompt's own logprobs and the top k beside each.
    """

    request_id: str
    prompt: list[int]
    num_samples: int
    params: SamplingParams
    adapter: AdapterRef | None = None
    prompt_logprobs: int | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, its logprob under the untempered distribution, and its rank there (1 is the likeliest)."""

    token: int
    logprob: float
    rank: int


class SampledSequence(msgspec.Struct, frozen=True):
    """One sample: new tokens (an end token included), their untempered logprobs, and the decoded text."""

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"]
    text: str


class SampleResult(msgspec.Struct, frozen=True):
    """All samples of a request.

    Args:
        prompt_logprobs: when asked for, one list a prompt position: the actual token first, then the
            top k others by rank; None at position 0, which nothing precedes.
    """

    request_id: str
    sequences: list[SampledSequence]
    prompt_logprobs: list[list[TokenLogprob] | None] | None = None
