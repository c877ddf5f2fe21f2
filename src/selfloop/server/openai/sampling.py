"""From a decoded request and who serves it to the answer, whole or as events."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.samplers import Sampler
from selfloop.control.sampling.service import Draw, Weights
from selfloop.server.openai import wire
from selfloop.server.openai.answers import ChatChoice, CompletionChoice, Echo, Head, Json, usage
from selfloop.server.openai.chat import chat_request
from selfloop.server.openai.completions import CompletionRequest, completion_request
from selfloop.server.openai.errors import ERRORS
from selfloop.server.openai.params import Asked, draw_of
from selfloop.server.shared.body import off_loop
from selfloop.server.shared.connection import EventStream, while_connected
from selfloop.server.shared.events import DONE, frame, merged
from selfloop.server.shared.sampling import POLICY_VERSION_HEADER, room_for, weights_of, within
from selfloop.server.shared.served_models import Target
from selfloop.types.errors import BadRequest, SelfloopError
from selfloop.types.sampling import SampleDelta, SampleResult

T = TypeVar("T")
Grow = Callable[[int, SampleDelta], Json | None]

# A token with its logprob and its bytes as JSON.
_TOKEN_BYTES = 100


async def chat_answer(
    request: Request, body: wire.ChatBody, target: Target, caller: Caller, control: Control
) -> Response:
    """The answer to a conversation, whole or streamed."""
    sampler = target.sampler
    asked = chat_request(body, await while_connected(request, control.sampling.chat_template(sampler)))
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    prompt = await while_connected(request, control.sampling.render_chat(sampler, asked.chat))
    max_tokens = checked_max_tokens(asked.max_tokens, asked.max_tokens_field, prompt, "messages", sampler)
    draw = draw_of(
        body,
        prompt,
        asked.asked,
        max_tokens,
        top_logprobs=asked.top_logprobs or 0,
        token_bytes=asked.top_logprobs is not None,
    )
    choices = [
        ChatChoice(i, asked.tools, asked.top_logprobs is not None, bool(body.return_token_ids))
        for i in range(draw.num_samples)
    ]
    head = Head.new("chatcmpl", body.model)
    prompt_ids: Json = {"prompt_token_ids": prompt} if body.return_token_ids else {}
    if body.stream:
        opening = [choice.opening() for choice in choices]
        render = _Chunks(head, "chat.completion.chunk", body.stream_options, prompt_ids)
        return await _streamed(
            request, sampler, control, weights, [draw], asked.asked, render, opening, lambda i, d: choices[i].grown(d)
        )
    (result,) = await _drawn(request, sampler, control, weights, [draw], asked.asked)

    def rendered() -> bytes:
        whole = [choice.whole(sequence) for choice, sequence in zip(choices, result.sequences, strict=True)]
        used = usage(len(prompt), result.num_cached, _num_drawn([result]))
        return msgspec.json.encode(head.render("chat.completion", whole, used) | prompt_ids)

    return await _answer(rendered, [result], draw, weights)


async def completion_answer(
    request: Request, body: wire.CompletionBody, target: Target, caller: Caller, control: Control
) -> Response:
    """Texts or token ids continued, whole or streamed."""
    sampler = target.sampler
    asked = completion_request(body)
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    prompts = await while_connected(request, _prompts(asked, body, sampler, control))
    for at, prompt in enumerate(prompts):
        checked_max_tokens(
            asked.num_drawn, "max_tokens", prompt, asked.field_of(at), sampler, scored=asked.scores_prompt
        )
    echoes = await while_connected(request, _echoes(asked, prompts, sampler, control))
    draws = [
        draw_of(
            body,
            prompt,
            asked.asked,
            asked.num_drawn,
            top_logprobs=asked.num_top or 0,
            prompt_logprobs=(asked.num_top or 0) if asked.scores_prompt else None,
            token_bytes=asked.num_top is not None,
        )
        for prompt in prompts
    ]
    n = asked.asked.num_samples
    choices = [
        CompletionChoice(at * n + i, asked.num_top, bool(body.return_token_ids), echo, asked.max_tokens > 0)
        for at, echo in enumerate(echoes)
        for i in range(n)
    ]
    head = Head.new("cmpl", body.model)
    if body.stream:
        opening = [chunk for choice in choices if (chunk := choice.opening()) is not None]
        render = _Chunks(head, "text_completion", body.stream_options, {})
        return await _streamed(
            request, sampler, control, weights, draws, asked.asked, render, opening, lambda i, d: choices[i].grown(d)
        )
    results = await _drawn(request, sampler, control, weights, draws, asked.asked)

    def rendered() -> bytes:
        whole: list[Json] = []
        for choice in choices:
            at, i = divmod(choice.index, n)
            ids: Json = {"prompt_token_ids": prompts[at]} if body.return_token_ids else {}
            whole.append(choice.whole(results[at].sequences[i], results[at]) | ids)
        num_drawn = _num_drawn(results) if asked.max_tokens > 0 else 0
        used = usage(sum(map(len, prompts)), _num_cached(results), num_drawn)
        return msgspec.json.encode(head.render("text_completion", whole, used))

    return await _answer(rendered, results, draws[0], weights)


async def _prompts(
    asked: CompletionRequest, body: wire.CompletionBody, sampler: Sampler, control: Control
) -> Sequence[list[int]]:
    if not asked.texts:
        return asked.prompts
    return await control.sampling.tokenize(sampler, asked.texts, add_special_tokens=body.add_special_tokens)


async def _echoes(
    asked: CompletionRequest, prompts: Sequence[list[int]], sampler: Sampler, control: Control
) -> list[Echo | None]:
    if not asked.echo:
        return [None] * len(prompts)
    echoes: list[Echo | None] = []
    for at, prompt in enumerate(prompts):
        raws = await control.sampling.token_bytes(sampler, prompt)
        text = asked.texts[at] if asked.texts else b"".join(raws).decode(errors="replace")
        echoes.append(Echo(text, raws))
    return echoes


def checked_max_tokens(
    given: int | None, field: str, prompt: list[int], where: str, sampler: Sampler, *, scored: bool = False
) -> int:
    """``given``, or all the room after the prompt. Raises :class:`BadRequest` where there is too little."""
    room = room_for(prompt, where, sampler.max_seq_len, scored=scored)
    max_tokens = room if given is None else given
    within(field, max_tokens, 1, room)
    return max_tokens


async def _drawn(
    request: Request, sampler: Sampler, control: Control, weights: Weights, draws: Sequence[Draw], asked: Asked
) -> list[SampleResult]:
    try:
        work = [control.sampling.draw(sampler, weights, draw) for draw in draws]
        return await while_connected(request, _all(work))
    except BadRequest as error:
        raise as_asked(error, asked) from None


async def _all(work: Sequence[Awaitable[T]]) -> list[T]:
    """All results in order; the first error ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def as_asked(error: BadRequest, asked: Asked) -> BadRequest:
    """A refused constraint under the name of the field that gave it."""
    is_constraint = error.field.startswith("structured_outputs") and asked.structured_by
    return BadRequest(asked.structured_by, error.expected) if is_constraint else error


