"""From a decoded request of the Responses API and who serves it to the answer, whole or as events."""

from collections.abc import AsyncGenerator

import msgspec
from fastapi import Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.openai.chat.request import ChatRequest, chat_request
from selfloop.server.openai.params import spec_of
from selfloop.server.openai.responses import wire
from selfloop.server.openai.responses.events import ResponseAnswer
from selfloop.server.openai.responses.request import Conversation, chat_of
from selfloop.server.openai.sampling import as_asked, checked_max_tokens
from selfloop.server.shared.body import num_received, off_loop
from selfloop.server.shared.connection import EventStream, while_connected
from selfloop.server.shared.sampling import POLICY_VERSION_HEADER, weights_of
from selfloop.server.shared.served_models import Target
from selfloop.types.errors import BadRequest, SelfloopError
from selfloop.types.sampling import SampleDelta, SampleResult

_Parts = AsyncGenerator[SampleDelta | SampleResult]


async def responses_answer(
    request: Request, body: wire.ResponsesBody, target: Target, caller: Caller, control: Control
) -> Response:
    """The response to an input, whole or streamed; it is not kept."""
    sampler = target.sampler
    chat, conversation = chat_of(body)
    facts = await while_connected(request, control.sampling.chat_facts(sampler))
    with conversation.named():
        asked = await off_loop(num_received(request), lambda: chat_request(chat, facts.template, facts.vision))
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    with conversation.named():
        prompt, images = await while_connected(request, control.sampling.render_chat(sampler, asked.chat))
        max_tokens = checked_max_tokens(asked.max_tokens, asked.max_tokens_field, prompt, "messages", sampler)
        spec = spec_of(chat, prompt, asked.asked, max_tokens, images=images)
    answer = ResponseAnswer(body, len(prompt), asked.tools)
    headers = {POLICY_VERSION_HEADER: str(weights.policy_version)}
    try:
        if body.stream:
            parts: _Parts = control.sampling.stream(sampler, weights, spec)
            head = await while_connected(request, _first(parts))
            return EventStream(_frames(answer, head, parts, asked, conversation), parts, headers)
        result = await while_connected(request, control.sampling.sample(sampler, weights, spec))
    except BadRequest as error:
        raise _named(error, asked, conversation) from None
    (sequence,) = result.sequences
    content = await off_loop(
        len(sequence.tokens), lambda: msgspec.json.encode(answer.whole(sequence, result.num_cached))
    )
    return Response(content, media_type="application/json", headers=headers)


async def _first(parts: _Parts) -> SampleDelta | SampleResult:
    return await anext(parts)


async def _frames(
    answer: ResponseAnswer,
    head: SampleDelta | SampleResult,
    parts: _Parts,
    asked: ChatRequest,
    conversation: Conversation,
) -> AsyncGenerator[bytes]:
    for event in answer.opening(head.num_cached):
        yield event
    part: SampleDelta | SampleResult | None = head
    try:
        while part is not None:
            if isinstance(part, SampleDelta):
                for event in answer.grown(part):
                    yield event
            part = await anext(parts, None)
    except SelfloopError as error:
        shown = _named(error, asked, conversation) if isinstance(error, BadRequest) else error
        yield answer.error(shown)


def _named(error: BadRequest, asked: ChatRequest, conversation: Conversation) -> BadRequest:
    meant = as_asked(error, asked.asked)
    return BadRequest(conversation.field_of(meant.field), meant.expected, reason=meant.reason)
