"""The ids of futures, and what their polls are answered: the result, the error, or 408 to ask again.

An id says what it is the future of, so that it means the same after a restart.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.gateway import Control
from selfloop.control.queue.operations import Pending
from selfloop.control.queue.outcomes import Outcome
from selfloop.control.resources.access import Caller
from selfloop.control.sampling.completions import Completion
from selfloop.server.shared.auth import CallerOf, ControlOf, caller_of, control_of
from selfloop.server.shared.body import off_loop, read_body
from selfloop.server.shared.decode import decode
from selfloop.server.shared.dialect import Poll
from selfloop.server.shared.errors import body_of
from selfloop.server.tinker import names, wire
from selfloop.server.tinker.errors import RESPONSES, gone
from selfloop.server.tinker.results import render
from selfloop.types.errors import BadRequest, Conflict, NotFound, SelfloopError
from selfloop.types.status import DeploymentStatus, SamplerStatus

router = APIRouter(prefix="/api/v1", tags=["tinker"], responses=RESPONSES)

PROTOBUF = "application/x-protobuf"
# The client reads for 45 s.
_POLL_HOLD_S = 30.0
_SEQS_OF_A_CLIENT = 10**9
_CREATED = ("create_model", "load_weights", "unload_model")
# What the request itself was to blame for.
_USER_ERRORS = {
    "BadRequest",
    "Cancelled",
    "CheckpointInvalid",
    "Conflict",
    "ModelInvalid",
    "NonFiniteGradient",
    "NonFiniteLogits",
    "NonFiniteLoss",
    "NotFound",
}


def created(run_id: str, kind: str) -> dict[str, str]:
    """The future of something that is done already."""
    return {"request_id": f"{kind}/{run_id}", "model_id": names.their_id(run_id)}


def created_loss(session_id: str, number: int) -> dict[str, str]:
    """The future of an uploaded loss, which is kept already."""
    return {"request_id": f"create_custom_loss/{session_id}/{number}"}


def of_operation(run_id: str, operation_id: str) -> dict[str, str]:
    return {"request_id": f"operation/{run_id}/{operation_id}", "model_id": names.their_id(run_id)}


def of_sample(sampler_id: str, seq: int) -> str:
    return f"sample/{sampler_id}/{seq}"


def channel_of(sampler_id: str, seq: int) -> str:
    """Who hears of a sample's end: one client of the sampler, each with a range of numbers of its own."""
    return f"{sampler_id}/{seq // _SEQS_OF_A_CLIENT}"


