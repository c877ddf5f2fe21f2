"""A run's data plane: operations in, long-polled results out."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.gateway import Control
from selfloop.control.queue.journal import Submission
from selfloop.control.queue.operations import Pending, checked_operation_id
from selfloop.control.queue.outcomes import Outcome
from selfloop.server.loops import validate, wire
from selfloop.server.loops.results import poll_hold_s, render
from selfloop.server.shared.auth import CallerOf, ControlOf, caller_of, control_of
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.dialect import Poll
from selfloop.server.shared.errors import body_of
from selfloop.server.shared.provenance import Known
from selfloop.server.shared.refusals import OperationRoute, check_not_refused, json_place
from selfloop.types.datum import Datum
from selfloop.types.errors import BadRequest, Conflict
from selfloop.types.ids import new_id
from selfloop.types.lora import MAX_LORA_RANK
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    InitTrainer,
    LoadState,
    Operation,
    OptimStep,
    SaveState,
    SaveWeightsForSampler,
    kind_of,
)
from selfloop.types.resources import Run
from selfloop.types.status import RunStatus


class _RunRoute(OperationRoute):
    """The run is the path's; what is below ``operations`` is about operations that have their place."""

    async def place(self, request: Request) -> tuple[Run, int] | None:
        run: Run | None = getattr(request.state, "run", None)
        if run is None or request.method != "POST" or "/operations/" in request.url.path:
            return None
        seq_id = (await json_place(request)).seq_id
        return None if seq_id is None else (run, seq_id)


router = APIRouter(prefix="/loops/runs/{run_id}", tags=["loops trainer"], route_class=_RunRoute)


def _takes(body: type[wire.RunBody]) -> dict[str, Any]:
    """What the document says of a route that takes an operation."""
    accepted = wire.SCHEMAS.json_answer(wire.Acceptance, "Accepted: it survives any crash")
    return {"status_code": 202, "responses": {202: accepted}, "openapi_extra": wire.SCHEMAS.json_body(body)}


async def run_of(request: Request, run_id: str, caller: CallerOf, control: ControlOf) -> Run:
    request.state.run = run = await control.runs.live(caller, run_id)
    return run


RunOf = Annotated[Run, Depends(run_of)]


@router.get("/health")
async def health(run: RunOf, control: ControlOf, base_model: str | None = None) -> dict[str, str]:
    """Ready as soon as operations are accepted, which is at once; also the client's keepalive."""
    if run.status != RunStatus.ACTIVE:
        raise Conflict(f"run {run.id} is INACTIVE", reason="RUN_INACTIVE")
    if base_model is not None and base_model != run.base_model:
        await control.catalogue.same_model(base_model, run.base_model, "base_model")
    control.lifecycle.touch(run.deployment_id)
    return {"status": "ready"}


@router.get("/policy_version")
async def policy_version(run: RunOf) -> dict[str, int]:
    """Optimizer steps applied so far."""
    return {"policy_version": run.step}


