"""A sampler's data plane: completions, its model list, its policy version."""

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.gateway import Control
from selfloop.control.queue.operations import Pending, checked_operation_id
from selfloop.control.resources.catalogue import Model
from selfloop.control.sampling.idempotency import Answer
from selfloop.control.sampling.queued_samples import Failed, Sampled
from selfloop.control.sampling.recorded import sequence_id, uri_of
from selfloop.control.sampling.service import SampleSpec
from selfloop.server.loops import validate, wire
from selfloop.server.loops.results import poll_hold_s
from selfloop.server.shared.auth import CallerOf, ControlOf, caller_of, control_of
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.connection import while_connected
from selfloop.server.shared.dialect import Poll
from selfloop.server.shared.errors import body_of
from selfloop.server.shared.images import ImageReader
from selfloop.server.shared.sampling import (
    MAX_SAMPLES,
    MAX_TOP_LOGPROBS,
    POLICY_VERSION_HEADER,
    SamplerOf,
    check_identity,
    check_ranges,
    room_for,
    stop_strings,
    structured_output,
    weights_of,
    with_penalties,
    within,
)
from selfloop.types.errors import BadRequest
from selfloop.types.ids import new_id
from selfloop.types.images import Image
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SampledSequence, SampleResult, SamplingParams, TokenLogprob
from selfloop.types.status import SamplerStatus

router = APIRouter(prefix="/loops/samplers/{sampler_id}", tags=["loops sampler"])

_RESPOND_ASYNC = "respond-async"


