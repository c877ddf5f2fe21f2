"""The whole server as an Anthropic server: below ``/anthropic/api``."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Annotated, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.sampling.service import SampleSpec, Weights
from selfloop.server.anthropic import wire
from selfloop.server.anthropic.answers import Answer
from selfloop.server.anthropic.errors import ERRORS
from selfloop.server.anthropic.request import Prompt, prompt_of, spec_of
from selfloop.server.shared import served_models
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import num_received, off_loop, read_body
from selfloop.server.shared.connection import EventStream, while_connected
from selfloop.server.shared.decode import decode
from selfloop.server.shared.events import frame
from selfloop.server.shared.sampling import POLICY_VERSION_HEADER, refuse_idempotency_key, weights_of
from selfloop.server.shared.served_models import target_of
from selfloop.types.errors import BadRequest, SelfloopError
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SampleDelta, SampleResult

# Sent by the client's methods for betas, which are the same routes; what a beta adds to a body is refused by its name.
Beta = Annotated[bool, Query(include_in_schema=False)]
B = TypeVar("B", bound=wire.PromptBody)
_Parts = AsyncGenerator[SampleDelta | SampleResult]

router = APIRouter(
    prefix="/anthropic/api/v1",
    tags=["anthropic"],
    responses={"4XX": wire.SCHEMAS.json_answer(wire.Failure, "Refused, or not yet")},
)


@router.get("/models")
async def models(
    caller: CallerOf,
    control: ControlOf,
    after_id: str | None = None,
    before_id: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    beta: Beta = False,
) -> dict[str, object]:
    """The base models, and the team's newest checkpoints for samplers, a page at a time."""
    found = await served_models.listed(caller, control)
    if after_id is not None and before_id is not None:
        raise BadRequest("before_id", "none when after_id is given")
    start = 0 if after_id is None else 1 + _place(found, after_id, "after_id")
    stop = len(found) if before_id is None else _place(found, before_id, "before_id")
    if before_id is not None:
        start = max(0, stop - limit)
    page = found[start:stop][:limit]
    return {
        "data": [_model(one.id, one.created_at) for one in page],
        "has_more": start > 0 if before_id is not None else start + len(page) < stop,
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
    }


@router.get("/models/{model:path}")
async def model(model: str, caller: CallerOf, control: ControlOf, beta: Beta = False) -> dict[str, object]:
    """One model by a name that requests may give."""
    return _model(model, (await served_models.named(model, caller, control)).created_at)


def _place(found: list[served_models.Listed], id: str, field: str) -> int:
    """Where a listed model stands. Raises :class:`BadRequest`."""
    for place, one in enumerate(found):
        if one.id == id:
            return place
    raise BadRequest(field, f"the id of a listed model, got {id[:200]!r}")


def _model(id: str, created_at: float) -> dict[str, object]:
    stamp = datetime.fromtimestamp(created_at, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": id, "display_name": id, "created_at": stamp}


@router.post("/messages", openapi_extra=wire.SCHEMAS.json_body(wire.MessagesBody))
async def messages(request: Request, caller: CallerOf, control: ControlOf, beta: Beta = False) -> Response:
    """Answer a conversation in the model's own chat template, whole or streamed."""
    body = await _body(request, wire.MessagesBody)
    target = await target_of(request, body.model, caller, control)
    sampler = target.sampler
    prompt = await _prompt(request, body, sampler, control)
    weights = await while_connected(request, weights_of(request, sampler, caller, control, target.pinned))
    try:
        tokens, images = await while_connected(request, control.sampling.render_chat(sampler, prompt.chat))
    except BadRequest as error:
        raise prompt.as_asked(error) from None
    spec = spec_of(body, tokens, prompt, sampler.max_seq_len, images)
    is_cut = spec.params.max_tokens < body.max_tokens
    answer = Answer(body.model, len(tokens), prompt.tools, body.stop_sequences or [], is_cut)
    try:
        if body.stream:
            return await _streamed(request, sampler, control, weights, spec, answer, prompt.structured_by)
        result = await while_connected(request, control.sampling.sample(sampler, weights, spec))
    except BadRequest as error:
        raise _as_asked(error, prompt.structured_by) from None
    (sequence,) = result.sequences
    content = await off_loop(
        len(sequence.tokens), lambda: msgspec.json.encode(answer.whole(sequence, result.num_cached))
    )
    return Response(content, media_type="application/json", headers=_headers(weights))


@router.post("/messages/count_tokens", openapi_extra=wire.SCHEMAS.json_body(wire.PromptBody))
async def count_tokens(request: Request, caller: CallerOf, control: ControlOf, beta: Beta = False) -> dict[str, int]:
    """How many tokens the conversation is in the model's own chat template."""
    body = await _body(request, wire.PromptBody)
    target = await target_of(request, body.model, caller, control)
    prompt = await _prompt(request, body, target.sampler, control)
    try:
        return {
            "input_tokens": await while_connected(request, control.sampling.count_chat(target.sampler, prompt.chat))
        }
    except BadRequest as error:
        raise prompt.as_asked(error) from None


async def _body(request: Request, kind: type[B]) -> B:
    refuse_idempotency_key(request)
    raw = await read_body(request)
    return await off_loop(len(raw), lambda: decode(raw, kind))


async def _prompt(request: Request, body: wire.PromptBody, sampler: Sampler, control: Control) -> Prompt:
    facts = await while_connected(request, control.sampling.chat_facts(sampler))
    return await off_loop(num_received(request), lambda: prompt_of(body, facts.template, facts.vision))


def _as_asked(error: BadRequest, field: str) -> BadRequest:
    """A refused constraint under the name of the field that gave it."""
    return BadRequest(field, error.expected) if error.field.startswith("structured_outputs") else error


def _headers(weights: Weights) -> dict[str, str]:
    return {POLICY_VERSION_HEADER: str(weights.policy_version)}


async def _streamed(
    request: Request,
    sampler: Sampler,
    control: Control,
    weights: Weights,
    spec: SampleSpec,
    answer: Answer,
    structured_by: str,
) -> Response:
    """The answer as events; an error before the first of them is an ordinary answer."""
    source: _Parts = control.sampling.stream(sampler, weights, spec)

    async def first() -> SampleDelta | SampleResult:
        return await anext(source)

    async def frames() -> AsyncGenerator[bytes]:
        for event in answer.opening(head.num_cached):
            yield event
        part: SampleDelta | SampleResult | None = head
        try:
            while part is not None:
                if isinstance(part, SampleDelta):
                    for event in answer.grown(part):
                        yield event
                part = await anext(source, None)
        except SelfloopError as error:
            shown = _as_asked(error, structured_by) if isinstance(error, BadRequest) else error
            yield frame(ERRORS.body(shown), "error")

    head = await while_connected(request, first())
    return EventStream(frames(), source, _headers(weights))