def _num_drawn(results: Sequence[SampleResult]) -> int:
    return sum(len(sequence.tokens) for result in results for sequence in result.sequences)


def _num_cached(results: Sequence[SampleResult]) -> int:
    return sum(result.num_cached for result in results)


async def _answer(
    rendered: Callable[[], bytes], results: Sequence[SampleResult], draw: Draw, weights: Weights
) -> Response:
    per_token = _TOKEN_BYTES * (1 + draw.top_logprobs) if draw.token_bytes else 1
    content = await off_loop(_num_drawn(results) * per_token, rendered)
    headers = {POLICY_VERSION_HEADER: str(weights.policy_version)}
    return Response(content, media_type="application/json", headers=headers)


class _Chunks:
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

    def usage(self, num_prompt: int, num_cached: int, num_drawn: int) -> bytes:
        return frame(self._head.render(self._kind, [], usage(num_prompt, num_cached, num_drawn)))


async def _streamed(
    request: Request,
    sampler: Sampler,
    control: Control,
    weights: Weights,
    draws: Sequence[Draw],
    asked: Asked,
    chunks: _Chunks,
    opening: Sequence[Json],
    grow: Grow,
) -> Response:
    """The answer as events; an error before the first of them is an ordinary answer."""
    source = merged([control.sampling.stream(sampler, weights, draw) for draw in draws])

    async def first() -> tuple[int, Any]:
        return await anext(source)

    async def frames() -> AsyncGenerator[bytes]:
        for choice in opening:
            yield chunks.choice(choice)
        num_drawn = num_cached = 0
        event = head
        try:
            while True:
                at, part = event
                if isinstance(part, SampleResult):
                    num_drawn += _num_drawn([part])
                    num_cached += part.num_cached
                elif (choice := grow(at * asked.num_samples + part.index, part)) is not None:
                    yield chunks.choice(choice)
                event = await anext(source, None)
                if event is None:
                    break
        except SelfloopError as error:
            yield frame(ERRORS.body(as_asked(error, asked) if isinstance(error, BadRequest) else error))
            return
        if chunks.with_usage:
            yield chunks.usage(sum(len(draw.prompt) for draw in draws), num_cached, num_drawn)
        yield DONE

    try:
        head = await while_connected(request, first())
    except BadRequest as error:
        raise as_asked(error, asked) from None
    headers = {POLICY_VERSION_HEADER: str(weights.policy_version)}
    return EventStream(frames(), source, headers)
