"""An OpenAI server: each sampler below its ``base_url`` + ``/v1``, and the whole server below ``/oai/api/v1``."""

from typing import TypeVar

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from selfloop.control.gateway import Control
from selfloop.control.resources.access import Caller
from selfloop.server.openai import tokens, wire
from selfloop.server.openai.chat.answer import chat_answer
from selfloop.server.openai.completions.answer import completion_answer
from selfloop.server.openai.models import entry, listed, pinned_by
from selfloop.server.openai.responses import wire as responses_wire
from selfloop.server.openai.responses.answer import responses_answer
from selfloop.server.shared import served_models
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.shared.dialect import Mount
from selfloop.server.shared.sampling import SamplerOf, check_identity, refuse_idempotency_key
from selfloop.server.shared.served_models import Target, target_of
from selfloop.types.errors import BadRequest
from selfloop.types.resources import Sampler

B = TypeVar("B", bound=msgspec.Struct)

_SAMPLER = "/loops/samplers/{sampler_id}"
_ERRORS = {"4XX": wire.SCHEMAS.json_answer(wire.ErrorAnswer, "Refused, or not yet")}

router = APIRouter(prefix="/v1", tags=["openai"], responses={**_ERRORS})
beside = APIRouter(tags=["openai"], responses={**_ERRORS})
whole = APIRouter(prefix="/oai/api", tags=["openai"], responses={**_ERRORS})


# Each sampler also below ``/sync``, where the hosted service has them.
MOUNTS = (
    Mount(router, _SAMPLER),
    Mount(beside, _SAMPLER),
    Mount(router, f"{_SAMPLER}/sync", in_schema=False),
    Mount(whole),
)


# -- a sampler --------------------------------------------------------------------------------------------


@router.get("/models")
async def models(sampler: SamplerOf, control: ControlOf) -> dict[str, object]:
    """The base model, and the adapter that is live on it."""
    return {"object": "list", "data": await listed(sampler, control)}


