"""Models and their operations: each is answered at once with the id of a future."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import APIRouter, Request

from selfloop.control.gateway import Control
from selfloop.control.queue.journal import Submission
from selfloop.control.resources.access import Caller
from selfloop.control.resources.runs import RunRequest
from selfloop.server.shared.auth import CallerOf, ControlOf, caller_of, control_of
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.shared.refusals import OperationRoute, check_not_refused, json_place, plain_start
from selfloop.server.shared.schemas import protobuf_body
from selfloop.server.tinker import futures, names, schema, validate, wire
from selfloop.server.tinker.errors import RESPONSES
from selfloop.server.tinker.resources.service import strings
from selfloop.server.tinker.training import custom_losses, data, provenance
from selfloop.server.tinker.validate import granted_team
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import new_id
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    LoadState,
    Operation,
    OptimStep,
    SaveState,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    kind_of,
)
from selfloop.types.resources import Run


class _TinkerOperationRoute(OperationRoute):
    """The run is the body's, which is JSON, or protobuf."""

    async def place(self, request: Request) -> tuple[Run, int] | None:
        raw = await plain_start(request) if request.url.path.endswith("/forward_backward") else b"{"
        is_json = raw.lstrip().startswith(b"{")
        place = await json_place(request) if is_json else await off_loop(len(raw), lambda: schema.place_in(raw))
        seq_id, model_id = place
        if seq_id is None or model_id is None:
            return None
        return await _run(caller_of(request), control_of(request), model_id), seq_id


router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)
operations = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=_TinkerOperationRoute, responses=RESPONSES)

Future = dict[str, str]


