"""A sampler's data plane: completions, its model list, its policy version."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.control import Control
from selfloop.control.resources.access import Caller
from selfloop.control.resources.samplers import Sampler
from selfloop.control.sampling import Draw, Weights
from selfloop.server.auth import CallerOf, ControlOf
from selfloop.server.limits import read_body
from selfloop.server.loops import validate, wire
from selfloop.types.errors import BadRequest
from selfloop.types.sampling import SampledSequence, SampleResult, SamplingParams, TokenLogprob
from selfloop.types.status import SamplerStatus

router = APIRouter(prefix="/loops/samplers/{sampler_id}", tags=["loops sampler"])

_POLICY_VERSION_HEADER = "x-trainers-policy-version"
_VERSION = re.compile(r"[0-9]{1,18}")
_MAX_SAMPLES = 256
_MAX_PROMPT_LOGPROBS = 20
# Shorter than the 30 s that proxies and clients commonly allow a held request.
_FLOOR_HOLD_S = 25.0


async def sampler_of(sampler_id: str, caller: CallerOf, control: ControlOf) -> Sampler:
    return await control.samplers.get(caller, sampler_id)


SamplerOf = Annotated[Sampler, Depends(sampler_of)]


@router.post("/sample")
async def sample(request: Request, sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> Response:
    """Draw completions; the answer comes when they are drawn."""
    body = validate.decode(await read_body(request), wire.SampleBody)
    await _check_identity(request, sampler, body, control)
    draw = _draw(body, sampler)
    weights = await _weights(request, sampler, caller, control)
    result = await control.sampling.draw(sampler, weights, draw)
    return JSONResponse(
        _completion(result, draw.prompt, sampler.base_model, with_logprobs=body.logprobs is not None),
        headers={_POLICY_VERSION_HEADER: str(weights.policy_version)},
    )


@router.get("/v1/models")
async def models(sampler: SamplerOf, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """The base model, and the adapter that is live on it."""
    data: list[dict[str, object]] = [{"id": sampler.base_model, "object": "model", "parent": None}]
    path = await control.samplers.live_path(sampler)
    if path is not None:
        data.append({"id": path, "object": "model", "parent": sampler.base_model})
    return {"object": "list", "data": data}


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


async def _check_identity(request: Request, sampler: Sampler, body: wire.SampleBody, control: Control) -> None:
    for header, own in (("x-run-id", sampler.run_id), ("x-sampler-id", sampler.id)):
        named = request.headers.get(header)
        if named is not None and named != own:
            raise BadRequest(header, f"{own}, which this sampler serves; got {named!r}")
    if body.model is not None and body.model != sampler.base_model:
        await control.catalogue.same_model(body.model, sampler.base_model, "model")


async def _weights(request: Request, sampler: Sampler, caller: Caller, control: Control) -> Weights:
    path = request.headers.get("x-checkpoint-path")
    checkpoint = None
    if path is not None:
        checkpoint = await control.checkpoints.at_path(caller, path, "X-Checkpoint-Path")
        await control.catalogue.same_model(checkpoint.base_model, sampler.base_model, "X-Checkpoint-Path")
    floor = request.headers.get("x-min-policy-version")
    if floor is not None and not _VERSION.fullmatch(floor):
        raise BadRequest("X-Min-Policy-Version", f"a policy version (a number >= 0), got {floor[:200]!r}")
    min_version = None if floor is None else int(floor)
    return await control.sampling.weights(sampler, checkpoint, min_version, _FLOOR_HOLD_S)


def _draw(body: wire.SampleBody, sampler: Sampler) -> Draw:
    for name in ("structured_outputs", "model_input_chunks", "include_routed_experts", "lora"):
        if getattr(body, name):
            raise BadRequest(name, "null: not served by this sampler")
    if not body.prompt:
        raise BadRequest("prompt", "at least one token id")
    _within("n", body.n, 1, _MAX_SAMPLES)
    if body.logprobs is not None:
        _within("logprobs", body.logprobs, 0, 0)
    if body.prompt_logprobs is not None:
        _within("prompt_logprobs", body.prompt_logprobs, 0, _MAX_PROMPT_LOGPROBS)
    if not 0.0 <= body.temperature < float("inf"):
        raise BadRequest("temperature", f"a number >= 0 (0 is greedy), got {body.temperature}")
    if not 0.0 < body.top_p <= 1.0:
        raise BadRequest("top_p", f"a number in (0, 1], got {body.top_p}")
    if body.top_k < -1:
        raise BadRequest("top_k", f"-1 or 0 for all tokens, or a number >= 1; got {body.top_k}")
    if body.seed is not None:
        _within("seed", body.seed, -(2**63), 2**63 - 1)
    room = sampler.max_seq_len - len(body.prompt)
    if room < 1:
        raise BadRequest("prompt", f"at most {sampler.max_seq_len - 1} tokens, got {len(body.prompt)}")
    max_tokens = room if body.max_tokens is None else body.max_tokens
    _within("max_tokens", max_tokens, 1, room)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stop:
        raise BadRequest("stop", "strings of at least one character")
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_k=max(body.top_k, 0),
        top_p=body.top_p,
        seed=body.seed,
        stop=stop,
        stop_token_ids=body.stop_token_ids or [],
    )
    return Draw(body.prompt, body.n, params, body.prompt_logprobs)


def _within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        expected = str(low) if low == high else f"{low} to {high}"
        raise BadRequest(field, f"{expected}, got {value}")


def _completion(result: SampleResult, prompt: list[int], model: str, *, with_logprobs: bool) -> dict[str, object]:
    prompt_logprobs = _prompt_logprobs(result.prompt_logprobs)
    return {
        "id": result.request_id,
        "object": "text_completion",
        "model": model,
        "choices": [
            _choice(i, sequence, prompt, with_logprobs) | {"prompt_logprobs": prompt_logprobs}
            for i, sequence in enumerate(result.sequences)
        ],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": sum(len(s.tokens) for s in result.sequences),
            "total_tokens": len(prompt) + sum(len(s.tokens) for s in result.sequences),
        },
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