@router.post("/sample", responses={202: wire.SCHEMAS.json_answer(wire.Acceptance, "Accepted: it survives any crash")})
async def sample(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> Response:
    """Sample completions: answered when they are there, or queued (202) on serverless capacity and by request."""
    raw = await read_body(request)
    body = await off_loop(len(raw), lambda: validate.decode(raw, wire.SampleBody))
    check_identity(request, sampler)
    pinned, pinned_by = await _pinned(body, sampler, control)
    key = request.headers.get("idempotency-key")
    key = None if key is None else checked_operation_id(key)
    model = await control.catalogue.resolve(sampler.base_model)
    spec = await off_loop(len(raw), lambda: _spec(body, sampler, key, model))
    fingerprint = validate.fingerprint(_identity(request), raw)
    if control.capacity.is_serverless(sampler.serverless) or _prefers_async(request):
        weights = await weights_of(request, sampler, caller, control, pinned, pinned_by)
        id = await control.queued_samples.accept(
            sampler, key or new_id() + new_id(), fingerprint, weights, spec, with_logprobs=body.logprobs is not None
        )
        headers = {"Location": f"/operations/{id}"}
        if _prefers_async(request):
            headers["Preference-Applied"] = _RESPOND_ASYNC
        return JSONResponse(msgspec.to_builtins(wire.Acceptance(id)), 202, headers)

    async def answer() -> Answer:
        weights = await weights_of(request, sampler, caller, control, pinned, pinned_by)
        result = await control.sampling.sample(sampler, weights, spec)
        completion = _completion(result, spec, sampler, with_logprobs=body.logprobs is not None)
        return Answer(msgspec.json.encode(completion), weights.policy_version)

    answering = answer() if key is None else control.sample_idempotency.answer(sampler.id, key, fingerprint, answer)
    answered = await while_connected(request, answering)
    headers = {POLICY_VERSION_HEADER: str(answered.policy_version)}
    return Response(answered.content, media_type="application/json", headers=headers)


@router.get(
    "/operations/{operation_id}", responses={200: wire.SCHEMAS.json_answer(wire.OutcomeAnswer, "Done, or failed")}
)
async def operation(sampler_id: str, operation_id: str, caller: CallerOf, control: ControlOf) -> Response:
    """The outcome of a queued sample, held for up to 30 s; 408 with the reason while there is none."""
    await control.samplers.check_access(caller, sampler_id)
    control.lifecycle.touch(sampler_id)
    match await control.queued_samples.wait(sampler_id, operation_id, poll_hold_s()):
        case Pending(reason):
            return JSONResponse(body_of(reason, "PENDING"), 408)
        case Failed(error, error_class):
            return JSONResponse({"status": "error", "error": error, "error_class": error_class})
        case Sampled(accepted, result):
            sampler = await control.samplers.get(caller, sampler_id)
            completion = _completion(result, accepted.spec, sampler, with_logprobs=accepted.with_logprobs)
            content = msgspec.json.encode({"status": "done", "result": completion})
            headers = {POLICY_VERSION_HEADER: str(accepted.policy_version)}
            return Response(content, media_type="application/json", headers=headers)


async def _poll(request: Request, sampler_id: str, operation_id: str) -> Response:
    return await operation(sampler_id, operation_id, caller_of(request), control_of(request))


POLL = Poll("GET", router.prefix + "/operations/{operation_id}", _poll)


@router.post("/operations/{operation_id}/cancel")
async def cancel(sampler_id: str, operation_id: str, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """Take back a queued sample that is not being sampled yet."""
    await control.samplers.check_access(caller, sampler_id)
    await control.queued_samples.cancel(sampler_id, operation_id)
    return {"status": "cancelled"}


@router.get("/trainers_policy_version")
async def trainers_policy_version(sampler: SamplerOf, control: ControlOf) -> dict[str, int]:
    return {"policy_version": await control.sampling.live_version(sampler)}


@router.post("/wake", status_code=202)
async def wake(sampler: SamplerOf, control: ControlOf) -> dict[str, str]:
    """Bring a sleeping sampler up."""
    control.samplers.check_live(sampler)
    status = control.lifecycle.status(sampler.id) or SamplerStatus.INACTIVE
    control.lifecycle.wake_soon(sampler.id)
    return {"status": SamplerStatus.WAKING_UP if status == SamplerStatus.SCALED_TO_ZERO else status}


@router.get("/health")
async def health(sampler: SamplerOf, control: ControlOf) -> dict[str, str]:
    control.samplers.check_live(sampler)
    control.lifecycle.touch(sampler.id)
    return {"status": "ready"}


def _prefers_async(request: Request) -> bool:
    """RFC 7240: ``Prefer`` may come several times and holds preferences between commas, in any case."""
    asked = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return _RESPOND_ASYNC in (preference.strip() for preference in asked)


def _identity(request: Request) -> str:
    """What besides the body makes a request a different one."""
    named = [request.headers.get(header, "") for header in ("x-checkpoint-path", "x-min-policy-version")]
    return "\0".join([request.url.path, *named])


def _spec(body: wire.SampleBody, sampler: Sampler, key: str | None, model: Model) -> SampleSpec:
    prompt, images = body.prompt, list[Image]()
    if body.model_input_chunks:
        prompt, images = validate.model_input(body.model_input_chunks, ImageReader(model.vision), "model_input_chunks")
        if body.prompt:
            raise BadRequest("prompt", "an empty list where model_input_chunks are the prompt")
    if body.include_routed_experts and model.no_routes:
        raise BadRequest("include_routed_experts", f"null or false: {model.no_routes}")
    if not prompt:
        raise BadRequest("prompt", "at least one token id")
    within("n", body.n, 1, MAX_SAMPLES)
    if body.logprobs is not None:
        within("logprobs", body.logprobs, 0, 0)
    if body.prompt_logprobs is not None:
        within("prompt_logprobs", body.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
    check_ranges(body.temperature, body.top_p, body.top_k, body.seed)
    room = room_for(prompt, "prompt", sampler.max_seq_len, scored=body.prompt_logprobs is not None)
    max_tokens = room if body.max_tokens is None else body.max_tokens
    within("max_tokens", max_tokens, 1, room)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        seed=body.seed,
        stop=stop_strings(body.stop),
        stop_token_ids=body.stop_token_ids or [],
        structured=None if body.structured_outputs is None else structured_output(body.structured_outputs),
    )
    routes = bool(body.include_routed_experts)
    return SampleSpec(
        prompt,
        body.n,
        with_penalties(params, body),
        body.prompt_logprobs,
        # Routes are part of a recording, which the older client does not ask for besides.
        record_as=key or new_id() + new_id() if body.record_stability_info or routes else None,
        routes=routes,
        images=images,
    )


async def _pinned(body: wire.SampleBody, sampler: Sampler, control: Control) -> tuple[str | None, str]:
    """The checkpoint that the body asks for, and by which field: a pinned one by ``model``, any by ``lora``."""
    named = body.model
    if named is not None and await control.samplers.served_named(sampler, named) is None:
        await control.catalogue.same_model(named, sampler.base_model, "model")
        named = None
    if not body.lora:
        return named, "model"
    if named not in (None, body.lora):
        raise BadRequest("lora", f"{named} as in model, or null; got {body.lora[:200]!r}")
    return body.lora, "lora"


def _completion(result: SampleResult, spec: SampleSpec, sampler: Sampler, *, with_logprobs: bool) -> dict[str, object]:
    prompt = spec.prompt
    prompt_logprobs = _prompt_logprobs(result.prompt_logprobs)
    return {
        "id": result.request_id,
        "object": "text_completion",
        "model": sampler.base_model,
        "choices": [
            _choice(i, sequence, prompt, with_logprobs)
            | {"prompt_logprobs": prompt_logprobs}
            | _recording(spec, sampler, i)
            for i, sequence in enumerate(result.sequences)
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": sum(len(s.tokens) for s in result.sequences),
            "total_tokens": len(prompt) + sum(len(s.tokens) for s in result.sequences),
            "prompt_tokens_details": {"cached_tokens": result.num_cached},
        },
    }


def _recording(spec: SampleSpec, sampler: Sampler, index: int) -> dict[str, object]:
    """How training names the sequence, where it is recorded."""
    if spec.record_as is None:
        return {}
    id = sequence_id(sampler.id, spec.record_as, index)
    if not spec.routes:
        return {"sequence_id": id}
    return {
        "sequence_id": id,
        "routed_experts_ref": {"uri": str(uri_of(sampler, id)), "version": validate.ROUTES_VERSION},
    }


def _choice(index: int, sequence: SampledSequence, prompt: list[int], with_logprobs: bool) -> dict[str, object]:
    tokens: list[int] = sequence.tokens
    logprobs: list[float | None] = [*sequence.logprobs]
    if tokens[: len(prompt)] == prompt:
        # The client cuts a leading copy of the prompt off. When the sample itself begins with one, give it
        # one more to cut, so that what it keeps is the sample.
        tokens, logprobs = prompt + tokens, [None] * len(prompt) + logprobs
    return {
        "index": index,
        "text": sequence.text,
        "token_ids": tokens,
        "prompt_token_ids": prompt,
        "logprobs": {"tokens": [f"token_id:{t}" for t in tokens], "token_logprobs": logprobs}
        if with_logprobs
        else None,
        "finish_reason": sequence.stop_reason,
    }


def _prompt_logprobs(positions: list[list[TokenLogprob] | None] | None) -> list[object] | None:
    """As vLLM gives them: per position the actual token and the top k, by token id."""
    if positions is None:
        return None
    return [
        None if tokens is None else {str(t.token): {"logprob": t.logprob, "rank": t.rank} for t in tokens}
        for tokens in positions
    ]