@router.post("/create_model", openapi_extra=wire.SCHEMAS.json_body(wire.CreateModel))
async def create_model(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """A run with a fresh adapter."""
    body = decode(await read_body(request), wire.CreateModel)
    validate.optimizer(body.optimizer_config)
    lora = body.lora_config
    targets = LoraTargets(lora.train_attn, lora.train_mlp, lora.train_unembed)
    run = RunRequest(
        session_id=body.session_id,
        base_model=body.base_model,
        lora_rank=lora.rank,
        seed=lora.seed,
        targets=targets.checked("lora_config.train_attn/train_mlp/train_unembed"),
        user_metadata=strings(body.user_metadata),
        id=await _new_run_id(caller, control, body.session_id, body.model_seq_id),
    )
    created = (await control.runs.create(caller, run, with_sampler=False)).run
    return futures.created(created.id, "create_model")


@router.post("/get_info", openapi_extra=wire.SCHEMAS.json_body(wire.Model))
async def get_info(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """What a model is."""
    run = await _run(caller, control, decode(await read_body(request), wire.Model).model_id)
    model_data = {"model_name": run.base_model, "tokenizer_id": run.base_model}
    return {
        "type": "get_info",
        "model_data": model_data,
        "model_id": names.their_id(run.id),
        "is_lora": True,
        "lora_rank": run.lora_rank,
        "model_name": run.base_model,
        "optimizer_config": {"type": "adamw"},
    }


@router.post("/unload_model", openapi_extra=wire.SCHEMAS.json_body(wire.Model))
async def unload_model(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """End a run; its checkpoints stay."""
    run = await _run(caller, control, decode(await read_body(request), wire.Model).model_id)
    await control.runs.deactivate(caller, run.id)
    return futures.created(run.id, "unload_model")


@operations.post("/forward_backward", openapi_extra=protobuf_body("ForwardBackwardRequest"))
async def forward_backward(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """Loss, logprobs and, unless ``forward_only``, gradients. The body is protobuf."""
    raw = await read_body(request)
    message = await off_loop(len(raw), lambda: schema.parse_forward_backward(raw))
    run = await _run(caller, control, message.model_id)
    model = await control.catalogue.resolve(run.base_model)
    limits = data.Limits(model.vocab_size, run.max_seq_len, model.vision)

    async def build() -> Forward | ForwardBackward:
        if message.loss_fn == "stable_reinforce" and request.app.state.settings.stable_reinforce == "refuse":
            raise BadRequest(
                "loss_fn", "stable_reinforce is not published, and refused here; use loss_fn=importance_sampling"
            )
        loss = await custom_losses.asked(message, caller, control, run)
        known = await provenance.known(message, caller, control, run)
        return await off_loop(len(raw), lambda: data.operation(message, limits, loss, known))

    kind = "forward" if message.forward_only else "forward_backward"
    return await _accept(request, _Call(run, message.seq_id, kind, raw), build)


@operations.post("/optim_step", openapi_extra=wire.SCHEMAS.json_body(wire.OptimStep))
async def optim_step(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """One step of AdamW over the gradients since the last one."""
    raw = await read_body(request)
    body = decode(raw, wire.OptimStep)
    run = await _run(caller, control, body.model_id)

    async def build() -> OptimStep:
        return OptimStep(validate.adam_params(body))

    return await _accept(request, _Call(run, body.seq_id, "optim_step", raw), build)


@operations.post("/save_weights", openapi_extra=wire.SCHEMAS.json_body(wire.SaveWeights))
async def save_weights(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """A checkpoint to go on from."""
    raw = await read_body(request)
    body = decode(raw, wire.SaveWeights)
    run = await _run(caller, control, body.model_id)

    async def build() -> SaveState:
        name, ttl = validate.checkpoint_name(body.path), validate.ttl_seconds(body.ttl_seconds)
        if not body.overwrite:
            await control.operations.check_name_is_free(run, name)
        return SaveState(new_id(), name, ttl, body.user_metadata)

    return await _accept(request, _Call(run, body.seq_id, "save_state", raw), build)


@operations.post("/save_weights_for_sampler", openapi_extra=wire.SCHEMAS.json_body(wire.SaveWeightsForSampler))
async def save_weights_for_sampler(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """A checkpoint to sample, under a name or for one sampling session alone."""
    raw = await read_body(request)
    body = decode(raw, wire.SaveWeightsForSampler)
    run = await _run(caller, control, body.model_id)

    async def build() -> SaveWeightsForSampler:
        if body.kind not in ("snapshot", "inflight"):
            raise BadRequest("kind", f"snapshot or inflight, got {body.kind[:100]!r}")
        ttl = validate.ttl_seconds(body.ttl_seconds)
        if body.path is not None and body.sampling_session_seq_id is None:
            if body.kind != "snapshot":
                raise BadRequest("kind", "snapshot with a path: a checkpoint of that name does not change")
            return SaveWeightsForSampler(new_id(), validate.checkpoint_name(body.path), True, ttl, body.user_metadata)
        if body.sampling_session_seq_id is None or body.path is not None:
            raise BadRequest("path", "either path or sampling_session_seq_id")
        sampler_id = names.new_sampler_id(run.session_id, body.sampling_session_seq_id)
        inflight = body.kind == "inflight"
        make = control.sessions.follower if inflight else control.sessions.snapshot_sampler
        sampler = await make(caller, run, sampler_id)
        assert sampler.checkpoint_id is not None
        return SaveWeightsForSampler(
            new_id() if inflight else sampler.checkpoint_id,
            names.snapshot_name(sampler_id),
            publish=False,
            ttl_seconds=control.sessions.snapshot_life_s if ttl is None else ttl,
            user_metadata=body.user_metadata,
            sampler_id=sampler_id,
            inflight=inflight,
        )

    return await _accept(request, _Call(run, body.seq_id, "save_weights_for_sampler", raw), build)


@operations.post("/save_weights_external", openapi_extra=wire.SCHEMAS.json_body(wire.SaveWeightsExternal))
async def save_weights_external(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """The adapter as files to download, encrypted if there are recipients."""
    raw = await read_body(request)
    body = decode(raw, wire.SaveWeightsExternal)
    run = await _run(caller, control, body.model_id)

    async def build() -> SaveWeightsExternal:
        name, ttl = validate.checkpoint_name(body.path), validate.ttl_seconds(body.ttl_seconds)
        recipients = validate.age_recipients(body.age_encryption_recipients)
        return SaveWeightsExternal(new_id(), name, run.base_model, recipients, ttl)

    return await _accept(request, _Call(run, body.seq_id, "save_weights_external", raw), build)


@operations.post("/load_weights", openapi_extra=wire.SCHEMAS.json_body(wire.LoadWeights))
async def load_weights(request: Request, caller: CallerOf, control: ControlOf) -> Future:
    """A checkpoint's weights into a model, or into a new one."""
    raw = await read_body(request)
    body = decode(raw, wire.LoadWeights)
    if body.model_id is None:
        return await _create_from(body, caller, control)
    if body.seq_id is None:
        raise BadRequest("seq_id", "a number from 1 on")
    run = await _run(caller, control, body.model_id)

    async def build() -> LoadState:
        validate.optimizer(body.optimizer_config)
        path = names.our_path(body.path)
        granted = await granted_team(control, body.weights_access_token)
        with names.as_written(body.path):
            await control.operations.check_loadable(run, path, with_optimizer=body.optimizer, granted_team_id=granted)
        return LoadState(path, body.optimizer, granted)

    return await _accept(request, _Call(run, body.seq_id, "load_state", raw), build)


async def _create_from(body: wire.LoadWeights, caller: Caller, control: Control) -> Future:
    if body.session_id is None or body.model_seq_id is None:
        raise BadRequest("session_id/model_seq_id", "both, to make a model, or model_id and seq_id of one")
    validate.optimizer(body.optimizer_config)
    path = names.our_path(body.path)
    granted = await granted_team(control, body.weights_access_token)
    with names.as_written(body.path):
        checkpoint = await control.sharing.readable_at(caller, path, "path", granted)
    run = RunRequest(
        session_id=body.session_id,
        base_model=body.base_model or checkpoint.base_model,
        path=path,
        with_optimizer=body.optimizer,
        user_metadata=strings(body.user_metadata),
        id=await _new_run_id(caller, control, body.session_id, body.model_seq_id),
        reader_team_id=granted,
    )
    with names.as_written(body.path):
        created = (await control.runs.create(caller, run, with_sampler=False)).run
    return futures.created(created.id, "load_weights")


async def _new_run_id(caller: Caller, control: Control, session_id: str, number: int) -> str:
    session = await control.sessions.open(caller, session_id)
    return names.new_run_id(session.id, number)


async def _run(caller: Caller, control: Control, model_id: str) -> Run:
    return await control.runs.live(caller, names.run_id(model_id))


@dataclass(frozen=True, slots=True)
class _Call:
    """Where an operation belongs, and the bytes that distinguish a repetition from another request."""

    run: Run
    seq: int
    kind: str
    raw: bytes


async def _accept(request: Request, call: _Call, build: Callable[[], Awaitable[Operation]]) -> Future:
    """Queue an operation. One that cannot be served keeps its place, and its future fails."""
    run, seq = call.run, call.seq
    if not 1 <= seq < 2**31:
        raise BadRequest("seq_id", f"1 to {2**31 - 1}, got {seq}")
    await check_not_refused(request, run, seq)
    control = control_of(request)
    operation_id = f"seq-{seq}"
    digest = await off_loop(len(call.raw), lambda: hashlib.sha256(call.kind.encode() + b"\0" + call.raw).hexdigest())
    try:
        operation = await build()
    except (BadRequest, NotFound) as error:
        refused = Submission(operation_id, call.kind, seq, digest)
        operation_id = await control.operations.refuse(run, refused, str(error), type(error).__name__)
        return futures.of_operation(run.id, operation_id)
    submission = Submission(operation_id, kind_of(operation), seq, digest)
    return futures.of_operation(run.id, await control.operations.accept(run, submission, operation))
