"""A completion request: its prompts, and what it asks of the sampler."""

from dataclasses import dataclass

from selfloop.server.openai import wire
from selfloop.server.openai.params import Asked, asked
from selfloop.server.shared.sampling import MAX_TOP_LOGPROBS, within
from selfloop.types.errors import BadRequest

# What OpenAI's route samples by default.
_DEFAULT_MAX_TOKENS = 16
_MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A checked completion request.

    Args:
        texts: the prompts as texts, empty when they are token ids.
        prompts: the prompts as token ids, empty when they are texts.
        num_top: likeliest tokens beside each; None for no logprobs.
        max_tokens: 0 asks for the prompt's own logprobs only.
    """

    texts: list[str]
    prompts: list[list[int]]
    is_list: bool
    asked: Asked
    echo: bool
    num_top: int | None
    max_tokens: int

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own logprobs are computed."""
        return self.echo and (self.num_top is not None or self.max_tokens == 0)

    @property
    def num_sampled(self) -> int:
        """Tokens to sample: the engine samples one even when none is shown."""
        return max(1, self.max_tokens)

    def field_of(self, at: int) -> str:
        return f"prompt[{at}]" if self.is_list else "prompt"


def completion_request(body: wire.CompletionBody) -> CompletionRequest:
    """Raises :class:`BadRequest` for any field that cannot be obeyed."""
    wanted = asked(body)
    texts, prompts, is_list = _prompts(body.prompt)
    if (len(texts) + len(prompts)) * wanted.num_samples > _MAX_CHOICES:
        raise BadRequest("prompt", f"at most {_MAX_CHOICES} prompts times n")
    if body.best_of not in (None, wanted.num_samples):
        raise BadRequest("best_of", f"null, or n = {wanted.num_samples}: all samples are answered")
    if body.logprobs is not None:
        within("logprobs", body.logprobs, 0, MAX_TOP_LOGPROBS)
    echo = bool(body.echo)
    if echo and body.stream and body.logprobs is not None:
        raise BadRequest("echo", "false with stream and logprobs: the prompt's logprobs come with the end")
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens < 1 and not (max_tokens == 0 and echo and not body.stream):
        raise BadRequest("max_tokens", f"a number >= 1, or 0 with echo and without stream; got {max_tokens}")
    return CompletionRequest(texts, prompts, is_list, wanted, echo, body.logprobs, max_tokens)


def _prompts(given: str | list[str | int | list[int]]) -> tuple[list[str], list[list[int]], bool]:
    if isinstance(given, str):
        return [given], [], False
    texts = [one for one in given if isinstance(one, str)]
    ids = [one for one in given if isinstance(one, int)]
    lists = [one for one in given if isinstance(one, list)]
    if not given or len(given) not in (len(texts), len(ids), len(lists)):
        raise BadRequest("prompt", "a string, a list of strings, a list of token ids, or a list of such lists")
    return (texts, [], True) if texts else ([], [ids] if ids else lists, not ids)