@router.post("/init_trainer_server", **_takes(wire.InitTrainerBody))
async def init_trainer_server(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw = await read_body(request)
    body = validate.decode(raw, wire.InitTrainerBody)
    if body.base_model is not None and body.base_model != run.base_model:
        await control.catalogue.same_model(body.base_model, run.base_model, "base_model")
    if not 1 <= body.lora_rank <= MAX_LORA_RANK:
        raise BadRequest("lora_rank", f"1 to {MAX_LORA_RANK}, got {body.lora_rank}")
    if run.initial_key is not None and body.lora_rank != run.initial_rank:
        raise BadRequest("lora_rank", f"the run starts from a checkpoint of rank {run.initial_rank}")
    return await _accept(request, run, control, raw, body, InitTrainer(body.lora_rank))


@router.post("/forward", **_takes(wire.ForwardBody))
async def forward(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw, body, data, loss_fn, config = await _loss_request(request, run, control)
    operation = Forward(data, loss_fn, config, body.top_k_logprobs)
    return await _accept(request, run, control, raw, body, operation)


@router.post("/forward_backward", **_takes(wire.ForwardBody))
async def forward_backward(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw, body, data, loss_fn, config = await _loss_request(request, run, control)
    operation = ForwardBackward(data, loss_fn, config, body.top_k_logprobs)
    return await _accept(request, run, control, raw, body, operation)


@router.post("/optim_step", **_takes(wire.OptimStepBody))
async def optim_step(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw = await read_body(request)
    body = validate.decode(raw, wire.OptimStepBody)
    return await _accept(request, run, control, raw, body, OptimStep(validate.adam_params(body.adam_params)))


@router.post("/save_state", **_takes(wire.SaveStateBody))
async def save_state(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw = await read_body(request)
    body = validate.decode(raw, wire.SaveStateBody)
    name, ttl = validate.checkpoint_name(body.name), validate.ttl_seconds(body.ttl_seconds)
    return await _accept(request, run, control, raw, body, SaveState(new_id(), name, ttl))


@router.post("/save_weights_for_sampler", **_takes(wire.SaveWeightsBody))
async def save_weights_for_sampler(request: Request, run: RunOf, control: ControlOf) -> Response:
    raw = await read_body(request)
    body = validate.decode(raw, wire.SaveWeightsBody)
    name, ttl = validate.checkpoint_name(body.name), validate.ttl_seconds(body.ttl_seconds)
    operation = SaveWeightsForSampler(new_id(), name, body.bump_version, ttl)
    return await _accept(request, run, control, raw, body, operation)


@router.post("/load_state", **_takes(wire.LoadStateBody))
async def load_state(request: Request, run: RunOf, control: ControlOf) -> Response:
    return await _load(request, run, control, with_optimizer=False)


@router.post("/load_state_with_optimizer", **_takes(wire.LoadStateBody))
async def load_state_with_optimizer(request: Request, run: RunOf, control: ControlOf) -> Response:
    return await _load(request, run, control, with_optimizer=True)


@router.get(
    "/operations/{operation_id}", responses={200: wire.SCHEMAS.json_answer(wire.OutcomeAnswer, "Done, or failed")}
)
async def operation(operation_id: str, run: RunOf, control: ControlOf) -> Response:
    """The outcome, held for up to 30 s; 408 with the reason while there is none."""
    control.lifecycle.touch(run.deployment_id)
    match await control.operations.wait(run.id, operation_id, poll_hold_s()):
        case Pending(reason):
            return JSONResponse(body_of(reason, "PENDING"), 408)
        case Outcome(result, error, error_class):
            if result is None:
                return JSONResponse({"status": "error", "error": error, "error_class": error_class})
            content = await off_loop(
                len(result), lambda: msgspec.json.encode({"status": "done", "result": render(result, run.id)})
            )
            return Response(content, media_type="application/json")


async def _poll(request: Request, run_id: str, operation_id: str) -> Response:
    control = control_of(request)
    run = await control.runs.live(caller_of(request), run_id)
    return await operation(operation_id, run, control)


POLL = Poll("GET", router.prefix + "/operations/{operation_id}", _poll)


@router.post("/operations/{operation_id}/cancel")
async def cancel(operation_id: str, run: RunOf, control: ControlOf) -> dict[str, str]:
    """Take back an operation that has not begun."""
    await control.operations.cancel(run.id, operation_id)
    return {"status": "cancelled"}


async def _load(request: Request, run: Run, control: Control, *, with_optimizer: bool) -> Response:
    raw = await read_body(request)
    body = validate.decode(raw, wire.LoadStateBody)
    await control.operations.check_loadable(run, body.path, with_optimizer=with_optimizer)
    return await _accept(request, run, control, raw, body, LoadState(body.path, with_optimizer))


async def _loss_request(
    request: Request, run: Run, control: Control
) -> tuple[bytes, wire.ForwardBody, list[Datum], str, dict[str, float | bool]]:
    raw = await read_body(request)
    model = await control.catalogue.resolve(run.base_model)
    limits = validate.Limits(model.vocab_size, run.max_seq_len, model.no_routes, model.vision)

    body = await off_loop(len(raw), lambda: validate.decode(raw, wire.ForwardBody))
    named = validate.named_sequences(body, limits)
    sequences = await control.sampling.recorded.use(caller_of(request), named) if named else {}
    known = Known(sequences, must_be_recorded=True, model_name=run.model_name)
    return raw, body, *await off_loop(len(raw), lambda: validate.loss_call(body, limits, known))


async def _accept(
    request: Request, run: Run, control: Control, raw: bytes, body: wire.RunBody, operation: Operation
) -> Response:
    if body.run_id is not None and body.run_id != run.id:
        raise BadRequest("run_id", f"{run.id}, the run that this URL belongs to; got {body.run_id!r}")
    if body.model is not None and body.model != run.base_model:
        await control.catalogue.same_model(body.model, run.base_model, "model")
    if body.seq_id is not None and not 1 <= body.seq_id < 2**63:
        raise BadRequest("seq_id", f"a positive number, got {body.seq_id}")
    await check_not_refused(request, run, body.seq_id)
    submission = Submission(
        id=checked_operation_id(request.headers.get("idempotency-key") or new_id() + new_id()),
        kind=kind_of(operation),
        seq=body.seq_id,
        fingerprint=await off_loop(len(raw), lambda: validate.fingerprint(request.url.path, raw)),
    )
    operation_id = await control.operations.accept(run, submission, operation)
    return JSONResponse(
        msgspec.to_builtins(wire.Acceptance(operation_id)), 202, {"Location": f"/operations/{operation_id}"}
    )
