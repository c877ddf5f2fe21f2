"""Sampling sessions, and samples: computed while the client polls for them."""

from dataclasses import replace
from typing import NamedTuple

from fastapi import APIRouter, Request

from selfloop.control.gateway import Control
from selfloop.control.sampling.service import SampleSpec
from selfloop.server.shared.auth import CallerOf, ControlOf
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.shared.images import ImageReader, from_base64
from selfloop.server.shared.sampling import room_for
from selfloop.server.tinker import futures, names, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.results import SampleView, sample_response
from selfloop.server.tinker.sampling.targets import read_targets
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image
from selfloop.types.resources import Sampler
from selfloop.types.sampling import SamplingParams
from selfloop.types.status import CheckpointTarget

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

_MAX_SAMPLES = 1024
_MAX_TOP = 128
_MAX_STOPS = 1024


@router.post("/create_sampling_session", openapi_extra=wire.SCHEMAS.json_body(wire.CreateSamplingSession))
async def create_sampling_session(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """A sampler of a base model or of a checkpoint."""
    body = decode(await read_body(request), wire.CreateSamplingSession)
    if body.base_model is None and body.model_path is None:
        raise BadRequest("base_model", "base_model or model_path")
    session = await control.sessions.open(caller, body.session_id)
    path = None
    if body.model_path is not None:
        path = names.our_path(body.model_path, "model_path")
        with names.as_written(body.model_path):
            checkpoint = await control.sharing.readable_at(caller, path, "model_path")
        if body.base_model is not None:
            await control.catalogue.same_model(body.base_model, checkpoint.base_model, "base_model")
    sampler = await control.samplers.create_standalone(
        caller,
        session.id,
        base_model=body.base_model,
        model_path=path,
        max_seq_len=None,
        reuse_from_session_id=None,
        id=names.new_sampler_id(session.id, body.sampling_session_seq_id),
    )
    return {"sampling_session_id": names.their_id(sampler.id), "type": "create_sampling_session"}


@router.get("/samplers/{sampling_session_id}")
async def sampler_info(sampling_session_id: str, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """What a sampling session samples."""
    sampler = await control.samplers.get(caller, names.sampler_id(sampling_session_id))
    info: dict[str, object] = {"sampler_id": names.their_id(sampler.id), "base_model": sampler.base_model}
    # Of its own files: the checkpoint may have been deleted, and may be another team's.
    for row in await control.samplers.served(sampler):
        info["model_path"] = names.checkpoint_path(row.run_id, CheckpointTarget(row.target), row.name)
    return info


@router.post("/asample", openapi_extra=wire.SCHEMAS.json_body(wire.Sample))
async def asample(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """Begin to sample; the samples are fetched by ``retrieve_future``."""
    raw = await read_body(request)
    body = await off_loop(len(raw), lambda: decode(raw, wire.Sample))
    sampler = await control.samplers.get(caller, names.sampler_id(body.sampling_session_id))
    control.samplers.check_live(sampler)
    if not 0 <= body.seq_id < 2**63:
        raise BadRequest("seq_id", f"0 to {2**63 - 1}, got {body.seq_id}")
    asked = await _asked(body, len(raw), sampler, control)
    recorded_as = str(body.seq_id) if body.record_stability_info else None
    # This dialect has no word for routes: they belong to what keeps training stable.
    routes = recorded_as is not None and not (await control.catalogue.resolve(sampler.base_model)).no_routes
    request_id = futures.of_sample(sampler.id, body.seq_id)

    async def sampled() -> bytes:
        result = await control.sampling.sample_newest(
            sampler, replace(asked.spec, record_as=recorded_as, routes=routes)
        )
        size = 64 * len(asked.spec.prompt) * (1 + asked.view.num_top_prompt)
        return await off_loop(size, lambda: sample_response(result, asked.view))

    control.jobs.submit(futures.channel_of(sampler.id, body.seq_id), request_id, sampled)
    sequence = f"{names.their_id(sampler.id)}/{body.seq_id}"
    return {
        "request_id": request_id,
        "sample_sequence_ids": [f"{sequence}/{i}" for i in range(asked.spec.num_samples)],
        "type": "asample",
    }


@router.post("/join_sampling_session", openapi_extra=wire.SCHEMAS.json_body(wire.JoinSamplingSession))
async def join_sampling_session(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """A number of its own for a client that was copied, so that its requests differ from the others'."""
    body = decode(await read_body(request), wire.JoinSamplingSession)
    sampler = await control.samplers.get(caller, names.sampler_id(body.sampling_session_id))
    control.samplers.check_live(sampler)
    return {"client_counter": await control.sessions.joined(caller, sampler), "type": "join_sampling_session"}


class _Asked(NamedTuple):
    """What to sample, and which of what comes with it the caller wants to see."""

    spec: SampleSpec
    view: SampleView


async def _asked(body: wire.Sample, num_bytes: int, sampler: Sampler, control: Control) -> _Asked:
    for name in ("base_model", "model_path"):
        if getattr(body, name) is not None:
            raise BadRequest(name, "null: the sampling session says what is sampled")
    _within("prompt_alt_tokens_k", body.prompt_alt_tokens_k, 0, _MAX_TOP)
    _within("topk_prompt_logprobs", body.topk_prompt_logprobs, 0, _MAX_TOP)
    _within("topk_sample_logprobs", body.topk_sample_logprobs, 0, _MAX_TOP)
    _within("num_samples", body.num_samples, 1, _MAX_SAMPLES)
    model = await control.catalogue.resolve(sampler.base_model)
    prompt, images = await off_loop(num_bytes, lambda: _prompt(body.prompt, ImageReader(model.vision)))
    own, last_n = bool(body.prompt_logprobs), body.prompt_logprobs_last_n
    if last_n is not None:
        if not own:
            raise BadRequest("prompt_logprobs_last_n", "null without prompt_logprobs")
        if not 1 <= last_n < len(prompt):
            expected = f"a number from 1 to the prompt's length less one ({len(prompt) - 1}), got {last_n}"
            raise BadRequest("prompt_logprobs_last_n", expected)
    scored = own or body.topk_prompt_logprobs > 0 or body.target_prompt_logprobs is not None
    scored = scored or body.prompt_alt_tokens_k > 0
    room = room_for(prompt, "prompt", sampler.max_seq_len, scored=scored)
    params = _params(body.sampling_params, room)
    for name, tokens in (("prompt", prompt), ("sampling_params.stop", params.stop_token_ids)):
        if tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
            raise BadRequest(name, f"token ids from 0 to {model.vocab_size - 1}")
    asked, targets = body.target_prompt_logprobs, None
    if asked is not None:
        targets = await off_loop(16 * len(asked.data), lambda: read_targets(asked, len(prompt), model.vocab_size))
    spec = SampleSpec(
        prompt,
        body.num_samples,
        params,
        prompt_logprobs=body.topk_prompt_logprobs if own or body.topk_prompt_logprobs > 0 else None,
        top_logprobs=body.topk_sample_logprobs,
        prompt_logprobs_last_n=last_n,
        prompt_targets=None if targets is None else targets.cells,
        prompt_draws=body.prompt_alt_tokens_k,
        images=images,
    )
    top_prompt, top, draws = body.topk_prompt_logprobs, body.topk_sample_logprobs, body.prompt_alt_tokens_k
    return _Asked(spec, SampleView(own, top_prompt, top, targets, draws))


def _prompt(prompt: wire.Prompt, reader: ImageReader) -> tuple[list[int], list[Image]]:
    """The tokens, an image's placeholders among them, and the images."""
    tokens: list[int] = []
    images: list[Image] = []
    for i, chunk in enumerate(prompt.chunks):
        where = f"prompt.chunks[{i}]"
        match chunk:
            case wire.EncodedText():
                tokens += chunk.tokens
            case wire.Image():
                reader.check_seen(where, "encoded_text")
                data = from_base64(chunk.data, f"{where}.data")
                images.append(reader.add(tokens, data, chunk.format, chunk.expected_tokens, where))
            case wire.ImageAssetPointer():
                reader.check_seen(where, "encoded_text")
                raise BadRequest(f"{where}.location", "an image chunk with its bytes in data: nothing is fetched here")
            case wire.Dmel():
                raise BadRequest(where, "encoded_text or image: the served models take no audio, nor text of it")
    if not tokens:
        raise BadRequest("prompt", "at least one token")
    return tokens, images


def _params(params: wire.SamplingParams, room: int) -> SamplingParams:
    if not 0.0 <= params.temperature < float("inf"):
        raise BadRequest("sampling_params.temperature", f"a number >= 0 (0 is greedy), got {params.temperature}")
    if not 0.0 < params.top_p <= 1.0:
        raise BadRequest("sampling_params.top_p", f"a number in (0, 1], got {params.top_p}")
    if params.top_k < -1:
        raise BadRequest("sampling_params.top_k", f"-1 or 0 for all tokens, or a number >= 1; got {params.top_k}")
    if params.seed is not None:
        _within("sampling_params.seed", params.seed, -(2**63), 2**63 - 1)
    max_tokens = room if params.max_tokens is None else params.max_tokens
    _within("sampling_params.max_tokens", max_tokens, 1, room)
    strings, tokens = _stops(params.stop)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        seed=params.seed,
        stop=strings,
        stop_token_ids=tokens,
        # What is given replaces the model's own end tokens, the empty list included.
        use_end_tokens=params.stop is None,
    )


def _stops(stop: str | list[str | int] | None) -> tuple[list[str], list[int]]:
    given = [stop] if isinstance(stop, str) else stop or []
    if len(given) > _MAX_STOPS or "" in given:
        raise BadRequest("sampling_params.stop", f"at most {_MAX_STOPS} strings of at least one character, or tokens")
    return [s for s in given if isinstance(s, str)], [t for t in given if isinstance(t, int)]


def _within(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadRequest(field, f"{low if low == high else f'{low} to {high}'}, got {value}")
