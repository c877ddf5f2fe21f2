"""From what is to be sampled to the answer, whole or as events, for chats and completions."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from fastapi import Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.sampling.service import SampleSpec, Weights
from selfloop.server.openai import wire
from selfloop.server.openai.errors import ERRORS
from selfloop.server.openai.params import Asked
from selfloop.server.shared.body import off_loop
from selfloop.server.shared.connection import EventStream, while_connected
from selfloop.server.shared.events import DONE, frame, merged
from selfloop.server.shared.sampling import POLICY_VERSION_HEADER, room_for, within
from selfloop.types.errors import BadRequest, SelfloopError
from selfloop.types.ids import new_id
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SampleDelta, SampleResult

T = TypeVar("T")
Json = dict[str, object]
Grow = Callable[[int, SampleDelta], Json | None]

# A token with its logprob and its bytes as JSON.
_TOKEN_BYTES = 100


class Head(NamedTuple):
    """What every chunk of an answer repeats."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> "Head":
        return cls(f"{prefix}-{new_id()}{new_id()}{new_id()}", int(time.time()), model)

    def render(self, kind: str, choices: list[Json], usage: Json | None) -> Json:
        head: Json = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices, "usage": usage}


def usage(num_prompt: int, num_cached: int, num_sampled: int) -> Json:
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_sampled,
        "total_tokens": num_prompt + num_sampled,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


class Chunks:
    """Renders the events of one stream."""

    def __init__(self, head: Head, kind: str, options: wire.StreamOptions | None, first: Json) -> None:
        self._head = head
        self._kind = kind
        self._first: Json = first
        self.with_usage = options is not None and bool(options.include_usage)

    def choice(self, choice: Json) -> bytes:
        rendered = self._head.render(self._kind, [choice], None) | self._first
        self._first = {}
        if not self.with_usage:
            del rendered["usage"]
        return frame(rendered)

    def usage(self, num_prompt: int, num_cached: int, num_sampled: int) -> bytes:
        return frame(self._head.render(self._kind, [], usage(num_prompt, num_cached, num_sampled)))


@dataclass(frozen=True, slots=True)
class Sampling:
    """What one request has sampled: a :class:`SampleSpec` for each of its prompts, all with the same weights."""

    request: Request
    sampler: Sampler
    control: Control
    weights: Weights
    specs: Sequence[SampleSpec]
    asked: Asked

    async def results(self) -> list[SampleResult]:
        """One a spec. Raises what sampling raises, under the request's own names of fields."""
        try:
            work = [self.control.sampling.sample(self.sampler, self.weights, spec) for spec in self.specs]
            return await while_connected(self.request, _all(work))
        except BadRequest as error:
            raise as_asked(error, self.asked) from None

    async def answer(self, rendered: Callable[[], bytes], results: Sequence[SampleResult]) -> Response:
        """The whole answer; a large one is ``rendered`` beside the event loop."""
        spec = self.specs[0]
        per_token = _TOKEN_BYTES * (1 + spec.top_logprobs) if spec.token_bytes else 1
        content = await off_loop(num_sampled(results) * per_token, rendered)
        return Response(content, media_type="application/json", headers=self._headers)

    async def stream(self, chunks: Chunks, opening: Sequence[Json], grow: Grow) -> Response:
        """The answer as events; an error before the first of them is an ordinary answer.

        Args:
            opening: chunks that come before anything is sampled.
            grow: the chunk of a choice, by its index, that grew.
        """
        source = merged([self.control.sampling.stream(self.sampler, self.weights, spec) for spec in self.specs])

        async def first() -> tuple[int, Any]:
            return await anext(source)

        async def frames() -> AsyncGenerator[bytes]:
            for choice in opening:
                yield chunks.choice(choice)
            used = cached = 0
            event = head
            try:
                while event is not None:
                    at, part = event
                    if isinstance(part, SampleResult):
                        used += num_sampled([part])
                        cached += part.num_cached
                    elif (choice := grow(at * self.asked.num_samples + part.index, part)) is not None:
                        yield chunks.choice(choice)
                    event = await anext(source, None)
            except SelfloopError as error:
                yield frame(ERRORS.body(as_asked(error, self.asked) if isinstance(error, BadRequest) else error))
                return
            if chunks.with_usage:
                yield chunks.usage(sum(len(spec.prompt) for spec in self.specs), cached, used)
            yield DONE

        try:
            head = await while_connected(self.request, first())
        except BadRequest as error:
            raise as_asked(error, self.asked) from None
        return EventStream(frames(), source, self._headers)

    @property
    def _headers(self) -> dict[str, str]:
        return {POLICY_VERSION_HEADER: str(self.weights.policy_version)}


def checked_max_tokens(
    given: int | None, field: str, prompt: list[int], where: str, sampler: Sampler, *, scored: bool = False
) -> int:
    """``given``, or all the room after the prompt. Raises :class:`BadRequest` where there is too little."""
    room = room_for(prompt, where, sampler.max_seq_len, scored=scored)
    max_tokens = room if given is None else given
    within(field, max_tokens, 1, room)
    return max_tokens


def as_asked(error: BadRequest, asked: Asked) -> BadRequest:
    """A refused constraint under the name of the field that gave it."""
    is_constraint = error.field.startswith("structured_outputs") and asked.structured_by
    return BadRequest(asked.structured_by, error.expected) if is_constraint else error


def num_sampled(results: Sequence[SampleResult]) -> int:
    """Tokens in all of ``results``."""
    return sum(len(sequence.tokens) for result in results for sequence in result.sequences)


async def _all(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first error ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
