"""Sampling requests and results."""

from typing import Literal

import msgspec

from selfloop.types.blob_ref import BlobRef
from selfloop.types.images import Image
from selfloop.types.result import Spent
from selfloop.types.routes import SampledRoutes


class StructuredOutput(msgspec.Struct, frozen=True):
    """What the text of every sample must match.

    Args:
        kind: how to read ``spec``.
        spec: a JSON schema, a regular expression, a JSON list of strings (``choice``) or a grammar
            (Lark or GBNF); ``{}`` with ``json_schema`` is any JSON.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    spec: str


class SamplingParams(msgspec.Struct, frozen=True):
    """How to sample tokens.

    Args:
        max_tokens: at most this many new tokens, >= 1.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        top_p: 1 keeps every token.
        seed: reproduces the samples; sample i of a request uses a stream of its own. None picks a new one.
        stop: strings that end a sample; the text stops before, the tokens include the completing one.
        stop_token_ids: tokens that end a sample, besides the model's own end tokens; returned.
        structured: what the sampled text must match; None for anything.
        use_end_tokens: whether the model's own end tokens end a sample.
        min_p: drops tokens less likely than this part of the likeliest one, at the temperature; 0 keeps every token.
        frequency_penalty: subtracted from a token's logit for each time that it is in the sample.
        presence_penalty: subtracted from the logit of a token that is in the sample.
        repetition_penalty: divides the logit above 0, and multiplies that below, of a token that the prompt has or
            that was sampled; 1 changes nothing.
        logit_bias: added to the logits of these tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    structured: StructuredOutput | None = None
    use_end_tokens: bool = True
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}


class AdapterRef(msgspec.Struct, frozen=True):
    """The weights to sample: a sampler checkpoint by id, and its folder if it may not be in memory."""

    checkpoint_id: str
    folder: BlobRef | None = None


class PromptTargets(msgspec.Struct, frozen=True):
    """Tokens to score at every prompt position but the first, row after row.

    Args:
        rows: int64, one a prompt token: ``tokens[rows[i] : rows[i + 1]]`` are scored at position i + 1.
        tokens: int32 ids; -1 asks for nothing.
    """

    rows: bytes
    tokens: bytes


class PromptDraws(msgspec.Struct, frozen=True):
    """Sampled alternatives to the prompt's tokens but the first, (N - 1, k) row-major: int32 ids, float32 logprobs."""

    tokens: bytes
    logprobs: bytes


class SampleRequest(msgspec.Struct, frozen=True):
    """Sample ``num_samples`` continuations of ``prompt`` (>= 1 token).

    Args:
        adapter: None samples the base model.
        prompt_logprobs: None for none; k >= 0 for the prompt's own logprobs and the top k beside each.
        top_logprobs: the k likeliest tokens beside each sampled one, 0 for none.
        token_bytes: whether the answer also contains each token's bytes.
        prompt_logprobs_last_n: only the prompt's last n positions are asked for by ``prompt_logprobs``; None for all.
        prompt_targets: tokens to score along the prompt.
        prompt_draws: how many alternatives to sample, independently and at the temperature, for each prompt token.
        routes: whether the answer also contains which experts each token went to.
        images: in the order of their placeholders, which are among the prompt's tokens.
    """

    request_id: str
    prompt: list[int]
    num_samples: int
    params: SamplingParams
    adapter: AdapterRef | None = None
    prompt_logprobs: int | None = None
    top_logprobs: int = 0
    token_bytes: bool = False
    prompt_logprobs_last_n: int | None = None
    prompt_targets: PromptTargets | None = None
    prompt_draws: int = 0
    routes: bool = False
    images: list[Image] = []

    @property
    def asks_about_prompt(self) -> bool:
        return self.prompt_logprobs is not None or self.prompt_targets is not None or self.prompt_draws > 0


def room_after(num_prompt: int, context: int, *, scored: bool) -> int:
    """How many tokens may be sampled after a prompt; below 1 where none may.

    A prompt that is ``scored``, as every request about its own tokens is, may fill the context: the one token that
    ends such a request comes out of the prompt's last position, and never goes through the model itself.
    """
    return 1 if scored and num_prompt == context else context - num_prompt


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token, its logprob under the untempered distribution, and its rank there (1 is the likeliest).

    ``raw`` is the token's bytes, where the request asked for them.
    """

    token: int
    logprob: float
    rank: int
    raw: bytes | None = None


class SampledSequence(msgspec.Struct, frozen=True):
    """One sample: new tokens (an end token included), their untempered logprobs, and the decoded text.

    Args:
        top_logprobs: when asked for, the likeliest tokens at each position, the likeliest first.
        token_bytes: when asked for, each token's bytes.
        stop_string: the stop string that ended it; None where something else did.
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: Literal["stop", "length"]
    text: str
    top_logprobs: list[list[TokenLogprob]] | None = None
    token_bytes: list[bytes] | None = None
    stop_string: str | None = None


class SampleDelta(msgspec.Struct, frozen=True):
    """What sample ``index`` grew by; the deltas of a sample add up to its :class:`SampledSequence`.

    Args:
        text: new text; a part that may yet become a stop string, or an unfinished character, is held back.
        stop_reason: of the last delta only, as ``stop_string``.
        num_cached: tokens of the request's prompt that were in the cache already.
    """

    index: int
    tokens: list[int]
    logprobs: list[float]
    text: str
    stop_reason: Literal["stop", "length"] | None = None
    top_logprobs: list[list[TokenLogprob]] | None = None
    token_bytes: list[bytes] | None = None
    stop_string: str | None = None
    num_cached: int = 0


class SampleResult(msgspec.Struct, frozen=True):
    """All samples of a request.

    Args:
        prompt_logprobs: when asked for, one list a prompt position: the actual token first, then the
            top k others by rank; None at position 0, which nothing precedes, and before the last n asked for.
        target_logprobs: float32 in the order of the tokens asked for, 0.0 for each -1.
        num_cached: tokens of the prompt that were in the cache already.
        routes: where asked for.
    """

    request_id: str
    sequences: list[SampledSequence]
    prompt_logprobs: list[list[TokenLogprob] | None] | None = None
    spent: Spent = Spent()
    target_logprobs: bytes | None = None
    prompt_draws: PromptDraws | None = None
    num_cached: int = 0
    routes: SampledRoutes | None = None
