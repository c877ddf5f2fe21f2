"""The ids of futures, and what their polls are answered: the result, the error, or 408 to ask again.

An id says what it is the future of, so that it means the same after a restart.
"""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from selfloop.control.control import Control
from selfloop.control.operations import Pending
from selfloop.control.resources.access import Caller
from selfloop.control.settle import Outcome
from selfloop.server.auth import ControlOf
from selfloop.server.decode import decode
from selfloop.server.errors import body_of
from selfloop.server.limits import read_body
from selfloop.server.offload import off_loop
from selfloop.server.tinker import names, wire
from selfloop.server.tinker.http import CallerOf, TinkerRoute, refusal
from selfloop.server.tinker.results import render
from selfloop.types.errors import BadRequest, Conflict, NotFound, SelfloopError

router = APIRouter(prefix="/api/v1", tags=["tinker"], route_class=TinkerRoute)

PROTOBUF = "application/x-protobuf"
# The client reads for 45 s.
_POLL_HOLD_S = 30.0
_LOST = 410
_CREATED = ("create_model", "load_weights", "unload_model")
# What the request itself was to blame for.
_USER_ERRORS = {
    "BadRequest",
    "Cancelled",
    "CheckpointInvalid",
    "Conflict",
    "NonFiniteGradient",
    "NonFiniteLogits",
    "NonFiniteLoss",
    "NotFound",
}


def created(run_id: str, kind: str) -> dict[str, str]:
    """The future of something that is done already."""
    return {"request_id": f"{kind}/{run_id}", "model_id": names.their_id(run_id)}


def of_operation(run_id: str, operation_id: str) -> dict[str, str]:
    return {"request_id": f"operation/{run_id}/{operation_id}", "model_id": names.their_id(run_id)}


def of_sample(sampler_id: str, seq: int) -> str:
    return f"sample/{sampler_id}/{seq}"


@router.post("/retrieve_future")
async def retrieve_future(request: Request, caller: CallerOf, control: ControlOf) -> Response:
    """The future's result, held for up to 30 s; 408 with the reason while there is none."""
    body = decode(await read_body(request), wire.RetrieveFuture)
    match body.request_id.split("/"):
        case [kind, run_id] if kind in _CREATED:
            run = (await control.runs.get(caller, run_id)).run
            return JSONResponse({"model_id": names.their_id(run.id), "type": kind})
        case ["operation", run_id, operation_id]:
            return await _operation(caller, control, body.request_id, run_id, operation_id)
        case ["sample", sampler_id, _seq]:
            return await _sample(caller, control, body.request_id, sampler_id)
        case _:
            return refusal(NotFound("request", body.request_id[:200]), _LOST)


async def _operation(caller: Caller, control: Control, request_id: str, run_id: str, operation_id: str) -> Response:
    run = await control.runs.live(caller, run_id)
    control.lifecycle.touch(run.deployment_id)
    try:
        outcome = await control.operations.wait(run.id, operation_id, _POLL_HOLD_S)
    except NotFound as error:
        return _failed(str(error), "server")
    match outcome:
        case Pending(reason):
            return _pending(request_id, reason)
        case Outcome(result, error, error_class):
            if result is None:
                return _failed(error or "the operation failed", _category(error_class))
            content = await off_loop(len(result), lambda: render(result, run.id))
            if isinstance(content, bytes):
                return Response(content, media_type=PROTOBUF)
            return JSONResponse(content)


async def _sample(caller: Caller, control: Control, request_id: str, sampler_id: str) -> Response:
    sampler = await control.samplers.get(caller, sampler_id)
    try:
        answer = await control.jobs.wait(request_id, _POLL_HOLD_S)
    except NotFound as error:
        # Lost with an earlier gateway, or kept long enough: the client draws it anew.
        return refusal(error, _LOST)
    if isinstance(answer, Pending):
        return _pending(request_id, control.lifecycle.describe(sampler.id) or answer.reason)
    if answer.error is not None:
        return _failed(str(answer.error), _category_of(answer.error))
    return Response(answer.body, media_type=PROTOBUF)


def _pending(request_id: str, reason: str) -> Response:
    again = {"type": "try_again", "request_id": request_id, "queue_state": "active", "queue_state_reason": reason}
    return JSONResponse(body_of(reason, "PENDING") | again, 408)


def _failed(error: str, category: str) -> Response:
    return JSONResponse({"error": error, "category": category})


def _category(error_class: str | None) -> str:
    return "user" if error_class in _USER_ERRORS else "server"


def _category_of(error: SelfloopError) -> str:
    return "user" if isinstance(error, BadRequest | NotFound | Conflict) else "server"