@router.post("/retrieve_future", openapi_extra=wire.SCHEMAS.json_body(wire.RetrieveFuture))
async def retrieve_future(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """The future's result, held for up to 30 s; 408 with the reason while there is none."""
    body = decode(await read_body(request), wire.RetrieveFuture)
    match body.request_id.split("/"):
        case [kind, run_id] if kind in _CREATED:
            run = (await control.runs.get(caller, run_id)).run
            return JSONResponse({"model_id": names.their_id(run.id), "type": kind})
        case ["create_custom_loss", session_id, number] if number.isascii() and number.isdigit() and len(number) < 7:
            await control.custom_losses.get(caller, session_id, int(number))
            return JSONResponse({"loss_id": f"{session_id}:loss:{number}", "type": "create_custom_loss"})
        case ["operation", run_id, operation_id]:
            return await _operation(caller, control, body.request_id, run_id, operation_id)
        case ["sample", sampler_id, _seq]:
            return await _sample(caller, control, body.request_id, sampler_id)
        case _:
            return gone(NotFound("request", body.request_id[:200]))


@router.post("/retrieve_futures", openapi_extra=wire.SCHEMAS.json_body(wire.RetrieveFutures))
async def retrieve_futures(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, object]:
    """Which samples of one client ended since ``prev_cursor``, held for up to 30 s while there are none."""
    raw = await read_body(request)
    body = await off_loop(len(raw), lambda: decode(raw, wire.RetrieveFutures))
    sampler_id = names.sampler_id(body.target.sampling_session_id)
    await control.samplers.check_access(caller, sampler_id)
    hold_s = _POLL_HOLD_S if body.timeout is None else min(body.timeout, _POLL_HOLD_S)
    channel = f"{sampler_id}/{body.target.cloned_sampler_id}"
    control.jobs.retrieved(channel, body.retrieved_request_ids)
    control.lifecycle.touch(sampler_id)
    ended, cursor = await control.jobs.completions(channel, body.prev_cursor, hold_s)
    return {"completions": [_completion(one) for one in ended], "cursor": cursor}


def _completion(ended: Completion) -> dict[str, object]:
    if ended.size is None:
        return {"state": "failed", "request_id": ended.key}
    return {"state": "finished", "request_id": ended.key, "response_payload_uncompressed_size": ended.size}


@router.post("/cancel_future", openapi_extra=wire.SCHEMAS.json_body(wire.CancelFuture))
async def cancel_future(request: Request, caller: CallerOf, control: ControlOf) -> dict[str, str]:
    """End a sample that nobody waits for; one that has ended, or was never asked for, is let be."""
    body = decode(await read_body(request), wire.CancelFuture)
    match body.request_id.split("/"):
        case ["sample", sampler_id, _seq]:
            await control.samplers.check_access(caller, sampler_id)
            control.jobs.cancel(body.request_id)
        case _:
            raise BadRequest("request_id", "the future of a sample: nothing else is cancelled")
    return {"type": "cancel_future"}


async def _poll(request: Request) -> Response:
    return await retrieve_future(request, caller_of(request), control_of(request))


POLL = Poll("POST", router.prefix + "/retrieve_future", _poll)


async def _operation(caller: Caller, control: Control, request_id: str, run_id: str, operation_id: str) -> Response:
    run = await control.runs.live(caller, run_id)
    control.lifecycle.touch(run.deployment_id)
    try:
        outcome = await control.operations.wait(run.id, operation_id, _POLL_HOLD_S)
    except NotFound as error:
        return _failed(str(error), "server")
    match outcome:
        case Pending(reason):
            return _pending(request_id, reason, _queue_state(control, run.deployment_id, DeploymentStatus.RUNNING))
        case Outcome(result, error, error_class):
            if result is None:
                return _failed(error or "the operation failed", _category(error_class))
            content = await off_loop(len(result), lambda: render(result, run.id))
            if isinstance(content, bytes):
                return Response(content, media_type=PROTOBUF)
            return JSONResponse(content)


async def _sample(caller: Caller, control: Control, request_id: str, sampler_id: str) -> Response:
    await control.samplers.check_access(caller, sampler_id)
    try:
        answer = await control.jobs.wait(request_id, _POLL_HOLD_S)
    except NotFound as error:
        # Lost with an earlier gateway, or kept long enough: the client samples it anew.
        return gone(error)
    if isinstance(answer, Pending):
        reason = control.lifecycle.describe(sampler_id) or answer.reason
        return _pending(request_id, reason, _queue_state(control, sampler_id, SamplerStatus.ACTIVE))
    if answer.error is not None:
        return _failed(str(answer.error), _category_of(answer.error))
    return Response(answer.body, media_type=PROTOBUF)


def _queue_state(control: Control, capacity_id: str, working: str) -> str:
    """Whether the work waits for capacity that is not up, or goes on."""
    return "active" if control.lifecycle.status(capacity_id) in (working, None) else "paused_capacity"


def _pending(request_id: str, reason: str, state: str) -> Response:
    again = {"type": "try_again", "request_id": request_id, "queue_state": state, "queue_state_reason": reason}
    return JSONResponse(body_of(reason, "PENDING") | again, 408)


def _failed(error: str, category: str) -> Response:
    return JSONResponse({"error": error, "category": category})


def _category(error_class: str | None) -> str:
    return "user" if error_class in _USER_ERRORS else "server"


def _category_of(error: SelfloopError) -> str:
    return "user" if isinstance(error, BadRequest | NotFound | Conflict) else "server"