@router.get("/models/{model:path}")
async def model(model: str, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """One model that the sampler answers to: its base model, or a checkpoint's ``bt://`` path."""
    is_adapter = await pinned_by(model, sampler, caller, control) is not None
    return entry(model, sampler.created_at, sampler.base_model if is_adapter else None)


@router.post("/chat/completions", openapi_extra=wire.SCHEMAS.json_body(wire.ChatBody))
async def chat_completions(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> Response:
    """Answer a conversation in the model's own chat template, whole or streamed."""
    body = await _body(request, wire.ChatBody)
    target = await _target(request, body.model, sampler, caller, control)
    return await chat_answer(request, body, target, caller, control)


@router.post("/completions", openapi_extra=wire.SCHEMAS.json_body(wire.CompletionBody))
async def completions(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> Response:
    """Continue texts or token ids, whole or streamed."""
    body = await _body(request, wire.CompletionBody)
    target = await _target(request, body.model, sampler, caller, control)
    return await completion_answer(request, body, target, caller, control)


@router.post("/responses", openapi_extra=wire.SCHEMAS.json_body(responses_wire.ResponsesBody))
async def responses(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> Response:
    """Answer an input as a response that is not kept, whole or streamed."""
    body = await _body(request, responses_wire.ResponsesBody)
    target = await _target(request, body.model, sampler, caller, control)
    return await responses_answer(request, body, target, caller, control)


@beside.post("/tokenize", openapi_extra=wire.SCHEMAS.json_body(wire.TokenizeBody))
async def tokenize(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The tokens of a prompt, or of messages in the model's own chat template."""
    body = await _body(request, wire.TokenizeBody)
    target = await _target(request, sampler.base_model if body.model is None else body.model, sampler, caller, control)
    return await tokens.tokenized(request, body, target.sampler, control)


@beside.post("/detokenize", openapi_extra=wire.SCHEMAS.json_body(wire.DetokenizeBody))
async def detokenize(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The text of tokens."""
    body = await _body(request, wire.DetokenizeBody)
    target = await _target(request, sampler.base_model if body.model is None else body.model, sampler, caller, control)
    return await tokens.detokenized(request, body, target.sampler, control)


@beside.get("/tokenizer_info")
async def tokenizer_info(sampler: SamplerOf, control: ControlOf) -> dict[str, object]:
    """The tokenizer's configuration."""
    return await tokens.tokenizer_info(sampler.base_model, control)


async def _target(request: Request, model: str, sampler: Sampler, caller: Caller, control: Control) -> Target:
    """The sampler with what the request's model pins, once the request is known to be meant for it."""
    control.samplers.check_live(sampler)
    check_identity(request, sampler)
    return Target(sampler, await pinned_by(model, sampler, caller, control))


# -- the whole server -------------------------------------------------------------------------------------


@whole.get("/v1/models")
async def server_models(caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The base models, and the team's newest checkpoints for samplers."""
    found = await served_models.listed(caller, control)
    return {"object": "list", "data": [entry(model.id, model.created_at, model.parent) for model in found]}


@whole.get("/v1/models/{model:path}")
async def server_model(model: str, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """One model by a name that requests may give."""
    meant = await served_models.named(model, caller, control)
    return entry(model, meant.created_at, None if meant.path is None else meant.base_model)


@whole.post("/v1/chat/completions", openapi_extra=wire.SCHEMAS.json_body(wire.ChatBody))
async def server_chat_completions(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """Answer a conversation with a base model or a checkpoint, whole or streamed."""
    body = await _body(request, wire.ChatBody)
    return await chat_answer(request, body, await target_of(request, body.model, caller, control), caller, control)


@whole.post("/v1/completions", openapi_extra=wire.SCHEMAS.json_body(wire.CompletionBody))
async def server_completions(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """Continue texts or token ids with a base model or a checkpoint, whole or streamed."""
    body = await _body(request, wire.CompletionBody)
    target = await target_of(request, body.model, caller, control)
    return await completion_answer(request, body, target, caller, control)


@whole.post("/v1/responses", openapi_extra=wire.SCHEMAS.json_body(responses_wire.ResponsesBody))
async def server_responses(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """Answer an input with a base model or a checkpoint, as a response that is not kept, whole or streamed."""
    body = await _body(request, responses_wire.ResponsesBody)
    target = await target_of(request, body.model, caller, control)
    return await responses_answer(request, body, target, caller, control)


@whole.post("/tokenize", openapi_extra=wire.SCHEMAS.json_body(wire.TokenizeBody))
async def server_tokenize(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The tokens of a prompt, or of messages in the model's own chat template."""
    body = await _body(request, wire.TokenizeBody)
    target = await target_of(request, await _only_model(body.model, control), caller, control)
    return await tokens.tokenized(request, body, target.sampler, control)


@whole.post("/detokenize", openapi_extra=wire.SCHEMAS.json_body(wire.DetokenizeBody))
async def server_detokenize(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The text of tokens."""
    body = await _body(request, wire.DetokenizeBody)
    target = await target_of(request, await _only_model(body.model, control), caller, control)
    return await tokens.detokenized(request, body, target.sampler, control)


@whole.get("/tokenizer_info")
async def server_tokenizer_info(caller: CallerOf, control: ControlOf, model: str | None = None) -> dict[str, object]:
    """The tokenizer's configuration of one model."""
    meant = await served_models.named(await _only_model(model, control), caller, control)
    return await tokens.tokenizer_info(meant.base_model, control)


async def _only_model(given: str | None, control: Control) -> str:
    """The model that a request means by naming none. Raises :class:`BadRequest` where there are several."""
    if given is not None:
        return given
    models, _ = await control.catalogue.entries()
    if len(models) != 1:
        raise BadRequest("model", f"one of {', '.join(row.name for row in models)}")
    return models[0].name


async def _body(request: Request, kind: type[B]) -> B:
    refuse_idempotency_key(request)
    raw = await read_body(request)
    return await off_loop(len(raw), lambda: decode(raw, kind))
